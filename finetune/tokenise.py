"""Rows -> tokens and labels: once a run, in several processes where it is worth it, and kept for the next run.

Rows are taken a shard at a time. What a shard becomes depends on its rows, the processor, the tokenizer and the lengths,
and is kept in a cache under a name made of these: so a second run starts at once, and rows that are added to a file cost
only themselves.
"""

import functools
import hashlib
import itertools
import multiprocessing
import os
import pickle
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import dill
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import plugins
from finetune.config import Data
from plugins.cache_folder import cache_folder
from plugins.data import DataProcessor, Source, processed
from plugins.spec import UserError
from plugins.template import Tokenizer
from plugins.types import IGNORE, Example, Pair, Row

SHARD = 2000  # rows
ALONE = 5  # shards that are made here before other processes are worth their start
PLUGINS = Path(plugins.__path__[0])  # what our own processors and templates do is a part of what the cache goes by
CACHE_BYTES = 10 * 1024**3  # what is older goes
Placed = tuple[str, Row]  # a row and where it stands


@dataclass(frozen=True)
class Counts:
    """Rows seen, and what befell those that were not simply taken: longer than max_length, or with nothing to learn."""

    seen: int = 0
    cut: int = 0
    split: int = 0
    dropped: int = 0
    left_out: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def words(self, max_length: int) -> str:
        """What befell rows, for people; empty where nothing did."""
        longer = f"longer than {max_length} tokens"
        fates = {f"cut, being {longer}": self.cut, f"split, being {longer}": self.split,
                 f"dropped, being {longer}": self.dropped, "left out, with nothing to learn": self.left_out}  # fmt: skip
        return "; ".join(f"{number:,} of {self.seen:,} rows {fate}" for fate, number in fates.items() if number)


@dataclass(frozen=True)
class Examples:
    """Tokenised rows end to end in flat arrays: Ray shares these between the workers of a node without a copy.

    `tokens` and `labels` are int32 [total]; row i is at `starts[i]:starts[i + 1]`. With `pairs`, rows 2i and 2i + 1 are the
    chosen and the rejected one of example i. `origins[i]` is the number of the source's row that example i came from.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    starts: NDArray[np.int64]
    origins: NDArray[np.int64]
    pairs: bool = False

    @classmethod
    def of(cls, examples: Iterable[Example | Pair], origins: Sequence[int] | None = None) -> "Examples":
        kept = list(examples)
        pairs = any(isinstance(example, Pair) for example in kept)
        rows = [row for example in kept for row in _rows(example)]
        return cls(
            tokens=np.fromiter((token for row in rows for token in row.input_ids), dtype=np.int32),
            labels=np.fromiter((label for row in rows for label in row.labels), dtype=np.int32),
            starts=np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int64),
            origins=np.asarray(range(len(kept)) if origins is None else origins, dtype=np.int64),
            pairs=pairs,
        )

    @classmethod
    def join(cls, parts: Sequence["Examples"]) -> "Examples":
        """All of `parts` in one, in order."""
        if not parts:
            return cls.of([])
        ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
        starts = [part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            starts=np.concatenate([*starts, ends[-1:]]),
            origins=np.concatenate([part.origins for part in parts]),
            pairs=any(part.pairs for part in parts if len(part)),
        )

    def __len__(self) -> int:
        """Examples: a pair is one."""
        return (len(self.starts) - 1) // (2 if self.pairs else 1)

    def __getitem__(self, index: int) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The tokens and labels of an example: of one row, or of the two of a pair."""
        rows = (2 * index, 2 * index + 1) if self.pairs else (index,)
        return [
            (self.tokens[self.starts[row] : self.starts[row + 1]], self.labels[self.starts[row] : self.starts[row + 1]])
            for row in rows
        ]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        lengths: NDArray[np.int64] = np.diff(self.starts)
        return lengths.reshape(-1, 2).sum(1) if self.pairs else lengths

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "Examples":
        """These examples, in this order."""
        chosen = [self[int(index)] for index in indices]
        return replace(
            self,
            tokens=np.concatenate([tokens for rows in chosen for tokens, _ in rows] or [self.tokens[:0]]),
            labels=np.concatenate([labels for rows in chosen for _, labels in rows] or [self.labels[:0]]),
            starts=np.cumsum([0, *(len(tokens) for rows in chosen for tokens, _ in rows)], dtype=np.int64),
            origins=self.origins[np.asarray(indices, dtype=np.int64)],
        )


def _rows(example: Example | Pair) -> tuple[Example, ...]:
    return (example.chosen, example.rejected) if isinstance(example, Pair) else (example,)


