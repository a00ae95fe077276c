"""What a process computes on: CPUs of its own."""

import os
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


def test_threads_of_a_confined_one_stay_with_it() -> None:
    """Also those that a library starts: a thread inherits where it may run."""
    everywhere = os.sched_getaffinity(0)
    places: list[set[int]] = []
    ready, done = threading.Event(), threading.Event()

    def work() -> None:
        with hardware.confine_threads(1):
            child = threading.Thread(target=lambda: places.append(os.sched_getaffinity(0)))
            child.start()
            child.join()
            ready.set()
            done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    with pinned() as other:
        (own,) = places
        assert everywhere in (own, other) or not own & other  # everywhere: where no CPU is left
        assert len(own) in (1, len(everywhere))
    done.set()
    thread.join()
    assert os.sched_getaffinity(0) == everywhere
