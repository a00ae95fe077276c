"""Tokenised rows -> the micro batches of one rank, in an order that a resumed run finds again."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.config import Data
from finetune.kernels import Documents
from finetune.tokenise import Examples, Placed, process
from plugins.spec import UserError
from plugins.template import Tokenizer
from plugins.types import IGNORE

Layout = Literal["flat", "padded"]
Position = tuple[int, int, int]  # in a stream: epoch, the first row that is held, units of the held rows that were used
TokensAndLabels = tuple[NDArray[np.int32], NDArray[np.int32]]
WINDOW = 64  # steps whose rows are sorted by length together, where rows are bucketed
STREAMED = 2000  # rows of a stream that a rank holds at a time: they are packed and shuffled together


@dataclass(frozen=True)
class Batch:
    """A micro batch. `input_ids` and `labels` are int64 [rows, length]; labels are IGNORE where there is no loss.

    Flat: one row that holds everything, `position_ids` that begin anew with each document, and `documents`: where they are.
    Padded: a row each, or each pack, padded on the right; `attention_mask` is 0 on the padding, and with packs None, since
    positions tell. `owners` [rows, length] numbers the documents; `tokens` counts what is not padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    owners: torch.Tensor
    tokens: int
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    documents: Documents | None = None

    def to(self, device: torch.device) -> "Batch":
        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Batch(
            self.input_ids.to(device), self.labels.to(device), self.owners.to(device), self.tokens,
            moved(self.position_ids), moved(self.attention_mask), self.documents,
        )  # fmt: skip


def collate(packs: Sequence[Sequence[TokensAndLabels]], layout: Layout) -> Batch:
    """Packs of rows -> a batch. What token stands in the padding does not matter: nothing looks at it."""
    if layout == "flat":
        packs = [[row for pack in packs for row in pack]]
    shape = (len(packs), max(sum(len(tokens) for tokens, _ in pack) for pack in packs))
    input_ids, position_ids, owners, attention_mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    bounds, document = [0], 0
    for index, pack in enumerate(packs):
        last = 0
        for tokens, row_labels in pack:
            first, last = last, last + len(tokens)
            input_ids[index, first:last] = torch.from_numpy(tokens.astype(np.int64))
            labels[index, first + 1 : last] = torch.from_numpy(
                row_labels[1:].astype(np.int64)
            )  # nothing predicts the first
            position_ids[index, first:last] = torch.arange(last - first)
            owners[index, first:last] = document
            document += 1
            bounds.append(last)
        position_ids[index, last:] = torch.arange(shape[1] - last)
        attention_mask[index, :last] = 1
    tokens_seen = int(attention_mask.sum())
    if layout == "flat":
        return Batch(input_ids, labels, owners, tokens_seen, position_ids, None, Documents(tuple(bounds)))
    if all(len(pack) == 1 for pack in packs):
        return Batch(input_ids, labels, owners, tokens_seen, None, attention_mask)
    return Batch(input_ids, labels, owners, tokens_seen, position_ids)


def pack(lengths: NDArray[np.int64], size: int, order: NDArray[np.int64]) -> list[list[int]]:
    """Rows -> packs of at most `size` tokens by best-fit decreasing: each row, the longest first, goes where it leaves the
    least room (Ding et al. 2024, arXiv 2404.10830). Rows of one length come in `order`. Rows are never cut.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> the packs that have it
    rooms: list[int] = []  # the keys of with_room, sorted
    for row in order[np.argsort(-lengths[order], kind="stable")]:
        length = int(lengths[row])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            left, number = size - length, len(packs)
            packs.append([])
        else:
            room = rooms[place]
            left, number = room - length, with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[number].append(int(row))
        if left > 0:
            if left not in with_room:
                bisect.insort(rooms, left)
                with_room[left] = []
            with_room[left].append(number)
    return packs


def units_an_epoch(examples: Examples, data: Data) -> int:
    """What an epoch has of what batch_size counts: packs, or rows (pairs)."""
    if not data.packing:
        return len(examples)
    return len(pack(examples.lengths, data.max_length, np.arange(len(examples))))


@dataclass(frozen=True)
class Step:
    """A rank's micro batches of one step. `position`: where a stream of rows is after it; None where none is streamed."""

    micro_batches: list[Batch]
    epoch: float
    position: Position | None = None


