"""From logits to tokens: a batch in one pass, each row by its own request, so that company changes nothing.

What a request asks for is applied in vLLM's order: the grammar, logit_bias, penalties; then, for tokens that are drawn,
temperature, min_p, top_k, top_p.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from plugins.engines.answer import Choice
from plugins.engines.grammar import Matcher
from plugins.types import GenerateRequest

COLDEST = 1e-5  # a temperature below it is greedy: logits divided by less overflow

# Probabilities are counted in whole parts of 1 / GRAIN: sums of integers are exact, so they depend neither on the order
# of adding, nor on the device, nor on how many rows there are. Their order is that of fp32.
GRAIN = 2.0**40

FEW = 64  # of the likeliest tokens, among which the others are looked for where top_k is less
PATIENCE = 8  # draws before sorting a whole vocabulary is the quicker way

PART = 128  # of a vocabulary, which usually is a multiple of it
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


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of every row of `logits` [rows, vocab], which stay as they are."""
    values = logits.float()  # also because argmax in bf16 is five times slower on CPU
    if all(sampler.plain for sampler in samplers):
        return [Choice(token) for token in _likeliest(values).tolist()]
    scored = [row for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
    own = values[scored]  # the model's own distribution, before anything changes it
    if any(sampler.edits for sampler in samplers):
        values = values.clone() if values is logits else values
        _mask(values, samplers)
        _bias(values, samplers)
        _penalise(values, samplers)
    drawn = [row for row, sampler in enumerate(samplers) if sampler.drawn]
    likeliest = [row for row, sampler in enumerate(samplers) if not sampler.drawn]
    tokens = torch.empty(len(samplers), dtype=torch.int64, device=values.device)
    if likeliest:
        tokens[likeliest] = _likeliest(_rows(values, likeliest))
    if drawn:
        tokens[drawn] = draw(_rows(values, drawn), [samplers[row] for row in drawn])
    choices = [Choice(token) for token in tokens.tolist()]
    counts = [samplers[row].sampling.logprobs or 0 for row in scored]
    for row, choice in zip(scored, score(own, [choices[row].token for row in scored], counts), strict=True):
        choices[row] = choice
    return choices


def _likeliest(values: torch.Tensor) -> torch.Tensor:
    """The place [rows] of the largest of each row of fp32 `values` [rows, vocab]; of several, the first.

    Of the largest of each part first: that torch finds side by side, and one place among all only one by one.
    """
    if values.shape[1] % PART:
        return values.argmax(-1)
    parts: torch.Tensor = values.unflatten(1, (-1, PART))
    part = parts.amax(-1).argmax(-1)
    return part * PART + parts[torch.arange(len(parts), device=part.device), part].argmax(-1)


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

    A row's token depends on its logits and its sampler alone, to the bit: a random number is looked up in the sums of
    the allowed weights, in the order of the vocabulary. Tokens of the same weight are allowed or not together.
    """
    device, vocabulary = logits.device, logits.shape[1]
    warmth = torch.tensor([sampler.sampling.temperature for sampler in samplers], device=device)
    probabilities = (logits / warmth[:, None]).softmax(-1)
    tokens = torch.empty(len(samplers), dtype=torch.int64, device=device)
    everything = list(range(len(samplers)))
    # The few likeliest are enough for most top_k, and quicker, unless others are as likely as the last that is allowed.
    few = [row for row in everything if 0 < samplers[row].sampling.top_k < FEW < vocabulary]
    if few:
        best, ids = _rows(probabilities, few).topk(FEW, -1)
        ranks = torch.tensor([samplers[row].sampling.top_k for row in few], device=device)
        enough = (best.gather(1, ranks[:, None] - 1) > best[:, -1:])[:, 0].tolist()
        kept = [place for place, known in enumerate(enough) if known]
        few = [few[place] for place in kept]
        ids, order = _rows(ids, kept).sort(-1)  # in the order of the vocabulary
        weights = (_rows(best, kept) * GRAIN).long().gather(1, order)
        tokens[few] = ids.gather(1, _pick(weights, [samplers[row] for row in few])[:, None])[:, 0]
    if many := sorted({*everything} - {*few}):
        weights = (_rows(probabilities, many) * GRAIN).long()
        tokens[many] = _pick(weights, [samplers[row] for row in many])
    return tokens


def _pick(weights: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """An index [rows] into each row of `weights` [rows, choices], as its sampler draws it."""
    ways = [sampler.sampling for sampler in samplers]
    if any(way.min_p > 0 for way in ways):
        least = weights.amax(-1) * _column([way.min_p for way in ways], weights)
        weights = weights.masked_fill(weights < least[:, None], 0)
    if rows := [row for row, way in enumerate(ways) if 0 < way.top_k < weights.shape[1]]:
        ranks = torch.tensor([ways[row].top_k for row in rows], device=weights.device)
        least = weights.new_zeros(len(ways))
        best = _rows(weights, rows).topk(int(ranks.max()), -1).values
        least[rows] = best.gather(1, ranks[:, None] - 1)[:, 0]
        weights = weights.masked_fill(weights < least[:, None], 0)
    cumulative = weights.cumsum(-1)
    picked = _look_up(cumulative, samplers)
    if outside := [row for row, way in enumerate(ways) if way.top_p < 1]:
        _hold_to_nucleus(picked, weights, cumulative, samplers, outside)
    return picked


def _hold_to_nucleus(
    picked: torch.Tensor,
    weights: torch.Tensor,
    cumulative: torch.Tensor,
    samplers: Sequence[Sampler],
    outside: list[int],
) -> None:
    """Draw again in the rows that may be `outside` of top_p, till `picked` is in their nucleus (Holtzman et al., 2020).

    It is, where all that are heavier make up less than top_p: no vocabulary has to be sorted for that. It takes
    1 / top_p draws; where that is many, the row is sorted after all.
    """
    shares = _column([sampler.sampling.top_p for sampler in samplers], weights)
    needed = (cumulative[:, -1] * shares).ceil().long().clamp_(min=1)
    for _ in range(PATIENCE):
        these = _rows(weights, outside)
        own = these.gather(1, picked[outside][:, None])
        heavier = these.masked_fill(these <= own, 0).sum(-1)
        outside = [row for row, out in zip(outside, (heavier >= needed[outside]).tolist(), strict=True) if out]
        if not outside:
            return
        picked[outside] = _look_up(cumulative[outside], [samplers[row] for row in outside])
    these = weights[outside]
    heaviest = these.sort(-1, descending=True).values
    last = torch.searchsorted(heaviest.cumsum(-1), needed[outside][:, None])
    these = these.masked_fill(these < heaviest.gather(1, last), 0)
    picked[outside] = _look_up(these.cumsum(-1), [samplers[row] for row in outside])


def _look_up(cumulative: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """An index [rows] into each row of `cumulative` weights [rows, choices]: where the sampler's next number falls."""
    total = cumulative[:, -1]
    target = (total * _column([sampler.uniform() for sampler in samplers], cumulative)).long().minimum(total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _column(numbers: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)


def _rows(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows; all of them without a copy."""
    return values if len(rows) == len(values) else values[rows]


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
