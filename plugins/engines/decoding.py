"""A transformers model that decodes many sequences at once: prompts are read, join the batch, and leave it at any step.

Continuous batching is Yu et al., Orca (OSDI 2022). One thread at a time: nothing here is locked.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers.cache_utils import DynamicCache

from plugins.engines.adapters import NONE, Adapters
from plugins.engines.kv_cache import KVCache, StepMask
from plugins.pretrained import first_line
from plugins.spec import UserError

PIECE = 512  # tokens of prompts read between two steps of the batch: longer is faster, and makes the others wait longer
GROUP = 8  # prompts read together


class Row(Protocol):
    """What the decoder knows of a sequence."""

    @property
    def prompt(self) -> list[int]: ...
    @property
    def adapter(self) -> str: ...
    @property
    def token(self) -> int:
        """The latest token of the answer."""
        ...

    @property
    def scores_prompt(self) -> bool: ...
    def score_prompt(self, start: int, logits: torch.Tensor) -> None:
        """Take the logits [n, vocab] after each of the prompt's tokens from `start` on."""
        ...


R = TypeVar("R", bound=Row)


class Prompts(Generic[R]):
    """Sequences whose prompts are being read together, padded at the right: causal attention never looks there."""

    def __init__(self, rows: Sequence[R]) -> None:
        self.rows = list(rows)
        self.lengths = [len(row.prompt) for row in rows]
        self.length = max(self.lengths)
        self.done = 0  # tokens of each row that have been read
        self.cache: Any = DynamicCache()  # type: ignore[no-untyped-call, unused-ignore]

    @property
    def whole(self) -> bool:
        return self.done == self.length

    @staticmethod
    def fitting(lengths: Sequence[int], room: int) -> int:
        """How many of the sequences that wait, from the first on, are read as one piece; at least one."""
        count = 1
        while count < min(len(lengths), room, GROUP) and max(lengths[: count + 1]) * (count + 1) <= PIECE:
            count += 1
        return count


class Decoder(Generic[R]):
    """A model, its adapters, and the batch: `rows[i]` is the sequence in row i of the cache."""

    def __init__(self, model: Any, *, max_rows: int, max_length: int) -> None:
        self.rows: list[R] = []
        self.adapters = Adapters(model)
        self._model = model
        self._device, self._dtype = model.device, model.dtype
        self._mask = StepMask(model.config.get_text_config(), max_length)
        self._picks_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache = KVCache(max_rows, max_length)

    @torch.inference_mode()
    def read(self, prompts: Prompts[R]) -> torch.Tensor | None:
        """Read the next piece of `prompts`. When that makes them whole, they join the batch as its last rows.

        Then: the logits after each prompt, [rows, vocab]. Till then: None.
        """
        piece = slice(prompts.done, min(prompts.done + PIECE, prompts.length))
        padded = [row.prompt[piece] + [0] * (piece.stop - max(piece.start, len(row.prompt))) for row in prompts.rows]
        ids = torch.tensor(padded, device=self._device)
        positions = torch.arange(piece.start, piece.stop, device=self._device).expand(len(padded), -1)
        prompts.done = piece.stop
        # The vocabulary is large: logits only where a prompt ends.
        ends = sorted({length - 1 - piece.start for length in prompts.lengths}) if prompts.whole else [-1]
        if any(row.scores_prompt for row in prompts.rows):
            ends = list(range(piece.stop - piece.start))
        logits = self._forward(prompts.rows, ids, positions, prompts.cache, None, ends)
        for row, its in zip(prompts.rows, logits, strict=True):
            if row.scores_prompt and piece.start < len(row.prompt):
                row.score_prompt(piece.start, its[: len(row.prompt) - piece.start])
        if not prompts.whole:
            return None
        self._cache.join(prompts.cache, prompts.lengths)
        self.rows.extend(prompts.rows)
        columns = [ends.index(length - 1 - piece.start) for length in prompts.lengths]
        return logits[torch.arange(len(columns)), columns]

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Feed every row its latest token; logits of the next, [rows, vocab]."""
        ids = torch.tensor([[row.token] for row in self.rows], device=self._device)
        positions = self._cache.begin_step(self._device)
        mask = self._mask(positions, self._cache.longest, self._dtype)
        return self._forward(self.rows, ids, positions[:, None], self._cache, mask, [0])[:, 0]

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Take `row` out of the batch; the last row moves into its place."""
        self._cache.leave(row)
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last

    def _forward(
        self, rows: Sequence[Row], ids: torch.Tensor, positions: torch.Tensor, cache: Any, mask: Any, ends: list[int]
    ) -> torch.Tensor:
        """Logits [rows, ends, vocab] at the columns `ends` of `ids` [rows, tokens]."""
        self.adapters.rows = [row.adapter for row in rows]
        # Indices, not a count: a slice of the hidden states is not contiguous, and torch would then copy the whole
        # output matrix once a row.
        options = {"logits_to_keep": torch.tensor(ends, device=self._device)} if self._picks_logits else {}
        result = self._model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True, **options
        )
        logits: torch.Tensor = result.logits
        return logits if self._picks_logits else logits[:, ends]

    def prove(self) -> None:
        """Raise UserError where a mixed batch does not compute what this model computes for each sequence alone.

        Models differ in where they keep the past (recurrent states) and in how they count positions (ALiBi); a wrong
        answer is worse than none.
        """
        refusal = f"the torch engine cannot serve {type(self._model).__name__}"
        probes: Any = [_Probe([1, 2, 3, 4, 5, 6, 7]), _Probe([7, 5, 3])]
        try:
            self.read(Prompts(probes))
            together = self.step().float()
            alone = torch.stack([self._alone([*probe.prompt, probe.token]) for probe in probes]).float()
        except Exception as error:
            raise UserError(f"{refusal}: {type(error).__name__}: {first_line(error)}") from error
        while self.rows:
            self.leave(0)
        off = ((together - alone).norm() / alone.norm()).item()
        if not off <= (1e-3 if self._dtype == torch.float32 else 0.1):
            raise UserError(f"{refusal}: in a batch its logits are off by {off:.1%}")

    @torch.inference_mode()
    def _alone(self, ids: list[int]) -> torch.Tensor:
        """Logits [vocab] after `ids` as the model itself computes them."""
        logits: torch.Tensor = self._model(input_ids=torch.tensor([ids], device=self._device)).logits
        return logits[0, -1]


class _Probe:
    """A Row for `prove`."""

    scores_prompt = False

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.adapter, self.token = prompt, NONE, 9

    def score_prompt(self, start: int, logits: torch.Tensor) -> None: ...
