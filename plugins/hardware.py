"""What this process computes on: the one place that names devices."""

import ctypes
import errno
import os
import platform
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil
import torch

# By whom: torch on CPUs, CUDA, cuBLAS. An allocation of torch's own on a GPU has a class of its own.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
CGROUP = Path("/sys/fs/cgroup")
SYSTEM, TASKS = Path("/sys/devices/system"), Path("/proc/self/task")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h of glibc


def device(gpus: float) -> torch.device:
    """What a worker that was given `gpus` computes on: its own GPU, or the CPU where it was given none.

    A Ray worker may see the GPUs of its whole node; which one is its own, Ray has made the current one.
    """
    return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")


def compute_dtype(wanted: Literal["auto", "bf16", "fp32"], on: torch.device) -> torch.dtype:
    """The dtype of matrix products: `wanted`, or bf16 where `on` multiplies it natively."""
    if wanted == "auto":
        return torch.bfloat16 if has_bf16(on) else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def has_bf16(on: torch.device) -> bool:
    if on.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without these instructions oneDNN emulates bf16, which is slower than fp32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def free_memory(on: torch.device) -> int:
    """Bytes that could be allocated on `on` now."""
    if on.type == "cuda":
        return int(torch.cuda.mem_get_info(on)[0])
    available: int = psutil.virtual_memory().available
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip() != "max":  # a container may have less than its machine
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what torch, or the mapping of memory, raises where there is no more."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def use_cpus(cpus: float) -> None:
    """Let torch use the CPUs that this worker was given (Ray's own default is one thread a worker), and keep its memory."""
    torch.set_num_threads(max(1, min(int(cpus), os.cpu_count() or 1)))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Keep what a step frees for the next one, as torch's allocator for GPUs does.

    glibc gives large blocks back to the kernel, which has to find and zero every page of them again: on two cores that was
    an eighth of a training step. The peak stays what it was. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(name, value)


def pin_threads(cpus: float) -> ExitStack:
    """Give the calling thread, and each thread of its OpenMP team, a CPU that no other replica of this machine has.

    To be called before it computes, with the number of threads set. The CPUs are its own until what is returned is closed.
    Where there are not enough free ones, or no Linux to say so, threads run where they are put, as before: where two of a
    team land on one core, each waits for the other at every operator.
    """
    threads = torch.get_num_threads()
    if platform.system() != "Linux" or cpus != threads:
        return ExitStack()
    # Threads have the name of the one that made them.
    me, name = threading.get_native_id(), f"torch-{threading.get_native_id()}"
    (TASKS / str(me) / "comm").write_text(name)
    torch.zeros(2**20).add_(1)  # makes the team
    team = [int(task.name) for task in TASKS.iterdir() if _is_called(task, name)]
    places, claim = claim_cpus(threads) if len(team) == threads else ([], ExitStack())
    for thread, cpu in zip([me, *(one for one in team if one != me)], places, strict=bool(places)):
        os.sched_setaffinity(thread, {cpu})
    return claim


@contextmanager
def confined_threads(cpus: float) -> Iterator[ExitStack]:
    """Let the calling thread, and those that a library starts in the block, run only on CPUs that no other replica here has.

    For libraries whose threads come and go as they like. Yields what gives the CPUs back; the rest is as in `pin_threads`.
    """
    whole = platform.system() == "Linux" and cpus == int(cpus)
    places, claim = claim_cpus(int(cpus)) if whole else ([], ExitStack())
    with claim:
        if not places:
            yield claim
            return
        os.sched_setaffinity(0, places)
        # TBB lets its threads run where the process, that is its main thread, could run when TBB came to be.
        process, everywhere = os.getpid(), os.sched_getaffinity(os.getpid())
        os.sched_setaffinity(process, places)
        try:
            yield claim
        finally:
            os.sched_setaffinity(process, everywhere)


def _is_called(task: Path, name: str) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile, as an earlier engine's may
        return (task / "comm").read_text().strip() == name
    return False


def claim_cpus(count: int) -> tuple[list[int], ExitStack]:
    """CPUs of one NUMA node, if it has so many to give, and what keeps them ours; no CPUs where there are too few."""
    nodes = [[int(cpu.name[3:]) for cpu in node.glob("cpu[0-9]*")] for node in sorted(SYSTEM.glob("node/node[0-9]*"))]
    every = sorted(os.sched_getaffinity(0))
    for node in [*([cpu for cpu in every if cpu in node] for node in nodes), every]:
        with ExitStack() as claims:
            mine: list[int] = []
            for cpu in sorted(node, key=_sibling):
                with suppress(OSError):  # somebody else's
                    # Linux frees an abstract address when its owner ends, however that comes about. See unix(7).
                    claims.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0manta-cpu-{cpu}")
                    mine.append(cpu)
                if len(mine) == count:
                    return mine, claims.pop_all()
    return [], ExitStack()


def _sibling(cpu: int) -> tuple[int, int]:
    """Sorts CPUs so that those of different cores come first, then those that share one with an earlier."""
    siblings = SYSTEM / f"cpu/cpu{cpu}/topology/thread_siblings_list"
    first = siblings.read_text().replace("-", ",").split(",")[0].strip() if siblings.is_file() else str(cpu)
    return int(int(first) != cpu), cpu