@dataclass(frozen=True)
class Prepared:
    """What a run learns from and is evaluated on. `train` is empty where rows are streamed."""

    train: Examples
    held_out: Examples
    counts: Counts


def prepare(data: Data, tokenizer: Tokenizer, *, seed: int) -> Prepared:
    """Read, process and split the rows. Raises UserError that names the file and line of a row that is wrong."""
    if data.streaming:
        # Only a look at whether something can be learned from it.
        peek = process(itertools.islice(data.source.read(), 64), data, tokenizer)
        _check_some(data.source, peek, data)
        train, counts = peek[0].select([]), Counts()
    else:
        train, counts = _tokenise(data.source, data, tokenizer)
    if isinstance(data.validation, float):
        return _split(train, data.validation, seed, counts)
    held_out, more = _tokenise(data.validation, data, tokenizer)
    if held_out.pairs != train.pairs and len(train):
        raise UserError(
            "data.validation: its rows make single examples where those of data.source make pairs, or vice versa"
        )
    return Prepared(train, held_out, counts + more)


def _split(examples: Examples, fraction: float, seed: int, counts: Counts) -> Prepared:
    """By rows of the source: the parts of a row that was split stay together."""
    if fraction == 0:
        return Prepared(examples, examples.select([]), counts)
    rows = np.unique(examples.origins)
    held = round(len(rows) * fraction)
    if held == 0 or held == len(rows):
        raise UserError(f"data.validation = {fraction} of {len(rows)} rows leaves one of the two parts empty")
    chosen = np.isin(examples.origins, np.random.default_rng(seed).permutation(rows)[:held])
    return Prepared(examples.select(np.flatnonzero(~chosen)), examples.select(np.flatnonzero(chosen)), counts)


def _tokenise(source: Source, data: Data, tokenizer: Tokenizer) -> tuple[Examples, Counts]:
    parts: list[Examples] = []
    counts, first = Counts(), 0
    for part, more in tokenised(source.read(), data, tokenizer):
        parts.append(replace(part, origins=part.origins + first))
        first += more.seen
        counts += more
    examples = Examples.join(parts)
    _check_some(source, (examples, counts), data)
    return examples, counts


def _check_some(source: Source, found: tuple[Examples, Counts], data: Data) -> None:
    examples, counts = found
    if not counts.seen:
        raise UserError(f"{source} has no rows")
    if not len(examples):
        raise UserError(
            f"{source}: not one of its {counts.seen} rows has anything to learn within {data.max_length} tokens"
        )


def tokenised(rows: Iterable[Placed], data: Data, tokenizer: Tokenizer) -> Iterator[tuple[Examples, Counts]]:
    """Shard after shard of `rows`, in order; what the cache has is not made again. Errors as in `prepare`."""
    keep = _cache(data, tokenizer)
    processes = data.processes or min(8, os.cpu_count() or 1)
    placed = iter(rows)
    waiting: deque[Callable[[], tuple[Examples, Counts]]] = deque()
    made_here = 0
    # A processor of the user's own may be defined in the config file, which no other process can import.
    work = functools.cache(lambda: dill.dumps((data, tokenizer), recurse=True))
    # Not forked, since this process may have threads that hold locks. None is started before there is work for it.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    with pool, tqdm(desc="tokenising", unit=" rows", delay=1, disable=None) as bar:

        def next_done() -> tuple[Examples, Counts]:
            done = waiting.popleft()()
            bar.update(done[1].seen)
            return done

        while shard := list(itertools.islice(placed, SHARD)):
            path = keep and keep(shard)
            if path and (found := _read(path)):
                waiting.append(lambda found=found: found)  # type: ignore[misc]
            elif processes == 1 or made_here < ALONE:
                made_here += 1
                waiting.append(functools.partial(_keep, path, process(shard, data, tokenizer)))
            else:
                job = pool.submit(_process_elsewhere, work(), shard)
                waiting.append(lambda path=path, job=job: _keep(path, job.result()))  # type: ignore[misc]
            while len(waiting) > 2 * processes:
                yield next_done()
        while waiting:
            yield next_done()


def _process_elsewhere(work: bytes, shard: list[Placed]) -> tuple[Examples, Counts]:
    return process(shard, *_unpacked(work))


@functools.lru_cache(maxsize=1)
def _unpacked(work: bytes) -> tuple[Data, Tokenizer]:
    data, tokenizer = dill.loads(work)
    return data, tokenizer


