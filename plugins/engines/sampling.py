"""From logits to tokens: each row by its own request, so that company changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plugins.types import GenerateRequest

COLDEST = 1e-5  # a temperature below it is greedy: logits divided by less overflow

PATIENCE = 8  # draws before sorting a whole vocabulary is the quicker way


class Sampler:
    """How one request wants its tokens chosen: the likeliest (temperature 0), or drawn.

    Random numbers come from a generator of the request's own and are looked up in the cumulative distribution: the same
    seed gives the same answer whoever shares the batch. The order is vLLM's: temperature, top_k, top_p.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.greedy = request.temperature < COLDEST
        self._temperature, self._top_k, self._top_p = request.temperature, request.top_k, request.top_p
        if not self.greedy:
            self._generator = torch.Generator()
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed % 2**63)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """A token id, [], drawn from the logits of one row, [vocab]."""
        probabilities = (logits.float() / self._temperature).softmax(-1)
        if self._top_k == 0:
            return self._draw(probabilities)
        likely, ids = probabilities.topk(min(self._top_k, len(probabilities)))
        return ids[self._draw(likely / likely.sum())]

    def _draw(self, probabilities: torch.Tensor) -> torch.Tensor:
        """An index, [], of `probabilities` [choices] that is in the nucleus (Holtzman et al., 2020).

        A draw from outside is drawn again. That is the nucleus's own distribution, without sorting a vocabulary: an
        index is inside where all that are likelier add up to less than top_p. It takes 1 / top_p draws on average; where
        that is many, the vocabulary is sorted after all.
        """
        best, index = probabilities.max(-1)
        if best >= self._top_p:
            return index
        # In fp64 a share of the total stays below it, so rounding never ends on a token of probability 0.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        for _ in range(PATIENCE):
            index = self._pick(cumulative)
            if self._top_p == 1 or probabilities[probabilities > probabilities[index]].sum() < self._top_p:
                return index
        ordered, ids = probabilities.sort(descending=True)
        likelier = ordered.cumsum(-1, dtype=torch.float64) - ordered
        return ids[self._pick(ordered.where(likelier < self._top_p, 0).cumsum(-1, dtype=torch.float64))]

    def _pick(self, cumulative: torch.Tensor) -> torch.Tensor:
        number = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        return torch.searchsorted(cumulative, cumulative[-1:] * number, right=True)[0]


@dataclass(frozen=True)
class Choice:
    """A token that was chosen."""

    token: int


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of every row of `logits` [rows, vocab]."""
    tokens = logits.float().argmax(-1)  # in bf16 it is five times slower on CPU
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        tokens[drawn] = torch.stack([samplers[row].draw(logits[row]) for row in drawn])
    return [Choice(token) for token in tokens.tolist()]
