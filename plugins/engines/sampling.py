"""From logits to tokens: each row by its own request, so that company changes nothing."""

from collections.abc import Sequence

import torch

from plugins.types import GenerateRequest

COLDEST = 1e-5  # a temperature below it is greedy: logits divided by less overflow
NUCLEUS = 1024  # how many of the likeliest tokens are tried before a whole vocabulary is sorted, which is slow


class Sampler:
    """How one request wants its tokens chosen: the likeliest (temperature 0), or drawn.

    One uniform number a token, from a generator of the request's own, is looked up in the cumulative distribution: the
    same seed gives the same answer whoever shares the batch. The order is vLLM's: temperature, top_k, top_p.
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
        if self._top_k == 0 and self._top_p == 1:
            return self._look_up(probabilities)
        likely, ids = self._filter(probabilities)
        return ids[self._look_up(likely)]

    def _filter(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What top_k and top_p leave: probabilities and their token ids, both [choices]."""
        vocabulary = len(probabilities)
        likely, ids = probabilities.topk(min(self._top_k or NUCLEUS, vocabulary))
        if self._top_k:
            likely = likely / likely.sum()  # top_p is a share of what top_k left
        elif likely.sum() < self._top_p:
            likely, ids = probabilities.sort(descending=True)
        before = likely.cumsum(-1) - likely
        return likely.masked_fill(before >= self._top_p, 0), ids

    def _look_up(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The index, [], at which the cumulative sum of `probabilities` [choices] passes a random share of the total."""
        # In fp64 the share stays below the total, so rounding never ends on a token of probability 0.
        number = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(cumulative, cumulative[-1:] * number, right=True)[0]


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every row of `logits` [rows, vocab]."""
    tokens = logits.argmax(-1)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        tokens[drawn] = torch.stack([samplers[row].draw(logits[row]) for row in drawn])
    chosen: list[int] = tokens.tolist()
    return chosen
