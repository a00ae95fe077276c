"""Layers of lean.py one after another in one call of native.cpp: the numbers are the same to the bit.

A step of a model of twelve layers makes nearly two hundred calls otherwise. They take a fifth of its time where few tokens
are computed, and before each the engine's thread waits for Python's lock, which a replica's event loop may have.
"""

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_float, c_long, c_void_p
from typing import TYPE_CHECKING

import torch

from plugins.engines.layers import Panels, Product
from plugins.engines.native import Heads, Native, Rows

if TYPE_CHECKING:
    from plugins.engines.lean import Block

KINDS = (torch.float32, torch.bfloat16, torch.int8)


class _Weights(Structure):
    """As in native.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("panels", "scales", "bias")),
        *((name, c_long) for name in ("inputs", "outputs", "kind")),
    ]


class _Layer(Structure):
    """As in native.cpp."""

    _fields_ = [
        *((name, _Weights) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("before", "after", "of_query", "of_key")),
        ("eps", c_float),
        ("scale", c_float),
        ("window", c_long),
    ]


class _Layers(Structure):
    """As in native.cpp."""

    _fields_ = [
        *((name, c_long) for name in ("count", "heads", "width")),
        ("layers", c_void_p),
        ("tokens", c_long),
        *((name, c_void_p) for name in ("x", "cosines", "sines")),
        ("rows", Heads),
    ]


class NativeLayers:
    """A model's `blocks`, for tokens without adapters."""

    def __init__(self, native: Native, blocks: Sequence["Block"]) -> None:
        self._native, self._blocks = native, blocks
        self._layers = (_Layer * len(blocks))(*(_layer(block) for block in blocks))

    @staticmethod
    def can(blocks: Sequence["Block"], dtype: torch.dtype) -> bool:
        """Whether native.cpp has all that they are made of, in `dtype`."""
        return all(
            all(_fits(linear.product, dtype) for linear in (block.qkv, block.o, block.gate_up, block.down))
            and len({norm.eps for norm in block.norms if norm}) == 1
            and all(norm.weight.dtype == dtype for norm in block.norms if norm)
            for block in blocks
        )

    def __call__(
        self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, rows: Rows, count: int
    ) -> torch.Tensor:
        """Itself, x [tokens, inputs], as it is after the first `count` layers; `cosines` and `sines` as in lean.Between."""
        block = self._blocks[0]
        heads = self._native.heads(rows, 0, block.kv_heads, block.heads // block.kv_heads, block.width, block.width)
        parts = (x.data_ptr(), cosines.data_ptr(), sines.data_ptr())
        made = _Layers(count, block.heads, block.width, addressof(self._layers), len(x), *parts, heads)
        self._native.function("layers", x.dtype)(byref(made))
        return x


def _fits(product: Product, dtype: torch.dtype) -> bool:
    return isinstance(product, Panels) and product.computes == dtype and 2 * product.panels.shape[1] == product.shape[1]


def _layer(block: "Block") -> _Layer:
    addresses = (norm.weight.data_ptr() if norm else None for norm in block.norms)
    products = (linear.product for linear in (block.qkv, block.o, block.gate_up, block.down))
    weights = (_weights(product) for product in products if isinstance(product, Panels))
    return _Layer(*weights, *addresses, block.norms[0].eps, block.rule.scale, block.rule.window or 0)


def _weights(product: Panels) -> _Weights:
    tensors = (product.panels, product.scales, product.bias)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    outputs, inputs = product.shape
    return _Weights(*addresses, inputs, outputs, KINDS.index(product.panels.dtype))
