"""From logits to tokens: a batch in one pass, each row by its own request, so that company changes nothing.

What a request asks for is applied in vLLM's order: the grammar, logit_bias, penalties; then, for tokens that are drawn,
temperature, min_p, top_k, top_p.
"""

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from plugins.engines.grammar import Matcher
from plugins.types import GenerateRequest

COLDEST = 1e-5  # a temperature below it is greedy: logits divided by less overflow

# Probabilities are counted in whole parts of 1 / GRAIN: sums of integers are exact, so they depend neither on the order
# of adding, nor on the device, nor on how many rows there are. Their order is that of fp32.
GRAIN = 2.0**40

NUCLEUS = 256  # tokens among which top_p is looked for first: sorting a whole vocabulary takes ten times as long
BLOCK = 64  # prompt positions scored together: each takes a whole vocabulary in fp32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are chosen, with nothing left open."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    @classmethod
    def of(cls, request: GenerateRequest, own: Mapping[str, Any]) -> "Sampling":
        """What `request` says; where it leaves a field open, what the model's `own` defaults say."""
        asked = {name: getattr(request, name) for name in cls.__dataclass_fields__}
        known = {name: own[name] for name in cls.__dataclass_fields__ if name in own}
        return cls(**known | {name: value for name, value in asked.items() if value is not None})