def process(rows: Iterable[Placed], data: Data, tokenizer: Tokenizer) -> tuple[Examples, Counts]:
    """What rows become, here and now. `origins` count from the first of these rows."""
    kept: list[Example | Pair] = []
    origins: list[int] = []
    counts = Counts()
    for number, (place, row) in enumerate(rows):
        found, fate = _fitted(_example(place, row, data.processor, tokenizer), data)
        learned = [example for example in found if _teaches(example)]
        kept += learned
        origins += [number] * len(learned)
        counts += replace(fate, seen=1, left_out=int(not learned and not fate.dropped))
    if kept and len({type(example) for example in kept}) > 1:
        raise UserError(f"{data.processor}: makes pairs of some rows and single examples of others")
    return Examples.of(kept, origins), counts


def _example(place: str, row: Row, processor: DataProcessor, tokenizer: Tokenizer) -> Example | Pair | None:
    example = processed(place, row, processor, tokenizer)
    for part in () if example is None else _rows(example):
        if len(part.input_ids) != len(part.labels):
            raise UserError(f"{place}: {len(part.input_ids)} tokens but {len(part.labels)} labels from {processor}")
    return example


def _fitted(example: Example | Pair | None, data: Data) -> tuple[list[Example | Pair], Counts]:
    """The example as it fits into max_length, which may be in several parts or not at all."""
    size = data.max_length
    if example is None:
        return [], Counts()
    if all(len(row.input_ids) <= size for row in _rows(example)):
        return [example], Counts()
    if data.long_rows == "drop":
        return [], Counts(dropped=1)
    if isinstance(example, Pair):  # neither half of an answer can be weighed against half of another
        return [Pair(_cut(example.chosen, size), _cut(example.rejected, size))], Counts(cut=1)
    if data.long_rows == "truncate":
        return [_cut(example, size)], Counts(cut=1)
    parts = range(0, len(example.input_ids), size)
    return [Example(example.input_ids[at : at + size], example.labels[at : at + size]) for at in parts], Counts(split=1)


def _cut(row: Example, size: int) -> Example:
    return Example(row.input_ids[:size], row.labels[:size])


def _teaches(example: Example | Pair) -> bool:
    """The first label has no token before it to be predicted from. Of a pair both must have something to be weighed by."""
    return all(any(label != IGNORE for label in row.labels[1:]) for row in _rows(example))


def _cache(data: Data, tokenizer: Tokenizer) -> Callable[[list[Placed]], Path] | None:
    """shard -> the file that holds what becomes of it. None for a processor that cannot be told from another one."""
    from datasets.fingerprint import Hasher  # here, since the processes that tokenise have no use for it

    try:
        made_by = Hasher.hash((data.processor, data.max_length, data.long_rows))
    except (pickle.PicklingError, TypeError, AttributeError):
        return None
    known: Any = tokenizer
    code = [file.read_bytes() for file in sorted([*PLUGINS.glob("data/*.py"), PLUGINS / "template.py"])]
    begun = hashlib.sha256(
        repr((made_by, known.backend_tokenizer.to_str(), known.chat_template, known.special_tokens_map, code)).encode()
    )
    folder = cache_folder("tokens")

    def path(shard: list[Placed]) -> Path:
        whole = begun.copy()
        for _, row in shard:
            whole.update(repr(row).encode())
        return folder / f"{whole.hexdigest()[:40]}.npz"

    return path


def _read(path: Path) -> tuple[Examples, Counts] | None:
    """What `_keep` has put at `path`; None where there is nothing, or nothing whole."""
    try:
        with np.load(path) as found:
            arrays = {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    path.touch()  # so that it is not the first to go
    counts, pairs = Counts(*arrays.pop("counts").tolist()), bool(arrays.pop("pairs"))
    return Examples(**arrays, pairs=pairs), counts


def _keep(path: Path | None, done: tuple[Examples, Counts]) -> tuple[Examples, Counts]:
    if path is not None:
        examples, counts = done
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, **vars(examples) | {"counts": np.array(list(vars(counts).values()))})
        partial.replace(path)
        _make_room(path.parent)
    return done


def _make_room(folder: Path) -> None:
    """Delete what was not used for the longest, as far as the cache is too large."""
    kept = sorted(((file.stat(), file) for file in folder.glob("*.npz")), key=lambda found: -found[0].st_mtime)
    for total, (_, file) in zip(itertools.accumulate(stat.st_size for stat, _ in kept), kept, strict=True):
        if total > CACHE_BYTES:
            file.unlink(missing_ok=True)
