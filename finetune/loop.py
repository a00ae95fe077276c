"""Forward, backward, step, evaluate: plain torch. No Ray, no files."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.config import Optim, Train
from finetune.data import Batch
from finetune.objective import Losses, Objective
from finetune.strategy import DataParallel


@dataclass(frozen=True)
class StepResult:
    """Of one step, over all ranks: mean loss, its weight (labelled tokens, or pairs), tokens seen (unpadded), gradient norm,
    rate, and the means of the objective's metrics."""

    loss: float
    weight: int
    tokens: int
    grad_norm: float
    lr: float
    metrics: dict[str, float] = field(default_factory=dict)


class Window:
    """The steps since the last report, and what they come to: means are those over their weight."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.steps: list[StepResult] = []

    def add(self, step: StepResult) -> None:
        self.steps.append(step)

    def close(self, now: float) -> dict[str, Any]:
        weight = max(1, sum(step.weight for step in self.steps))
        names = self.steps[-1].metrics
        return {
            "loss": sum(step.loss * step.weight for step in self.steps) / weight,
            **{name: sum(step.metrics[name] * step.weight for step in self.steps) / weight for name in names},
            "lr": self.steps[-1].lr,
            "grad_norm": self.steps[-1].grad_norm,
            "tokens_per_s": sum(step.tokens for step in self.steps) / max(now - self.started, 1e-9),
        }


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype`; weights, their gradients and the loss stay in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def training_step(
    model: torch.nn.Module,
    micro_batches: list[Batch],
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    strategy: DataParallel,
    clip: float | None,
    lr: float,
    dtype: torch.dtype,
) -> StepResult:
    """One optimiser step over this rank's micro batches, as if all of them, of all ranks, were one batch.

    The summed losses are divided by the weight of the whole step, which is known beforehand: so neither a short micro
    batch nor a rank with few labels counts for more than its tokens.
    """
    micro_batches = [batch.to(strategy.device) for batch in micro_batches]
    weight, tokens = strategy.sum(
        torch.stack(
            [
                torch.stack([objective.weight(batch) for batch in micro_batches]).sum(),
                torch.tensor(sum(batch.tokens for batch in micro_batches), device=strategy.device),
            ]
        )
    ).tolist()
    totals: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else strategy.accumulating(model):
            with autocast(strategy.device, dtype):
                losses = objective.losses(model, batch)
            # DDP averages over ranks: world_size turns that into the sum.
            (losses.loss * (strategy.world_size / max(weight, 1))).backward()
        _add(totals, losses)
    grad_norm = strategy.clip(model, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    means = _means(totals, weight, strategy)
    return StepResult(means.pop("loss"), weight, tokens, grad_norm, lr, means)


def _add(totals: dict[str, torch.Tensor], losses: Losses) -> None:
    for name, value in {"loss": losses.loss.detach(), **losses.metrics}.items():
        totals[name] = totals.get(name, 0) + value.double()


def _means(totals: dict[str, torch.Tensor], weight: float, strategy: DataParallel) -> dict[str, float]:
    """Sums of this rank -> means over all ranks."""
    summed = strategy.sum(torch.stack(list(totals.values()))).tolist()
    return {name: value / max(weight, 1) for name, value in zip(totals, summed, strict=True)}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    objective: Objective,
    strategy: DataParallel,
    dtype: torch.dtype,
) -> dict[str, float]:
    """`loss` and the objective's metrics: means over `batches` of all ranks. There must be at least one batch."""
    model.eval()
    totals: dict[str, torch.Tensor] = {}
    weight = torch.zeros((), device=strategy.device, dtype=torch.int64)
    for batch in batches:
        moved = batch.to(strategy.device)
        with autocast(strategy.device, dtype):
            _add(totals, objective.losses(model, moved))
        weight += objective.weight(moved)
    model.train()
    return _means(totals, strategy.sum(weight).item(), strategy)


def make_optimizer(model: torch.nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (biases and norms have no business near zero)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optim.lr)


def schedule(optim: Optim, steps: int) -> Callable[[int], float]:
    """step -> learning rate: linear warm-up, then to zero along a cosine or a line, or constant."""
    warmup = optim.warmup if optim.warmup >= 1 else optim.warmup * steps

    def rate(step: int) -> float:
        if step < warmup:
            return optim.lr * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        shapes = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return optim.lr * shapes[optim.schedule]

    return rate


def total_steps(train: Train, units: int, world_size: int) -> int:
    """How many steps the run has: max_steps, else what the epochs of so many rows or packs come to."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(units * train.epochs / (train.batch_size * train.accumulate * world_size)))
