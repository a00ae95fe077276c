"""What the model will see: lengths, labels, packs, what is left out, and some rows as they come."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from finetune.config import Data, FinetuneConfig
from finetune.data import TokensAndLabels, units_an_epoch
from finetune.loop import total_steps
from finetune.model import load_tokenizer
from finetune.tokenise import Examples, prepare, process
from plugins.model_files import check_model_files
from plugins.template import Tokenizer
from plugins.types import IGNORE

FIRST = 2000  # rows of a stream that are looked at
GREEN, PLAIN = "\033[32m", "\033[0m"


def preview(config: FinetuneConfig, *, rows: int, color: bool) -> Iterator[str]:
    """Lines about the config's data, then its first `rows` training rows with what carries loss in green, or in [[ ]].

    Only the model's tokenizer is loaded. Raises UserError for what is wrong with the rows.
    """
    check_model_files(config.model, "model.path")
    tokenizer = load_tokenizer(config.model)
    data = config.data
    if data.streaming:
        train, counts = process(itertools.islice(data.source.read(), FIRST), data, tokenizer)
        yield f"{len(train):,} rows to learn from among the first {counts.seen:,} of the stream"
    else:
        prepared = prepare(data, tokenizer, seed=config.train.seed)
        train, counts = prepared.train, prepared.counts
        yield f"{len(train):,} {'pairs' if train.pairs else 'rows'} to learn from, {len(prepared.held_out):,} held out"
    if said := counts.words(data.max_length):
        yield said
    yield from _sizes(train, data)
    if not data.streaming:
        steps = total_steps(config.train, units_an_epoch(train, data), config.scaling.workers)
        yield f"the run: {steps:,} steps"
    for index in range(min(rows, len(train))):
        for kind, row in zip(("chosen ", "rejected ") if train.pairs else ("",), train[index], strict=True):
            learned = int((row[1] != IGNORE).sum())
            yield f"\n{kind}row {int(train.origins[index]) + 1}: {len(row[0]):,} tokens, {learned:,} learned"
            yield _text(row, tokenizer, color=color)


def _sizes(examples: Examples, data: Data) -> Iterator[str]:
    lengths = np.diff(examples.starts)
    least, median, most, many = (int(np.quantile(lengths, share)) for share in (0, 0.5, 1, 0.95))
    yield (
        f"tokens a row: {least} to {most}, median {median}, mean {lengths.mean():.0f}, "
        f"19 of 20 rows have at most {many}"
    )
    learned = int((examples.labels != IGNORE).sum())
    yield f"learned: {learned:,} of {len(examples.labels):,} tokens ({learned / len(examples.labels):.0%})"
    if data.packing:
        packs = units_an_epoch(examples, data)
        full = lengths.sum() / (packs * data.max_length)
        yield f"packs of {data.max_length}: {packs:,}, {full:.1%} full, {len(examples) / packs:.1f} rows each"


def _text(row: TokensAndLabels, tokenizer: Tokenizer, *, color: bool) -> str:
    """The row's text with all its special tokens, what carries loss marked."""
    opens, closes = (GREEN, PLAIN) if color else ("[[", "]]")
    parts = []
    for learned, part in _stretches(*row):
        text = tokenizer.decode(part.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(f"{opens}{text}{closes}" if learned else text)
    return "".join(parts)


def _stretches(tokens: NDArray[np.int32], labels: NDArray[np.int32]) -> Iterator[tuple[bool, NDArray[np.int32]]]:
    learned = labels != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    for first, last in itertools.pairwise(edges):
        yield bool(learned[first]), tokens[first:last]
