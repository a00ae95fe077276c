"""Rows -> tokens and labels, once a run -> the micro batches of one rank, in an order that a resumed run finds again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray

from finetune.config import Data
from plugins.data import DataProcessor, Source
from plugins.spec import UserError
from plugins.template import Tokenizer
from plugins.types import IGNORE, Example, Row


@dataclass(frozen=True)
class Examples:
    """Tokenised rows end to end in flat arrays: Ray shares these between the workers of a node without a copy.

    `tokens` and `labels` are int32 [total]; row i is at `starts[i]:starts[i + 1]`.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        kept = list(examples)
        return cls(
            tokens=np.array([token for example in kept for token in example.input_ids], dtype=np.int32),
            labels=np.array([label for example in kept for label in example.labels], dtype=np.int32),
            starts=np.cumsum([0, *(len(example.input_ids) for example in kept)], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        row = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[row], self.labels[row]


@dataclass(frozen=True)
class Prepared:
    """What a run learns from and is evaluated on. `cut` rows were longer than max_length; `left_out` rows are in neither."""

    train: Examples
    held_out: Examples
    cut: int
    left_out: int


def prepare(data: Data, tokenizer: Tokenizer, *, seed: int) -> Prepared:
    """Read, process and split the rows. Raises UserError that names the file and line of a row that is wrong."""
    rows, cut, left_out = _processed(data.source, data.processor, tokenizer, data.max_length)
    if isinstance(data.validation, float):
        held = round(len(rows) * data.validation)
        if len(rows) <= held or (data.validation > 0 and held == 0):
            raise UserError(
                f"data.validation = {data.validation} of {len(rows)} rows leaves one of the two parts empty"
            )
        order = np.random.default_rng(seed).permutation(len(rows))
        train, held_out = [rows[i] for i in sorted(order[held:])], [rows[i] for i in sorted(order[:held])]
    else:
        train = rows
        held_out, more_cut, more_left_out = _processed(data.validation, data.processor, tokenizer, data.max_length)
        cut, left_out = cut + more_cut, left_out + more_left_out
    return Prepared(Examples.of(train), Examples.of(held_out), cut, left_out)


def _processed(
    source: Source, processor: DataProcessor, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], int, int]:
    kept: list[Example] = []
    cut = left_out = seen = 0
    for place, row in source.read():
        seen += 1
        example = _example(place, row, processor, tokenizer)
        if example is not None and len(example.input_ids) > max_length:
            cut += 1
            example = Example(example.input_ids[:max_length], example.labels[:max_length])
        # The first label has no token before it to be predicted from.
        if example is None or all(label == IGNORE for label in example.labels[1:]):
            left_out += 1
        else:
            kept.append(example)
    if not seen:
        raise UserError(f"{source} has no rows")
    if not kept:
        raise UserError(f"{source}: not one of its {seen} rows has anything to learn within {max_length} tokens")
    return kept, cut, left_out


def _example(place: str, row: Row, processor: DataProcessor, tokenizer: Tokenizer) -> Example | None:
    try:
        example = processor(row, tokenizer)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except TemplateError as error:
        raise UserError(f"{place}: the chat template refuses it: {error}") from error
    except KeyError as error:
        field = error.args[0]
        if field in row:  # not a missing field but a mistake inside the processor
            raise
        raise UserError(f"{place}: has no field {field!r} (fields: {', '.join(map(str, row))})") from error
    if example is not None and len(example.input_ids) != len(example.labels):
        raise UserError(f"{place}: {len(example.input_ids)} tokens but {len(example.labels)} labels from {processor}")
    return example


@dataclass(frozen=True)
class Batch:
    """A padded micro batch: three int64 tensors [rows, length]; the attention mask is 0 on padding, labels are IGNORE."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def collate(rows: list[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> Batch:
    """Pad on the right to the longest row. What token stands in the padding does not matter: it is masked."""
    shape = (len(rows), max(len(tokens) for tokens, _ in rows))
    batch = Batch(
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, IGNORE, dtype=torch.int64),
    )
    for index, (tokens, labels) in enumerate(rows):
        batch.input_ids[index, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        batch.attention_mask[index, : len(tokens)] = 1
        batch.labels[index, : len(labels)] = torch.from_numpy(labels.astype(np.int64))
    return batch


def training_batches(
    examples: Examples, *, batch_size: int, accumulate: int, rank: int, world_size: int, seed: int, first_step: int
) -> Iterator[list[Batch]]:
    """For each step from `first_step` on, without end, the micro batches of this rank.

    Every epoch is one permutation of all rows, and a step takes the next batch_size x accumulate x world_size of them, so
    what a step sees depends neither on how it is portioned nor on where the run was interrupted.
    """
    step_rows = batch_size * accumulate * world_size
    permutations: dict[int, NDArray[np.int64]] = {}
    step = first_step
    while True:
        micro_batches = []
        for micro in range(accumulate):
            first = step * step_rows + (micro * world_size + rank) * batch_size
            positions = [divmod(index, len(examples)) for index in range(first, first + batch_size)]
            for epoch in {epoch for epoch, _ in positions} - permutations.keys():
                permutations = {old: order for old, order in permutations.items() if old >= epoch - 1}
                permutations[epoch] = np.random.default_rng([seed, epoch]).permutation(len(examples))
            micro_batches.append(collate([examples[permutations[epoch][index]] for epoch, index in positions]))
        yield micro_batches
        step += 1


def evaluation_batches(examples: Examples, *, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's share of all rows, each exactly once, rows of like length together.

    Every rank gets the same number of batches (an empty share is one row without labels), since ranks wait for each other.
    """
    by_length = np.argsort(np.diff(examples.starts), kind="stable")
    for first in range(0, len(examples), batch_size * world_size):
        share = by_length[first : first + batch_size * world_size][rank::world_size]
        if len(share):
            yield collate([examples[index] for index in share])
        else:
            tokens, labels = examples[by_length[first]]
            yield collate([(tokens, np.full_like(labels, IGNORE))])
