"""What a process computes on: CPUs of its own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from plugins import hardware

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says on which CPU a thread runs")


@contextmanager
def pinned() -> Iterator[set[int]]:
    """A thread with one CPU of its own, while the block lasts: the CPUs that it may run on."""
    found: list[set[int]] = []
    with ExitStack() as claims:

        def work() -> None:
            torch.set_num_threads(1)
            claims.enter_context(hardware.pin_threads(1))
            found.append(os.sched_getaffinity(0))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        yield found[0]


def test_threads_of_different_engines_have_different_cpus() -> None:
    everywhere = os.sched_getaffinity(0)
    with ExitStack() as engines:
        places = [engines.enter_context(pinned()) for _ in everywhere]
        own = [place for place in places if len(place) == 1]
        assert len(set().union(*own)) == len(own)
        with pinned() as late:
            assert late == everywhere, "there is no CPU left, and so it may run on any"
    with pinned() as again:
        assert len(own) == 0 or len(again) == 1, "what has been given back is there for the next"
    assert os.sched_getaffinity(0) == everywhere, "nobody else is confined"


def team() -> list[list[int]]:
    """The CPUs that each thread may run on of as many as there are CPUs."""
    places: list[list[int]] = []

    def work() -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        with hardware.pin_threads(torch.get_num_threads()):
            name = (hardware.TASKS / str(threading.get_native_id()) / "comm").read_text()
            threads = [int(task.name) for task in hardware.TASKS.iterdir() if (task / "comm").read_text() == name]
            places.extend(sorted(os.sched_getaffinity(one)) for one in threads)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return sorted(places)


def test_each_thread_of_a_team_has_a_cpu_or_none_has() -> None:
    everywhere = sorted(os.sched_getaffinity(0))
    anywhere = [everywhere] * len(everywhere)
    assert team() in ([[cpu] for cpu in everywhere], anywhere)  # anywhere: if an engine computes on this machine
    with pinned():
        assert team() == anywhere


@pytest.mark.slow
def test_a_librarys_threads_stay_on_the_cpus_of_their_engine() -> None:
    """OpenVINO's, which do not run where the thread may that starts them; in a process of its own, for it looks once."""
    ran = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, timeout=60, check=True)
    everywhere, during, computing, after = json.loads(ran.stdout)
    if during != everywhere:  # a CPU was left
        assert len(during) == 1
        assert computing
        assert all(place == during for place in computing)
    assert after == everywhere


CONFINED = """if True:
    import json, os, threading
    import numpy, openvino
    from openvino import opset13
    from plugins import hardware

    def tasks():
        return {name: sorted(os.sched_getaffinity(int(name))) for name in os.listdir(hardware.TASKS)}

    def ticks(name):
        return sum(map(int, (hardware.TASKS / name / "stat").read_text().rpartition(")")[2].split()[11:13]))

    def work():
        with hardware.confined_threads(1) as claim:
            told.append(sorted(os.sched_getaffinity(0)))
            x = opset13.parameter([-1, 512], numpy.float32)
            y = opset13.matmul(x, opset13.constant(numpy.ones((512, 512), numpy.float32)), False, False)
            model = openvino.Model([y], [x])
            compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": False})
            kept = claim.pop_all()
        before = {name: ticks(name) for name in tasks()}
        for _ in range(50):
            compiled(numpy.ones((2000, 512), numpy.float32))
        told.append([place for name, place in tasks().items() if ticks(name) > before.get(name, 0) + 2])
        kept.close()

    told = [sorted(os.sched_getaffinity(0))]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    print(json.dumps([*told, sorted(os.sched_getaffinity(0))]))
"""
