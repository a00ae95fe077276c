"""The servers that we measure: how each is started on a port, when it is ready, what it holds in memory, how it is ended.

Only one runs at a time. Whatever it starts, Ray's daemons and worker processes too, is a descendant of this process
(Linux hands the orphans among them to us), so that all of it is counted, and all of it is gone at the end.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench import load

PR_SET_CHILD_SUBREAPER = 36  # prctl.h
READY_S, END_S = 600.0, 30.0
MAIN, VLLM = sys.executable, ".venv-vllm/bin/python"
CACHE_GIB = 2  # for keys and values, vLLM's: room for 64 x 2048 tokens
LONG = {"bf16": "bfloat16", "fp32": "float32"}  # what peers call them
OURS = """from serve import *

model = ServedModel(
    id="bench",
    source=ModelSource({model!r}, dtype={dtype!r}),
    engine={engine},
    cpus={threads},
)
config = ServeConfig(models=(model,), port={port})
"""
Command = Callable[[Path, int, int, Path, str], list[str]]


@dataclass(frozen=True)
class Server:
    """`command`: what starts it, from the model's directory, a port, threads, a directory for files of its own and a dtype.

    `model`: what requests call the model; None is its directory. `fields`: what it wants in a body besides the usual.
    """

    command: Command
    fields: Mapping[str, Any]
    model: str | None = "bench"
    environment: Mapping[str, str] = field(default_factory=dict)


def ours(engine: str) -> Command:
    """`engine`: as a config writes it."""

    def command(model: Path, port: int, threads: int, files: Path, dtype: str) -> list[str]:
        config = files / "bench.py"
        config.write_text(OURS.format(model=str(model), dtype=dtype, engine=engine, threads=threads, port=port))
        return [MAIN, "-m", "ui.cli", "serve", str(config)]

    return command


def vllm(model: Path, port: int, threads: int, files: Path, dtype: str) -> list[str]:
    options = ["--dtype", LONG[dtype], "--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(port)]
    return [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]


def transformers(model: Path, port: int, threads: int, files: Path, dtype: str) -> list[str]:
    # Its steps cost what the whole cache costs, used or not, and by itself it takes most of the memory for one. This much,
    # blocks of 256 tokens, holds 32 clients; with eight times as many it had a fifth of the speed.
    cache = ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]
    computing = ["--continuous-batching", *cache, "--device", "cpu", "--dtype", LONG[dtype]]
    listening = ["--host", "127.0.0.1", "--port", str(port)]
    return [str(Path(MAIN).parent / "transformers"), "serve", str(model), *computing, *listening]


ENGINES = {  # those of ours, by the name of their contender
    "torch": f"Torch(max_batch={load.MIXED_CLIENTS})",
    "torch-int8": f"Torch(max_batch={load.MIXED_CLIENTS}, weights='int8')",
    "openvino": f"OpenVino(max_batch={load.MIXED_CLIENTS})",
    "openvino-int8": f"OpenVino(max_batch={load.MIXED_CLIENTS}, weights='int8')",
    "ipex": f"Ipex(max_batch={load.MIXED_CLIENTS})",
    "vllm": f"Vllm(max_batch={load.MIXED_CLIENTS}, kv_memory='{CACHE_GIB}GiB', compiled=True)",  # as its server is by itself
}
SERVERS = {
    **{name: Server(ours(engine), {"ignore_eos": True}) for name, engine in ENGINES.items()},
    "vllm-server": Server(
        vllm,
        {"ignore_eos": True},
        environment={
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # by itself it leaves one core to the HTTP server: here, one of two
            "LD_PRELOAD": str(Path(VLLM).absolute().parents[1] / "lib/libiomp5.so"),  # as its page on CPUs advises
            "VLLM_NO_USAGE_STATS": "1",
        },
    ),
    "transformers-serve": Server(transformers, {"generation_config": '{"eos_token_id": -1}'}, model=None),
}


@contextmanager
def running(
    server: Server, model: Path, threads: int, files: Path, dtype: str, environment: Mapping[str, str]
) -> Iterator[load.Client]:
    """A client of the server, which runs for the block and is ended with all that it started.

    What it says is in `files`/log. Exits with the end of that where it does not start.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends the bench so ends the server too
    adopt_orphans()
    port, log = free_port(), files / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            server.command(model, port, threads, files, dtype),
            env={**environment, **server.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, port, log)
        yield load.Client(port, server.model or str(model), server.fields)
    finally:
        end(process)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends. See PR_SET_CHILD_SUBREAPER in prctl(2)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not healthy(port):
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            why = f"ended with exit code {process.returncode}" if ended else f"did not answer within {READY_S:.0f} s"
            sys.exit(f"{log.read_text()[-4000:]}\nbench: the server {why}")
        time.sleep(0.2)


def healthy(port: int) -> bool:
    """Whether GET /health says yes: nobody listens at first, and some answer with an error before they are ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; then whoever is left is killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    while left := descendants():
        for one in left:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        os.waitpid(-1, 0)  # at least one of them is a child of this process


def descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended in between
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found = list(children.get(os.getpid(), ()))
    for process in found:
        found += children.get(process, ())
    return found


def peak_rss_mib() -> float:
    """Of all processes of the server: the most that each of them had at any time. What they share counts for each."""
    peaks = []
    for process in descendants():
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            peaks += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return sum(peaks)
