"""Objectives: a batch -> the sum of its losses, what that sum is to be divided by, and what else is worth knowing.

All of them see the model as the log-probabilities of a batch's labels (finetune/logprobs.py).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn import functional

from finetune.config import Dpo, Orpo, Sft
from finetune.data import Batch
from finetune.logprobs import LogProbs
from plugins.types import IGNORE


@dataclass(frozen=True)
class Losses:
    """`loss` and `metrics`, each summed over what Objective.weight counts: scalars of fp32."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Sum and weight stay apart, so that accumulation and ranks with fewer tokens do not bend the mean."""

    def weight(self, batch: Batch) -> torch.Tensor:
        """What the summed loss is divided by, a scalar; known before the forward."""
        ...

    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        """`model` is a LogProbs, perhaps wrapped by the strategy."""
        ...


class TokenCrossEntropy:
    """Next-token cross entropy, summed over the labelled tokens."""

    def weight(self, batch: Batch) -> torch.Tensor:
        return (batch.labels[:, 1:] != IGNORE).sum()

    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        return Losses(-model(batch).sum())


class Preferences:
    """Dpo and Orpo: what the model thinks of the chosen answer against the rejected one, summed over pairs.

    `metrics`: `accuracy`, how often the chosen one is ahead, and `margin`, by how much: for Dpo of the implicit rewards
    beta (log pi - log pi_ref), for Orpo of the mean log-probabilities.
    """

    def __init__(self, config: Dpo | Orpo, logprobs: LogProbs) -> None:
        self.config, self.logprobs = config, logprobs

    def weight(self, batch: Batch) -> torch.Tensor:
        labelled = batch.owners[:, 1:][batch.labels[:, 1:] != IGNORE]
        return torch.tensor(labelled.unique().numel() // 2, device=labelled.device)

    def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
        owners = batch.owners[:, 1:][batch.labels[:, 1:] != IGNORE]
        documents = int(batch.owners.max()) + 1
        tokens = torch.bincount(owners, minlength=documents).view(-1, 2)

        def by_answer(log_probs: torch.Tensor) -> torch.Tensor:
            return log_probs.new_zeros(documents).index_add(0, owners, log_probs).view(-1, 2)

        answers = by_answer(model(batch))
        if isinstance(self.config, Orpo):
            loss, margins = _orpo(answers, tokens, self.config)
        else:
            loss, margins = _dpo(answers - by_answer(self.logprobs.reference(batch)), tokens, self.config)
        real = tokens[:, 0] > 0  # an empty share of an evaluation has a pair without labels
        return Losses(
            loss[real].sum(),
            {"accuracy": (margins[real] > 0).float().sum().detach(), "margin": margins[real].sum().detach()},
        )


def _dpo(ratios: torch.Tensor, tokens: torch.Tensor, config: Dpo) -> tuple[torch.Tensor, torch.Tensor]:
    """`ratios` [pairs, 2]: log pi - log pi_ref of the chosen and the rejected answer. Returns losses and margins [pairs]."""
    if config.loss == "ipo":
        mean = ratios / tokens.clamp(min=1)
        return (mean[:, 0] - mean[:, 1] - 1 / (2 * config.beta)) ** 2, config.beta * (mean[:, 0] - mean[:, 1])
    margins = config.beta * (ratios[:, 0] - ratios[:, 1])
    return -functional.logsigmoid(margins), margins


def _orpo(answers: torch.Tensor, tokens: torch.Tensor, config: Orpo) -> tuple[torch.Tensor, torch.Tensor]:
    """`answers` [pairs, 2]: log-probabilities. Odds are those of the mean token, p / (1 - p). As _dpo."""
    mean = (answers / tokens.clamp(min=1)).clamp(max=-1e-6)  # a certain answer has no finite odds
    odds = mean - torch.log1p(-torch.exp(mean))
    loss = -mean[:, 0] - config.weight * functional.logsigmoid(odds[:, 0] - odds[:, 1])
    return loss, mean[:, 0] - mean[:, 1]


def objective_of(config: Sft | Dpo | Orpo, logprobs: LogProbs) -> Objective:
    return TokenCrossEntropy() if isinstance(config, Sft) else Preferences(config, logprobs)
