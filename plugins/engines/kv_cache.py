"""The keys and values of the sequences being decoded, in the form in which transformers' attention asks for them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from plugins.spec import UserError

SMALLEST = 64  # positions: the first allocation; it doubles from there


class KVCache(Cache):  # type: ignore[misc, unused-ignore]
    """A table with a row a sequence: row i belongs to the i-th sequence of the batch, and no row between is empty.

    Each layer has keys and values of [rows, kv heads, capacity, head dim]. A decode step writes one position of every
    row and reads views of the occupied rows up to the longest, so nothing is copied but where the table grows. What
    lies beyond a row's own length is old or zero; the mask of the step hides it.
    """

    def __init__(self, max_rows: int, max_length: int) -> None:
        # Cache.__init__ differs between versions of transformers, and wants layers that keep their own lengths.
        self.layers: list[Any] = []
        self._max_rows, self._max_length = max_rows, max_length
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._lengths: list[int] = []  # of the occupied rows, in tokens
        self._rows = torch.empty(0)  # [rows] and [rows]: where this step writes
        self._positions = torch.empty(0)
        self.longest = 0

    def join(self, prompts: Iterable[tuple[Any, ...]], lengths: Sequence[int]) -> None:
        """Append rows: `prompts` gives, a layer, (keys, values, ...) of [sequences, kv heads, tokens, head dim].

        `lengths`: how many of those tokens are the sequence's own; the others are padding at the right.
        """
        first, tokens = len(self._lengths), max(lengths)
        self._lengths.extend(lengths)
        for layer, (keys, values, *_) in enumerate(prompts):
            for table, new in ((self._keys, keys), (self._values, values)):
                table[layer] = self._grown(table.get(layer), like=new, occupied=first)
                table[layer][first : len(self._lengths), :, :tokens] = new[:, :, :tokens]

    def leave(self, row: int) -> None:
        """Free `row`: the last row moves there."""
        length = self._lengths.pop()
        last = len(self._lengths)
        if row == last:
            return
        self._lengths[row] = length
        for table in (self._keys, self._values):
            for layer in table.values():
                layer[row, :, :length] = layer[last, :, :length]

    def begin_step(self, device: torch.device) -> torch.Tensor:
        """Make room for one more token in every row; the position of that token, [rows]."""
        self._positions = torch.tensor(self._lengths, device=device)
        self._rows = torch.arange(len(self._lengths), device=device)
        self._lengths = [length + 1 for length in self._lengths]
        self.longest = max(self._lengths)
        for table in (self._keys, self._values):
            for layer, tensor in table.items():
                if tensor.shape[2] < self.longest:
                    table[layer] = self._grown(tensor, like=tensor, occupied=len(self._lengths))
        return self._positions

    def _grown(self, old: torch.Tensor | None, *, like: torch.Tensor, occupied: int) -> torch.Tensor:
        """`old`, or a larger copy where the rows or the lengths do not fit; `occupied` rows are kept."""
        rows, capacity = (old.shape[0], old.shape[2]) if old is not None else (0, 0)
        if old is not None and rows >= len(self._lengths) and capacity >= max(self._lengths):
            return old
        rows = _doubled(max(rows, 1), len(self._lengths), self._max_rows)
        capacity = _doubled(max(capacity, SMALLEST), max(self._lengths), self._max_length)
        # Zeros: a hidden position has weight 0, and 0 x NaN of fresh memory would still be NaN.
        new = like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
        if old is not None:
            new[:occupied, :, : old.shape[2]] = old[:occupied]
        return new

    # What transformers calls. The layer's tokens of this step come in, all that it may look at goes out.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._rows, :, self._positions] = key_states[:, :, 0]
        values[self._rows, :, self._positions] = value_states[:, :, 0]
        rows = len(self._lengths)
        return keys[:rows, :, : self.longest], values[:rows, :, : self.longest]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self.longest - 1

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        return self.longest, 0


def _doubled(start: int, needed: int, limit: int) -> int:
    while start < needed:
        start *= 2
    return max(needed, min(start, limit))


class StepMask:
    """Which keys each row of a decode step may look at, as the model at hand wants to be told.

    A sliding window is a matter of the mask alone: the cache keeps every position.
    """

    def __init__(self, config: Any, max_length: int) -> None:
        kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            kind = ", ".join(sorted(unknown))
            raise UserError(f"the torch engine cannot serve {config.model_type}: it has layers of {kind}")
        window: int | None = getattr(config, "sliding_window", None)
        slides = window is not None and window < max_length and kinds != {"full_attention"}
        self._window = window if slides else None
        self._by_kind = len(kinds) == 2

    def __call__(self, positions: torch.Tensor, longest: int, dtype: torch.dtype) -> Any:
        """Additive masks of [rows, 1, 1, longest] for rows that write at `positions` [rows]."""
        keys, here = torch.arange(longest, device=positions.device), positions[:, None]
        seen = keys <= here
        if self._window is None:
            return _additive(seen, dtype)
        near = _additive(seen & (keys > here - self._window), dtype)
        return {"full_attention": _additive(seen, dtype), "sliding_attention": near} if self._by_kind else near


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Additive, not bool: eager attention adds it, and sdpa would convert a bool one in every layer.
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
    return hidden[:, None, None, :]
