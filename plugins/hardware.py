"""What this process computes on: the one place that names devices."""

import os
from typing import Literal

import torch


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


def use_threads(cpus: float) -> None:
    """Let torch use the CPUs that this worker was given; Ray's own default is one thread a worker."""
    torch.set_num_threads(max(1, min(int(cpus), os.cpu_count() or 1)))
