"""Objectives: a batch -> the sum of its losses and what that sum is to be divided by."""

from typing import Protocol

import torch
from torch.nn import functional

from finetune.config import Sft
from finetune.data import Batch
from plugins.types import IGNORE


class Objective(Protocol):
    """Sum and weight stay apart, so that accumulation and ranks with fewer tokens do not bend the mean."""

    def weight(self, batch: Batch) -> torch.Tensor:
        """What the summed loss is divided by, a scalar; known before the forward."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The summed loss, a scalar of fp32."""
        ...


class TokenCrossEntropy:
    """Next-token cross entropy, summed over the labelled tokens."""

    def weight(self, batch: Batch) -> torch.Tensor:
        return (batch.labels[:, 1:] != IGNORE).sum()

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        predicts = batch.labels[:, 1:] != IGNORE
        # Only labelled positions go through the softmax over the vocabulary: the rest of a real row is most of it.
        wanted = batch.labels[:, 1:][predicts]
        return functional.cross_entropy(logits[:, :-1][predicts].float(), wanted, reduction="sum")


def objective_of(config: Sft) -> Objective:
    return TokenCrossEntropy()
