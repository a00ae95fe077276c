"""The layers of a served model: products with weights that never change, and what adapters add for some of the tokens.

On a CPU native.cpp multiplies, where it can be compiled; but not bf16 without AMX. Those weights are reordered once, as
inductor's freezing does; `torch.nn.functional.linear` reorders them at every call. With 8-bit weights a step has half as
much to read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from plugins import hardware
from plugins.engines import native
from plugins.engines.integers import in_integers, scales_of, whole
from plugins.engines.native import Native

PACKED_FOR = 32  # rows that the order of packed weights is best for
FEW = 4  # rows, for which 8-bit products of small matrices have a way of their own
SMALL = 2**23  # weights: of larger matrices, reading takes the time, and a second copy would take much memory


class Product(Protocol):
    """x [..., in] -> [..., out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...
    def added(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """The product plus `to` [..., out]."""
        ...

    def weight(self) -> torch.Tensor:
        """[out, in], as it computes with them."""
        ...


Make = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], Product]  # as `product`, of all but `weights`
Weights = Literal["same", "int8"] | Make


class Plain:
    """torch's own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def added(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return to + self(x)

    def weight(self) -> torch.Tensor:
        return self._weight


class Packed:
    """oneDNN's, with weights in the order in which it reads them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return result

    def added(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, to, self._packed, self._bias, "add")
        return result

    def weight(self) -> torch.Tensor:
        result: torch.Tensor = self._packed.to_dense()
        return result


class Int8:
    """Products of 8-bit integers: weights with a scale for each output, activations with one for each token, found anew each
    time (LLM.int8(), arXiv 2208.07339, without its outliers). oneDNN's, on CPUs.

    For a few rows of a small matrix, finding those scales would take as long as the product: their activations stay whole.
    So a row's numbers are not quite the same in larger company.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor) -> None:
        integers = in_integers(weight, scales, "int8").contiguous()
        self._packed = torch.ops.onednn.qlinear_prepack(integers, [PACKED_FOR, weight.shape[1]])
        self._scales, self._bias, self._dtype = scales.flatten(), bias, weight.dtype
        self._zeros = torch.zeros(len(scales), dtype=torch.int64)
        # With other sizes torch's kernel may be wrong, or end the process: it was and did with rows of 8, 24 and 50 weights.
        is_fit = self._dtype == torch.bfloat16 and not any(size % 64 for size in weight.shape)
        self._whole = (integers, self._scales.to(self._dtype)) if is_fit and integers.numel() <= SMALL else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self._whole is not None and len(flat) <= FEW:
            few = torch._weight_int8pack_mm(flat.contiguous(), *self._whole)
            return (few if self._bias is None else few.add_(self._bias)).view(*x.shape[:-1], -1)
        largest = torch.linalg.vector_norm(flat, torch.inf, -1, keepdim=True, dtype=torch.float32)
        step = largest.div_(127).add_(1e-12)  # a row of zeros stays one
        integers = (flat / step).add_(128.5).to(torch.uint8)  # unsigned, with its zero at 128
        result: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, 128, self._packed, self._scales, self._zeros, None, 1.0, 0, self._dtype, "none", [], ""
        )
        result.mul_(step)
        return (result if self._bias is None else result.add_(self._bias)).view(*x.shape[:-1], -1)

    def added(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return to + self(x)

    def weight(self) -> torch.Tensor:
        return whole(self._packed.to_dense().t(), self._scales[:, None]).to(self._dtype)


class Panels:
    """native.cpp's: of bf16 in the tiles of a CPU that has them (AMX), else in fp32.

    Weights that bf16 can hold are kept so, which is exact and half as much to read.
    `scales`: what makes integers of them, where they are to be kept in 8 bits.
    """

    def __init__(
        self, native: Native, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None
    ) -> None:
        self._native, self._dtype, self.shape = native, weight.dtype, weight.shape
        in_tiles = native.has_tiles and weight.dtype == torch.bfloat16
        self.computes = torch.bfloat16 if in_tiles else torch.float32
        if scales is not None:
            kept = in_integers(weight, scales, "int8")
        else:
            kept = weight.bfloat16()
            kept = kept if torch.equal(kept.to(weight.dtype), weight) else weight
        self.panels = native.panels(kept, in_tiles=in_tiles)
        self.scales = None if scales is None else scales.flatten().float()
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, None)

    def added(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return self._product(x, to)

    def _product(self, x: torch.Tensor, to: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.computes).contiguous()
        to = None if to is None else to.reshape(len(flat), -1).to(self.computes).contiguous()
        made = self._native.product(flat, self.panels, self.shape[0], scales=self.scales, bias=self.bias, to=to)
        return made.to(self._dtype).view(*x.shape[:-1], -1)

    def weight(self) -> torch.Tensor:
        kept = self._native.weight(self.panels, *self.shape)
        return kept.to(self._dtype) if self.scales is None else whole(kept, self.scales[:, None]).to(self._dtype)


def product(
    weight: torch.Tensor, bias: torch.Tensor | None, weights: Weights, scales: torch.Tensor | None = None
) -> Product:
    """`scales`: those with which `weight` was once made of integers, where it was."""
    if callable(weights):
        return weights(weight, bias, scales)
    if weights == "int8" and scales is None:
        scales = scales_of(weight, "int8")
    on_cpu = weight.device.type == "cpu"
    in_bf16 = weight.dtype == torch.bfloat16 and hardware.has_bf16(weight.device)
    if on_cpu and (own := native.load()) and (own.has_tiles or not in_bf16):
        return Panels(own, weight, bias, scales)
    if scales is not None:
        return Int8(weight, bias, scales)
    return Packed(weight, bias) if on_cpu and in_bf16 and torch.backends.mkldnn.is_available() else Plain(weight, bias)


@dataclass(frozen=True)
class Update:
    """What an adapter makes of a product W x: `factor` (W x) + up (down x); LoRA, arXiv 2106.09685.

    `down` [rank, in], `up` [out, rank]; `factor` [out] only of DoRA (arXiv 2402.09353), and not for the bias.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: torch.Tensor | None = None


