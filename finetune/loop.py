"""Forward, backward, step, evaluate: plain torch. No Ray, no files."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from finetune.config import Optim, Train
from finetune.data import Batch
from finetune.objective import Objective
from finetune.strategy import DataParallel


@dataclass(frozen=True)
class StepResult:
    """Of one step, over all ranks: mean loss, its weight (labelled tokens), tokens seen (unpadded), gradient norm, rate."""

    loss: float
    weight: int
    tokens: int
    grad_norm: float
    lr: float


class Window:
    """The steps since the last report, and what they come to: loss is the mean over their labelled tokens."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.steps: list[StepResult] = []

    def add(self, step: StepResult) -> None:
        self.steps.append(step)

    def close(self, now: float) -> dict[str, Any]:
        weight = max(1, sum(step.weight for step in self.steps))
        return {
            "loss": sum(step.loss * step.weight for step in self.steps) / weight,
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
                torch.stack([batch.attention_mask.sum() for batch in micro_batches]).sum(),
            ]
        )
    ).tolist()
    total = torch.zeros((), device=strategy.device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else strategy.accumulating(model):
            with autocast(strategy.device, dtype):
                loss = objective.loss(model, batch)
            # DDP averages over ranks: world_size turns that into the sum.
            (loss * (strategy.world_size / max(weight, 1))).backward()
        total += loss.detach()
    grad_norm = strategy.clip(model, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(strategy.sum(total).item() / max(weight, 1), weight, tokens, grad_norm, lr)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    objective: Objective,
    strategy: DataParallel,
    dtype: torch.dtype,
) -> float:
    """The mean loss over `batches` of all ranks."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=strategy.device)
    for batch in batches:
        moved = batch.to(strategy.device)
        with autocast(strategy.device, dtype):
            sums[0] += objective.loss(model, moved)
        sums[1] += objective.weight(moved)
    model.train()
    loss, weight = strategy.sum(sums)
    return float(loss / weight.clamp(min=1))


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


def total_steps(train: Train, rows: int, world_size: int) -> int:
    """How many steps the run has: max_steps, else what the epochs come to."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(rows * train.epochs / (train.batch_size * train.accumulate * world_size)))