def own_defaults(generation_config: Any) -> dict[str, Any]:
    """The defaults that a model's generation_config has for the fields of a request.

    How to draw counts only where it says do_sample: as in transformers, the values are nothing without it.
    """
    names = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    if generation_config.do_sample:
        names |= {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
    # Only what the file says: older versions of transformers fill in defaults of their own, such as 50 for top_k.
    said = generation_config.to_diff_dict()
    return {ours: said[theirs] for theirs, ours in names.items() if said.get(theirs) is not None}


class Sampler:
    """The state of one answer's choices: its random numbers, what has been said, and what may not be.

    `forbidden`: tokens that may not come before `min_tokens` of answer.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        prompt: Sequence[int] = (),
        grammar: Matcher | None = None,
        forbidden: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self.sampling, self.grammar, self.forbidden = sampling, grammar, sorted(forbidden)
        self.drawn = sampling.temperature >= COLDEST
        self.penalised = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (
            1,
            0,
            0,
        )
        self.said: Counter[int] = Counter()  # how often each token is in the answer; 0 for what is in the prompt only
        if sampling.repetition_penalty != 1:
            self.said.update(dict.fromkeys(prompt, 0))
        self._min_tokens, self._count = min_tokens if forbidden else 0, 0
        # Python's own: a number from a torch generator takes twenty times as long.
        self._random = random.Random(None if sampling.seed is None else sampling.seed % 2**64)
        self._settle()

    def _settle(self) -> None:
        """What is asked for at the coming step; kept, because every step asks every row."""
        self.too_early = self._count < self._min_tokens  # the answer may not end yet
        # Whether the logits change before a token is chosen, and whether the likeliest is all that is wanted.
        self.edits = bool(self.penalised or self.too_early or self.grammar or self.sampling.logit_bias)
        self.plain = not (self.drawn or self.edits or self.sampling.logprobs is not None)

    @property
    def complete(self) -> bool:
        """Whether the grammar lets nothing follow but the end."""
        return self.grammar is not None and self.grammar.complete

    def uniform(self) -> float:
        """The next random number of this answer, from 0 to below 1."""
        return self._random.random()

    def take(self, token: int) -> None:
        """The answer goes on with `token`. Raises RequestError where the grammar cannot go on."""
        self._count += 1
        if self._count == self._min_tokens:
            self._settle()
        if self.penalised:
            self.said[token] += 1
        if self.grammar is not None:
            self.grammar.take(token)


@dataclass(frozen=True)
class Choice:
    """A token, and where it was asked for its log-probability, and the likeliest tokens with theirs, the best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of every row of `logits` [rows, vocab], which stay as they are."""
    values = logits.float()  # also because argmax in bf16 is five times slower on CPU
    if all(sampler.plain for sampler in samplers):
        return [Choice(token) for token in values.argmax(-1).tolist()]
    scored = [row for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
    own = values[scored]  # the model's own distribution, before anything changes it
    if any(sampler.edits for sampler in samplers):
        values = values.clone() if values is logits else values
        _mask(values, samplers)
        _bias(values, samplers)
        _penalise(values, samplers)
    drawn = [row for row, sampler in enumerate(samplers) if sampler.drawn]
    tokens = values.argmax(-1)
    if drawn:
        tokens[drawn] = draw(values[drawn], [samplers[row] for row in drawn])
    choices = [Choice(token) for token in tokens.tolist()]
    counts = [samplers[row].sampling.logprobs or 0 for row in scored]
    for row, choice in zip(scored, score(own, [choices[row].token for row in scored], counts), strict=True):
        choices[row] = choice
    return choices


def score(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Choice]:
    """`tokens` as choices with their log-probabilities under `logits` [tokens, vocab], each with `counts` likeliest."""
    choices: list[Choice] = []
    for start in range(0, len(tokens), BLOCK):
        these, wanted = tokens[start : start + BLOCK], counts[start : start + BLOCK]
        logprobs = logits[start : start + BLOCK].float().log_softmax(-1)
        ids = torch.tensor(these, device=logits.device)
        own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        best, at = logprobs.topk(min(max(wanted), logprobs.shape[1]), -1)
        likeliest = [list(zip(*pair, strict=True)) for pair in zip(at.tolist(), best.tolist(), strict=True)]
        for token, logprob, count, top in zip(these, own, wanted, likeliest, strict=True):
            choices.append(Choice(token, logprob, tuple(top[:count])))
    return choices


def draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Token ids [rows], drawn from fp32 `logits` [rows, vocab] as the samplers say.

    A row's token depends on its logits and its sampler alone, to the bit. Every restriction is a least weight, so tokens
    of the same weight are in or out together.
    """
    ways = [sampler.sampling for sampler in samplers]
    column = functools.partial(torch.tensor, dtype=torch.float64, device=logits.device)
    probabilities = (logits / column([way.temperature for way in ways])[:, None].float()).softmax(-1)
    weights = (probabilities * GRAIN).long()
    if any(way.min_p > 0 for way in ways):
        least = weights.amax(-1) * column([way.min_p for way in ways])
        weights.masked_fill_(weights < least[:, None], 0)
    if rows := [row for row, way in enumerate(ways) if 0 < way.top_k < logits.shape[1]]:
        ranks = torch.tensor([ways[row].top_k for row in rows], device=logits.device)
        best = probabilities[rows].topk(int(ranks.max()), -1).values
        least = (best.gather(1, ranks[:, None] - 1) * GRAIN).long()
        weights[rows] = weights[rows].where(weights[rows] >= least, 0)
    if rows := [row for row, way in enumerate(ways) if way.top_p < 1]:
        weights[rows] = _nucleus(weights[rows], column([ways[row].top_p for row in rows]))
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    target = (total * column([sampler.uniform() for sampler in samplers])).long().clamp_(max=total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _nucleus(weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`weights` [rows, vocab] with 0 for what is outside the nucleus (Holtzman et al., 2020).

    That is the fewest of the heaviest that make up `share` [rows], fp64, of their row.
    """
    needed = (weights.sum(-1) * share).ceil().long().clamp_(min=1)
    least = torch.zeros_like(needed)
    open_rows = torch.arange(len(weights), device=weights.device)
    for size in (min(NUCLEUS, weights.shape[1]), weights.shape[1]):
        heaviest = weights[open_rows].topk(size, -1).values
        cumulative = heaviest.cumsum(-1)
        found = cumulative[:, -1] >= needed[open_rows]
        last = torch.searchsorted(cumulative[found], needed[open_rows][found][:, None])
        least[open_rows[found]] = heaviest[found].gather(1, last)[:, 0]
        open_rows = open_rows[~found]
        if not len(open_rows):
            break
    return weights.where(weights >= least[:, None], 0)


def _mask(values: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    """Tokens that the grammar, or `min_tokens`, rules out get -inf."""
    vocabulary = values.shape[1]
    for row, sampler in enumerate(samplers):
        if sampler.grammar is not None:
            bits = np.unpackbits(
                np.frombuffer(sampler.grammar.mask(), dtype=np.uint8), count=vocabulary, bitorder="little"
            )
            if bits.any():  # none: the grammar has failed, as `take` will say
                values[row].masked_fill_(torch.from_numpy(bits == 0).to(values.device), -torch.inf)
        if sampler.too_early:
            values[row, sampler.forbidden] = -torch.inf


def _bias(values: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    biased = [(row, *pair) for row, sampler in enumerate(samplers) for pair in sampler.sampling.logit_bias.items()]
    if biased:
        rows, tokens, biases = zip(*biased, strict=True)
        values[rows, tokens] += torch.tensor(biases, device=values.device)


def _penalise(values: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    """Repetition (Keskar et al., 2019), then frequency and presence (OpenAI's), of all rows' tokens at once."""
    penalised = [(row, sampler) for row, sampler in enumerate(samplers) if sampler.penalised]
    tokens = [token for _, sampler in penalised for token in sampler.said]
    if not tokens:
        return
    sizes = torch.tensor([len(sampler.said) for _, sampler in penalised])

    def spread(of_rows: list[Any]) -> torch.Tensor:
        return torch.tensor(of_rows).repeat_interleave(sizes).to(values.device)

    ways = [sampler.sampling for _, sampler in penalised]
    said = torch.tensor([count for _, sampler in penalised for count in sampler.said.values()], device=values.device)
    at = spread([row for row, _ in penalised]), torch.tensor(tokens, device=values.device)
    repetition = spread([way.repetition_penalty for way in ways])
    found = values[at]
    found = torch.where(found > 0, found / repetition, found * repetition)
    found -= said * spread([way.frequency_penalty for way in ways])
    found -= (said > 0) * spread([way.presence_penalty for way in ways])
    values[at] = found
