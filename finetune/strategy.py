"""The one seam for distribution: how ranks share a model, its gradients and their sums."""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from finetune.config import Ddp

T = TypeVar("T")


class DataParallel:
    """Every rank holds the whole model; DDP averages the gradients. One process alone just has the model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as the training step calls it; parameters are made equal on all ranks."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def accumulating(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Backward in here only adds to this rank's gradients; they are exchanged by the first backward outside."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def clip(self, model: torch.nn.Module, norm: float | None) -> float:
        """Scale the gradients down to `norm` in all; returns the norm that they had."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.nn.utils.clip_grad_norm_(parameters, float("inf") if norm is None else norm).item()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed over the ranks."""
        if self.world_size > 1:
            distributed.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in their order; any object that can be pickled."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        distributed.all_gather_object(values, value)
        return values


def strategy_of(config: Ddp, device: torch.device) -> DataParallel:
    return DataParallel(device)