@dataclass(frozen=True)
class Replacement:
    """A layer of an adapter's own, instead of the base's: PEFT's `modules_to_save`."""

    weight: torch.Tensor
    bias: torch.Tensor | None


Change = Update | Replacement


class Turns:
    """Whose tokens the coming step has: (adapter, which of the tokens; None: all). Without an adapter: nothing.

    `wanted`: of those alone after which the next is to be known; the last layers are given no others.
    """

    def __init__(self) -> None:
        self.tokens: list[tuple[str, torch.Tensor | None]] = []
        self.wanted: list[tuple[str, torch.Tensor | None]] = []


class Linear(torch.nn.Module):
    """Linear layers that take the same input, side by side in one product: x [..., tokens, in] -> [..., tokens, out].

    `of_wanted`: it is given only the tokens after which the next is to be known.
    """

    def __init__(
        self, layers: Sequence[Any], turns: Turns, *, weights: Weights = "same", of_wanted: bool = False
    ) -> None:
        super().__init__()
        matrices = [layer.weight.t() if isinstance(layer, Conv1D) else layer.weight for layer in layers]
        self.inputs = matrices[0].shape[1]
        self.outputs = [matrix.shape[0] for matrix in matrices]
        self.changes: dict[str, list[Change | None]] = {}  # adapter -> of each layer
        self.bias = _side_by_side([layer.bias for layer in layers], self.outputs)
        scales = [layer.weight_scale for layer in layers if hasattr(layer, "weight_scale")]  # see quantized_files
        known = torch.cat(scales) if len(scales) == len(layers) else None
        weight = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        self.product = product(weight, self.bias, weights, known)
        self._turns, self._of_wanted = turns, of_wanted
        self.hidden: Callable[..., torch.Tensor] | None = None  # x, to -> as `added`: what a compiler sees

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; made anew, for a model that asks what its layer is like."""
        return self.product.weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hidden is not None and torch.compiler.is_compiling():
            return self.hidden(x, None)
        result = self.product(x)
        turns = self._whose()
        return self._changed(x, result, turns) if turns and self.changes else result

    def added(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """`to` [..., tokens, out] plus the product."""
        if self.hidden is not None and torch.compiler.is_compiling():
            return self.hidden(x, to)
        if self.changes and self._whose():
            return to + self.forward(x)
        return self.product.added(x, to)

    def _whose(self) -> list[tuple[str, torch.Tensor | None]]:
        return self._turns.wanted if self._of_wanted else self._turns.tokens

    def _changed(
        self, x: torch.Tensor, result: torch.Tensor, turns: list[tuple[str, torch.Tensor | None]]
    ) -> torch.Tensor:
        for adapter, tokens in turns:
            if adapter not in self.changes:
                continue
            mine, base = (x, result) if tokens is None else (x[..., tokens, :], result[..., tokens, :])
            parts, biases = base.split(self.outputs, -1), self._biases()
            made = [_change(mine, part, bias, change)
                    for part, bias, change in zip(parts, biases, self.changes[adapter], strict=True)]  # fmt: skip
            whole = torch.cat(made, -1) if len(made) > 1 else made[0]
            if tokens is None:
                return whole
            result[..., tokens, :] = whole
        return result

    def _biases(self) -> Sequence[torch.Tensor | None]:
        return [None] * len(self.outputs) if self.bias is None else self.bias.split(self.outputs)


def _change(x: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None, change: Change | None) -> torch.Tensor:
    if change is None:
        return base
    if isinstance(change, Replacement):
        return functional.linear(x, change.weight, change.bias)
    if change.factor is not None:
        base = base * change.factor if bias is None else (base - bias) * change.factor + bias
    return base + functional.linear(functional.linear(x, change.down), change.up)


def _side_by_side(biases: list[torch.Tensor | None], outputs: list[int]) -> torch.Tensor | None:
    one = next((bias for bias in biases if bias is not None), None)
    if one is None:
        return None
    return torch.cat([one.new_zeros(n) if bias is None else bias for bias, n in zip(biases, outputs, strict=True)])


class Embedding(torch.nn.Module):
    """An embedding with adapters: ids [..., tokens] -> [..., tokens, width]."""

    def __init__(self, layer: torch.nn.Module, turns: Turns) -> None:
        super().__init__()
        self.layer = layer
        self.changes: dict[str, list[Change | None]] = {}
        self._turns = turns
        self.hidden: Callable[..., torch.Tensor] | None = None  # what a compiler sees

    @property
    def weight(self) -> Any:
        return self.layer.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.hidden is not None and torch.compiler.is_compiling():
            return self.hidden(ids)
        result: torch.Tensor = self.layer(ids)
        for adapter, tokens in self._turns.tokens if self.changes else ():
            change = self.changes.get(adapter, [None])[0]
            if change is not None:
                where = slice(None) if tokens is None else tokens
                mine = ids[..., where]
                if isinstance(change, Replacement):
                    result[..., where, :] = functional.embedding(mine, change.weight)
                else:
                    result[..., where, :] += functional.linear(functional.embedding(mine, change.down.t()), change.up)
        return result
