"""What this process computes on: the one place that names devices."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Literal

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
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
