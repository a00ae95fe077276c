"""Attention over the cache: it writes a step's keys and values into their rows, and reads what each token may see.

On a CPU with a C++ compiler native.cpp does so, for all of a step's sequences at once. Elsewhere torch's operators do: for
those that decode, a slab of rows at a time; for each piece of a prompt, one after another.
"""

import itertools
import math
import mmap
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional

from plugins import hardware
from plugins.engines.cache import BLOCK, Place, Slab
from plugins.engines.native import Native, Rows
from plugins.engines.scheduler import Piece

SMALL = 256  # keys of all sequences: below it, one call costs less than several
QUERIES = 64  # of a prompt at a time: their scores stay in a core's cache


class Table(NamedTuple):
    """The keys and values of a slab."""

    # For each KV heads and width, all that have them: [tables, rows, KV heads, capacity, width].
    wholes: list[torch.Tensor]
    # Each layer's keys and values, which are parts of those: [rows, ...].
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    addresses: np.ndarray  # [2, layers]: of their first rows, in memory
    sizes: np.ndarray  # [2, layers]: bytes from a row to the next


class Tables:
    """A Store of keys and values, for layers of `shapes`: (KV heads, width of a key, width of a value)."""

    def __init__(self, shapes: Several[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self.token_bytes = sum(heads * (key + value) for heads, key, value in shapes) * dtype.itemsize

    def make(self, rows: int, capacity: int) -> Table:
        """Of zeros, since a NaN that is hidden would still be one."""
        try:
            return self._made(rows, capacity)
        except (RuntimeError, OSError) as error:
            if hardware.is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise

    def _made(self, rows: int, capacity: int) -> Table:
        kinds = [(heads, width) for heads, *widths in self._shapes for width in widths]
        # Those of one shape lie in one tensor: a row is then copied by one operator, not by two for each layer.
        wholes = {
            (heads, width): self._zeros(count, rows, heads, capacity, width)
            for (heads, width), count in Counter(kinds).items()
        }
        unused = {kind: iter(whole) for kind, whole in wholes.items()}
        tables = [next(unused[kind]) for kind in kinds]
        keys, values = tables[::2], tables[1::2]
        return Table(
            wholes=list(wholes.values()),
            layers=list(zip(keys, values, strict=True)),
            addresses=np.array([[table.data_ptr() for table in each] for each in (keys, values)], np.int64),
            sizes=np.array([[table[0].nbytes for table in each] for each in (keys, values)], np.int64),
        )

    def release(self, tables: Table) -> None:
        """Nobody has them any more: torch frees them by itself."""

    def copy(self, source: Place, at: int, target: Place, to: int, tokens: int) -> None:
        tokens = -(-tokens // BLOCK) * BLOCK  # native.cpp has keys of several tokens side by side; more is of no harm
        for old, new in zip(source.slab.tables.wholes, target.slab.tables.wholes, strict=True):
            new[:, target.row, :, to : to + tokens] = old[:, source.row, :, at : at + tokens]

    def _zeros(self, *shape: int) -> torch.Tensor:
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # Memory that the kernel zeroes where it is first touched: all at once would hold up everyone for some steps.
        memory = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize, flags=mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # on Linux; without, each 4 KiB is a fault of its own
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=self._dtype).view(shape)


class Rule(NamedTuple):
    """How a layer attends: the scale of its scores, how many tokens it sees, and what softly bounds the scores."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Decoding:
    """Sequences of one slab that compute one token each: tokens `first:last` of the step, in the order of their rows."""

    slab: Slab
    first: int
    last: int
    rows: torch.Tensor  # [sequences]
    positions: torch.Tensor  # [sequences]: where the token comes
    top: int  # rows of the slab that are read
    masks: dict[int | None, torch.Tensor]

    @property
    def is_dense(self) -> bool:
        return self.top == self.last - self.first

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[rows, 1, 1, keys], to be added to the scores; the same in every layer, so made once."""
        if window not in self.masks:
            keys, here = torch.arange(self.slab.capacity, device=self.rows.device), self.positions[:, None]
            hidden = keys > here
            if window is not None:
                hidden |= keys <= here - window
            mask = torch.zeros(self.top, self.slab.capacity, dtype=dtype, device=hidden.device)
            mask[self.rows] = mask[self.rows].masked_fill_(hidden, torch.finfo(dtype).min)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        keys, values = self.slab.tables.layers[layer]
        mine = slice(self.first, self.last)
        keys[self.rows, :, self.positions] = key[mine]
        values[self.rows, :, self.positions] = value[mine]
        queries = query[mine]
        if not self.is_dense:  # rows between, whose prompts are being read
            spread = queries.new_zeros(self.top, *queries.shape[1:])
            spread[self.rows] = queries
            queries = spread
        # Whole rows: what has gaps, torch would copy before it multiplies.
        result = _attend(queries, keys[: self.top], values[: self.top], self.mask(rule.window, query.dtype), rule)
        return result if self.is_dense else result[self.rows]


@dataclass(frozen=True)
class Reading:
    """A piece of a prompt: tokens `first:last` of the step, the sequence's from `start` on."""

    place: Place
    first: int
    last: int
    start: int
    masks: dict[tuple[int, int | None], torch.Tensor]

    def keys(self, at: int, till: int, window: int | None) -> slice:
        """The keys that tokens `at:till` of the piece may see."""
        return slice(0 if window is None else max(0, self.start + at - window + 1), self.start + till)

    def mask(self, at: int, till: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[tokens, keys] for tokens `at:till`, to be added to the scores; the same in every layer, so made once."""
        if (at, window) not in self.masks:
            seen = self.keys(at, till, window)
            here = torch.arange(self.start + at, self.start + till, device=like.device)[:, None]
            there = torch.arange(seen.start, seen.stop, device=like.device)
            hidden = there > here
            if window is not None:
                hidden |= there <= here - window
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(like.dtype).min)
            self.masks[at, window] = mask
        return self.masks[at, window]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        keys, values = (table[self.place.row] for table in self.place.slab.tables.layers[layer])
        mine, count = slice(self.first, self.last), self.last - self.first
        keys[:, self.start : self.start + count] = key[mine].transpose(0, 1)
        values[:, self.start : self.start + count] = value[mine].transpose(0, 1)
        queries = query[mine].permute(1, 2, 0, 3)  # [KV heads, group, tokens, d]
        group = queries.shape[1]
        result = value.new_empty(count, *query.shape[1:3], value.shape[-1])
        for at in range(0, count, QUERIES):
            till = min(at + QUERIES, count)
            seen, mask = self.keys(at, till, rule.window), self.mask(at, till, rule.window, query)
            block = queries[:, :, at:till].flatten(1, 2)[None]
            made = _attend(block, keys[None, :, seen], values[None, :, seen], mask.repeat(group, 1), rule)
            result[at:till] = made[0].unflatten(1, (group, till - at)).permute(2, 0, 1, 3)
        return result


def by_slab(pieces: Several[Piece[Any]]) -> list[tuple[Slab, list[Piece[Any]]]]:
    """`pieces` that follow each other and lie in one slab, together."""
    groups = itertools.groupby(pieces, key=lambda piece: piece.running.place.slab)
    return [(slab, list(group)) for slab, group in groups]


class Attention(Protocol):
    """The attention of one step: it writes the step's keys and values into the cache, and reads what each token may see."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """query [tokens, heads, d], key [tokens, KV heads, d], value [tokens, KV heads, e] -> [tokens, heads, e]."""
        ...


@dataclass(frozen=True)
class Step:
    """What one forward is given."""

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    attention: Attention
    wanted: torch.Tensor  # [logits]: the tokens after which the next is to be known


Forward = Callable[[Step], torch.Tensor]  # -> logits [wanted, vocab]


class TorchAttention(Attention):
    """By torch's operators. `parts` are all of the step's tokens, in order."""

    def __init__(self, parts: Several[Decoding | Reading]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, decoding: Several[Piece[Any]], reading: Several[Piece[Any]], device: torch.device) -> "TorchAttention":
        """The tokens of `decoding`, in the order in which they lie in slabs, come before `reading`'s."""
        parts: list[Decoding | Reading] = []
        first = 0
        for slab, group in by_slab(decoding):
            places = [piece.running.place for piece in group]
            parts.append(
                Decoding(
                    slab=slab,
                    first=first,
                    last=first + len(places),
                    rows=torch.tensor([place.row for place in places], device=device),
                    positions=torch.tensor([place.length for place in places], device=device),
                    top=places[-1].row + 1,
                    masks={},
                )
            )
            first += len(places)
        for piece in reading:
            place = piece.running.place
            parts.append(Reading(place, first, first + piece.count, place.length, {}))
            first += piece.count
        return cls(parts)

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        query = query.unflatten(1, (key.shape[1], -1))
        results = [part.attend(layer, query, key, value, rule) for part in self._parts]
        result = torch.cat(results) if len(results) > 1 else results[0]
        return result.flatten(1, 2)


class NativeAttention(Attention):
    """By native.cpp, of all `pieces` at once, whose tokens come in their order."""

    def __init__(self, native: Native, pieces: Several[Piece[Any]]) -> None:
        self._native = native
        places = [piece.running.place for piece in pieces]
        counts = [piece.count for piece in pieces]
        parts = []
        for slab, mine in by_slab(pieces):
            rows = np.array([piece.running.place.row for piece in mine])
            parts.append(slab.tables.addresses[..., None] + slab.tables.sizes[..., None] * rows)
        keys, values = np.concatenate(parts, axis=-1)
        self.rows = Rows(
            keys,
            values,
            capacities=[place.slab.capacity for place in places],
            firsts=list(itertools.accumulate(counts[:-1], initial=0)),
            counts=counts,
            starts=[place.length for place in places],
        )

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        return self._native.attend(self.rows, layer, query, key, value, *rule)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """[sequences, KV heads, queries, e] of queries [.., queries, d], keys [.., keys, d] and values [.., keys, e]."""
    small = query.shape[0] * key.shape[2] <= SMALL and query.shape[2] < QUERIES
    if rule.softcap is None and (small or query.device.type != "cpu"):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scale)
    # On a CPU torch's own takes twice as long as the products that it is made of.
    shape = query.shape[:2]
    scores = torch.bmm((query * rule.scale).flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, shape)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores += mask
    result: torch.Tensor = torch.bmm(scores.softmax(-1).flatten(0, 1), value.flatten(0, 1)).unflatten(0, shape)
    return result
