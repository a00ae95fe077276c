"""native.cpp: compiled for the machine that it runs on, at the first start of an engine there, and called with tensors.

Without a C++ compiler (g++, or what CXX names) engines do without it, and say so: torch's own operators compute then.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from ctypes import Structure, byref, c_float, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from plugins.cache_folder import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
# Without errors and infinities, a maximum is one instruction. Sums stay in the order in which they are written.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only",
)  # fmt: skip
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


class _Product(Structure):
    """As in native.cpp."""

    _fields_ = [
        *((name, c_long) for name in ("rows", "inputs", "outputs")),
        *((name, c_void_p) for name in ("x", "panels", "scales", "bias", "to", "result")),
    ]


class Heads(Structure):
    """As in native.cpp."""

    _fields_ = [
        *((name, c_long) for name in ("sequences", "kv_heads", "group", "width", "value_width")),
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((name, c_long) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, c_void_p) for name in ("keys", "values", "capacities", "firsts", "counts", "starts")),
        ("scale", c_float),
        ("window", c_long),
        ("softcap", c_float),
        ("result", c_void_p),
    ]


class Rows:
    """Where the keys and values of a step's sequences lie, each in a row of the cache, and their tokens in the step.

    `keys`, `values` [layers, sequences]: addresses; how they lie there, Heads in native.cpp says. The others [sequences]:
    how many tokens a row has room for; the first token in the step, how many there are, and where they come in the sequence.
    """

    def __init__(
        self,
        keys: np.ndarray,
        values: np.ndarray,
        *,
        capacities: Sequence[int],
        firsts: Sequence[int],
        counts: Sequence[int],
        starts: Sequence[int],
    ) -> None:
        self.keys, self.values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        told = {"capacities": capacities, "firsts": firsts, "counts": counts, "starts": starts}
        self.each = {name: np.array(numbers, np.int64) for name, numbers in told.items()}


class Native:
    """The functions of native.cpp. What they are given is dense but where it says so, on the CPU, in fp32 or bf16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.panel: int = library.manta_panel()
        self.has_tiles = bool(library.manta_has_tiles())  # products of bf16, in AMX
        self.threads: Callable[[], int] = library.manta_threads  # of the team that it computes with
        sizes = [c_long, c_long, c_long]
        for kind in (torch.float32, torch.bfloat16):
            self.function("norm", kind).argtypes = [*sizes, c_void_p, c_long, c_void_p, c_float, c_void_p]
            self.function("gate", kind).argtypes = [c_long, c_long, c_void_p, c_void_p]
            self.function("rotate", kind).argtypes = [*sizes, c_void_p, c_long, c_void_p, c_void_p]

    def function(self, what: str, kind: torch.dtype) -> Any:
        return getattr(self._library, f"manta_{what}_{NAMES[kind]}")

    def panels(self, weight: torch.Tensor, *, in_tiles: bool = False) -> torch.Tensor:
        """[out, in] -> what `product` reads, of x in fp32, or with `in_tiles` in bf16: see Product in native.cpp."""
        outputs, inputs = weight.shape
        count, deep = -(-outputs // self.panel), 32 if in_tiles else 2
        padded = weight.new_zeros(count * self.panel, -(-inputs // deep) * deep)
        padded[:outputs, :inputs] = weight
        halves = padded.view(count, 2, self.panel // 2, -1, 2)  # [panels, halves, lanes, pairs of inputs, 2]
        in_pairs = in_tiles and weight.dtype == torch.bfloat16
        return halves.permute(0, 3, 1, *((2, 4) if in_pairs else (4, 2))).contiguous()

    def weight(self, panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
        """What `panels` were made of: [out, in]."""
        halves = panels.permute(0, 2, *((3, 1, 4) if panels.shape[-1] == 2 else (4, 1, 3)))
        return halves.reshape(len(panels) * self.panel, -1)[:outputs, :inputs]

    def product(
        self,
        x: torch.Tensor,
        panels: torch.Tensor,
        outputs: int,
        *,
        scales: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[rows, out] of `x` [rows, in]: times the weights, times fp32 `scales` [out], plus fp32 `bias` [out], plus `to`.

        x, `to` and what is made are in fp32; in bf16 where `panels` are to be multiplied in tiles. Sums are fp32 always. A
        row's numbers are the same to the bit, whatever rows are beside it; but with integers in tiles, beside up to three.
        """
        if missing := 2 * panels.shape[1] - x.shape[1]:
            x = functional.pad(x, (0, missing))
        result = x.new_empty(len(x), outputs)
        rest = [None if tensor is None else tensor.data_ptr() for tensor in (scales, bias, to)]
        made = _Product(len(x), x.shape[1], outputs, x.data_ptr(), panels.data_ptr(), *rest, result.data_ptr())
        self.function("tiles" if x.dtype == torch.bfloat16 else "product", panels.dtype)(byref(made))
        return result

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm over the last dimension; x [tokens, width], or [tokens, heads, width] with any stride of the tokens."""
        heads = 1 if x.dim() == 2 else x.shape[1]
        result = x.new_empty(x.shape)
        self.function("norm", x.dtype)(
            len(x), heads, x.shape[-1], x.data_ptr(), x.stride(0), weight.data_ptr(), eps, result.data_ptr()
        )
        return result

    def gate(self, both: torch.Tensor) -> torch.Tensor:
        """[rows, 2 n] -> [rows, n]: SiLU of the first half times the second."""
        result = both.new_empty(len(both), both.shape[1] // 2)
        self.function("gate", both.dtype)(*result.shape, both.data_ptr(), result.data_ptr())
        return result

    def rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Itself, x [tokens, heads, width] with any stride of the tokens, turned; see lean.Between."""
        self.function("rotate", x.dtype)(*x.shape, x.data_ptr(), x.stride(0), cosines.data_ptr(), sines.data_ptr())
        return x

    def attend(
        self,
        rows: Rows,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """As attention.Attention. The tokens of query, key and value may have any stride."""
        (tokens, heads, width), kv_heads, value_width = query.shape, key.shape[1], value.shape[2]
        query, key, value = (_dense_tokens(part) for part in (query, key, value))
        result = query.new_empty(tokens, heads, value_width)
        made = self.heads(rows, layer, kv_heads, heads // kv_heads, width, value_width)
        made.query, made.key, made.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        made.query_stride, made.key_stride, made.value_stride = query.stride(0), key.stride(0), value.stride(0)
        made.scale, made.window, made.softcap, made.result = scale, window or 0, softcap or 0, result.data_ptr()
        self.function("attend", query.dtype)(byref(made))
        return result

    def heads(self, rows: Rows, layer: int, kv_heads: int, group: int, width: int, value_width: int) -> Heads:
        """What native.cpp is told of where the keys and values of `layer` lie; `group` heads share a KV head."""
        return Heads(
            sequences=rows.keys.shape[1], kv_heads=kv_heads, group=group, width=width, value_width=value_width,
            keys=rows.keys[layer].ctypes.data, values=rows.values[layer].ctypes.data,
            **{name: each.ctypes.data for name, each in rows.each.items()},
        )  # fmt: skip


def _dense_tokens(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, width] whose last two dimensions are dense."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@cache
def load() -> Native | None:
    """Compiled, if it has not been on this machine. None, with a warning, where that cannot be done."""
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        logger.warning("no C++ compiler (%s) is here: torch's own operators compute, which are slower", name)
        return None
    try:
        return Native(ctypes.CDLL(str(_compiled(compiler))))
    except (subprocess.CalledProcessError, OSError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            "%s cannot compile %s (%s): torch's own operators compute, which are slower",
            compiler, SOURCE.name, why[0] if why else error,
        )  # fmt: skip
        return None


def _compiled(compiler: str) -> Path:
    """The library, kept by what made it: several machines may share a home, and have different CPUs."""
    # What the compiler defines by itself: its version, and what this CPU has.
    asked = [compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    defined = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join((defined, *FLAGS, SOURCE.read_text())).encode()).hexdigest()[:16]
    path = cache_folder("native") / f"{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, "-o", str(made), str(SOURCE)], capture_output=True, text=True, check=True)
            made.replace(path)  # at once: another replica may be doing the same
    return path
