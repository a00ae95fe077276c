"""Weights as integers: 8-bit ones with a scale for each output, 4-bit ones with a scale for each GROUP inputs of an output.

Whoever has the scales gets the same integers again from what was made of them, also in bf16.
"""

from typing import Literal

import torch
from torch.nn import functional

Bits = Literal["int8", "int4"]

GROUP = 64
LARGEST = {"int8": 127, "int4": 7}
# In 4 bits, how many steps the largest weight of a group may be away. Beyond 7 it is cut off, and all others lie closer.
STEPS = (7, 7.5, 8, 8.5, 9)


def scales_of(weight: torch.Tensor, bits: Bits) -> torch.Tensor:
    """[out, groups]: what one step of its integers is worth in each group of `weight` [out, in]."""
    groups = _groups(weight.float()) if bits == "int4" else weight.float()[:, None]
    largest = groups.abs().amax(-1).clamp(min=1e-9)
    if bits == "int8":
        return largest / LARGEST[bits]
    tried = torch.stack([largest / steps for steps in STEPS])
    errors = torch.stack([_squared_error(groups, scales[..., None]) for scales in tried])
    return tried.gather(0, errors.argmin(0, keepdim=True))[0]


def in_integers(weight: torch.Tensor, scales: torch.Tensor, bits: Bits) -> torch.Tensor:
    """int8 [out, in] of `weight`."""
    return _rounded(weight.float() / _each(scales, weight.shape[1]), bits).to(torch.int8)


def whole(integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights, in fp32, that `integers` [out, in] stand for."""
    return integers.float() * _each(scales, integers.shape[1])


def pack(integers: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in / 2, up to a multiple of 4] of 4-bit integers: 8 more than each, the first of two in the lower half."""
    shifted = functional.pad(integers + 8, (0, -integers.shape[1] % 8)).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


def unpack(packed: torch.Tensor, inputs: int) -> torch.Tensor:
    """int8 [out, inputs] of what `pack` has made."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :inputs].to(torch.int8) - 8


def _groups(weight: torch.Tensor) -> torch.Tensor:
    """[out, groups, GROUP]; where the last group is shorter, zeros fill it."""
    return functional.pad(weight, (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)


def _each(scales: torch.Tensor, inputs: int) -> torch.Tensor:
    """[out, 1 or inputs]: the scale of each weight."""
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(GROUP, 1)[:, :inputs]


def _squared_error(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (_rounded(groups / scales, "int4") * scales - groups).square().sum(-1)


def _rounded(steps: torch.Tensor, bits: Bits) -> torch.Tensor:
    return steps.round_().clamp_(-LARGEST[bits] - 1, LARGEST[bits])
