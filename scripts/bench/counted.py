"""A Trainer that is timed while it trains: the tokens of the batches that it really sees, padding not counted."""

from typing import Any

import torch
import transformers

from scripts.bench.contender import Stopwatch


class Counted:
    """Mix this into transformers' Trainer or one that is made of it. One micro batch a step, as is their default."""

    def __init__(self, watch: Stopwatch, **options: Any) -> None:
        super().__init__(**options)
        self.tokens, self.loss = 0, 0.0
        self.add_callback(StepEnd(lambda: watch.step(self.tokens, self.loss)))  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **options: Any) -> torch.Tensor:
        # Without an attention mask there is no padding: full rows, or packs end to end.
        mask = inputs.get("attention_mask")
        self.tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss: torch.Tensor = super().compute_loss(model, inputs, *rest, **options)  # type: ignore[misc]
        self.loss = loss.item()
        return loss


class StepEnd(transformers.TrainerCallback):
    def __init__(self, act: Any) -> None:
        self.act = act

    def on_step_end(self, *rest: Any, **options: Any) -> None:
        self.act()