def training_steps(
    examples: Examples,
    data: Data,
    layout: Layout,
    *,
    batch_size: int,
    accumulate: int,
    rank: int,
    world_size: int,
    seed: int,
    first_step: int,
) -> Iterator[Step]:
    """This rank's steps from `first_step` on, without end.

    Every epoch is one permutation of all rows (or packs, made anew), and a step takes the next batch_size x accumulate x
    world_size of them, so what a step sees depends neither on how it is portioned nor on where the run was interrupted.
    """
    slots = accumulate * world_size
    step_units = batch_size * slots
    epochs, lengths = _Epochs(examples, data, seed), examples.lengths
    window = step_units * WINDOW if data.bucketing else step_units
    for step in itertools.count(first_step):
        first = step * step_units
        begin = first - first % window
        units = [epochs.unit(index) for index in range(begin, begin + window)]
        sizes = [int(lengths[unit].sum()) for unit in units]
        by_size = np.argsort(sizes, kind="stable")[::-1]
        groups = by_size.reshape(-1, step_units)
        if data.bucketing:  # steps of like lengths, in an order of no length
            groups = groups[np.random.default_rng([seed, begin]).permutation(len(groups))]
        chosen = groups[(first - begin) // step_units]
        # Dealt out so that neither a rank nor a micro batch gets all the long ones.
        shares = [chosen[micro::accumulate][rank::world_size] for micro in range(accumulate)]
        yield Step(
            [collate([pack for index in share for pack in _packs(examples, units[index])], layout) for share in shares],
            epoch=(first + step_units) / epochs.units,
        )


def _packs(examples: Examples, unit: Sequence[int]) -> list[list[TokensAndLabels]]:
    """A unit's rows as `collate` takes them: in one pack, but the two of a pair apart."""
    rows = [row for index in unit for row in examples[index]]
    return [[row] for row in rows] if examples.pairs else [rows]


class _Epochs:
    """Unit `index` of an endless sequence of epochs, each with an order of its own."""

    def __init__(self, examples: Examples, data: Data, seed: int) -> None:
        self.examples, self.data, self.seed = examples, data, seed
        self.made: dict[int, list[list[int]]] = {}
        self.units = units_an_epoch(examples, data)

    def unit(self, index: int) -> list[int]:
        epoch, place = divmod(index, self.units)
        if epoch not in self.made:
            self.made = {old: units for old, units in self.made.items() if old >= epoch - 1}
            self.made[epoch] = _ordered(self.examples, self.data, np.random.default_rng([self.seed, epoch]))
        return self.made[epoch][place]


def _ordered(examples: Examples, data: Data, random: np.random.Generator) -> list[list[int]]:
    order = random.permutation(len(examples))
    if not data.packing:
        return [[int(index)] for index in order]
    packs = pack(examples.lengths, data.max_length, order)
    return [packs[index] for index in random.permutation(len(packs))]


def streamed_steps(
    data: Data,
    tokenizer: Tokenizer,
    layout: Layout,
    *,
    batch_size: int,
    accumulate: int,
    rank: int,
    world_size: int,
    seed: int,
    position: Position = (0, 0, 0),
) -> Iterator[Step]:
    """This rank's steps from rows that are read as they are needed: of every world_size rows one is its own.

    `position` is that of the last step of the run that is resumed: epoch, the first of the rows that were held then, and how
    many units of them were used. The source is read up to there, but only what was held is tokenised again.
    """
    units = _stream(data, tokenizer, rank, world_size, seed, position)
    while True:
        micro_batches = []
        for _ in range(accumulate):
            taken = list(itertools.islice(units, batch_size))
            micro_batches.append(collate([pack for packs, _ in taken for pack in packs], layout))
            position = taken[-1][1]
        yield Step(micro_batches, epoch=float(position[0]), position=position)


def _stream(
    data: Data, tokenizer: Tokenizer, rank: int, world_size: int, seed: int, position: Position
) -> Iterator[tuple[list[list[TokensAndLabels]], Position]]:
    first_epoch, first_row, used = position
    yielded = used
    for epoch in itertools.count(first_epoch):
        rows: Iterator[Placed] = itertools.islice(data.source.read(), rank + first_row * world_size, None, world_size)
        while held := list(itertools.islice(rows, STREAMED)):
            examples, _ = process(held, data, tokenizer)
            units = _ordered(examples, data, np.random.default_rng([seed, epoch, first_row, rank]))
            for number, unit in enumerate(units[used:], used + 1):
                yield _packs(examples, unit), (epoch, first_row, number)
            yielded += len(units)
            first_row, used = first_row + len(held), 0
        if not yielded:
            raise UserError(f"{data.source}: worker {rank} of {world_size} finds no row to learn from in it")
        first_row = 0


def evaluation_batches(
    examples: Examples, layout: Layout, *, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's share of all examples, each exactly once, those of like length together.

    Every rank gets the same number of batches (an empty share is one row without labels), since ranks wait for each other.
    """
    by_length = np.argsort(examples.lengths, kind="stable")
    for first in range(0, len(examples), batch_size * world_size):
        share = by_length[first : first + batch_size * world_size][rank::world_size]
        if len(share):
            yield collate([[row] for index in share for row in examples[index]], layout)
        else:
            spare = examples[by_length[first]]
            yield collate([[(tokens, np.full_like(labels, IGNORE))] for tokens, labels in spare], layout)
