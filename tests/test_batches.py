"""Rows on their way into batches: lengths, the cache, packs, order, streams."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import CHATML, save_model, tokenizer

from finetune import Data, Instruct, Jsonl
from finetune import tokenise as tokenising
from finetune.data import Step, collate, evaluation_batches, pack, streamed_steps, training_steps, units_an_epoch
from finetune.tokenise import Examples, Prepared, prepare
from plugins.spec import UserError
from plugins.types import IGNORE, Example, Pair, Row
from ui.cli import main

TOKENIZER = tokenizer(CHATML)
ONE_RANK = {"batch_size": 4, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 0}


def written(path: Path, rows: list[dict[str, Any]]) -> Jsonl:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(str(path))


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"say {i}", "output": "fox " * (i % 9) + str(i)} for i in range(count)]


@dataclass(frozen=True)
class Lengths:
    """A processor that makes rows of the length that they name, of one token that tells them apart."""

    def __call__(self, row: Row, tokenizer: Any) -> Example:
        return Example([row["token"]] * row["length"], [row["token"]] * row["length"])


def of_lengths(lengths: list[int]) -> Examples:
    return Examples.of(Example([100 + i] * n, [100 + i] * n) for i, n in enumerate(lengths))


def data(**changes: Any) -> Data:
    return Data(**({"source": Jsonl("rows.jsonl"), "processor": Instruct(), "max_length": 64} | changes))


def seen(step: Step) -> list[int]:
    """Which rows a step has, each once, by their tokens."""
    return sorted({int(t) for batch in step.micro_batches for t in batch.input_ids.flatten() if t >= 100})


LONG = [
    {"instruction": "a", "output": "b"},
    {"instruction": "a", "output": "b " * 200},
    {"instruction": "a " * 200, "output": "b"},
]


def test_long_rows_are_cut_split_or_dropped_as_told_and_counted(tmp_path: Path) -> None:
    def made(long_rows: str) -> Prepared:
        source = written(tmp_path / "rows.jsonl", LONG)
        return prepare(data(source=source, max_length=60, long_rows=long_rows), TOKENIZER, seed=0)

    cut = made("truncate")
    assert (len(cut.train), cut.counts.cut, cut.counts.left_out) == (2, 2, 1)
    assert max(cut.train.lengths) == 60
    assert cut.counts.words(60) == (
        "2 of 3 rows cut, being longer than 60 tokens; 1 of 3 rows left out, with nothing to learn"
    )
    dropped = made("drop")
    assert (len(dropped.train), dropped.counts.dropped, dropped.counts.left_out) == (1, 2, 0)
    split = made("split")
    assert split.counts.split == 2
    assert max(split.train.lengths) == 60
    whole = prepare(data(source=written(tmp_path / "rows.jsonl", LONG), max_length=10_000), TOKENIZER, seed=0)
    learned = [(part.labels != IGNORE).sum() for part in (split.train, whole.train)]
    assert learned[0] == learned[1]  # parts without a label may go; no label may


def test_parts_of_a_split_row_are_never_on_both_sides(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": f"{i} " * 300} for i in range(10)]
    source = written(tmp_path / "rows.jsonl", rows)
    made = prepare(data(source=source, long_rows="split", validation=0.3), TOKENIZER, seed=0)
    assert len(made.train) > 7
    assert not set(made.train.origins) & set(made.held_out.origins)
    assert len(set(made.held_out.origins)) == 3


def test_a_fraction_is_held_out_the_same_way_each_time(tmp_path: Path) -> None:
    held = data(source=written(tmp_path / "rows.jsonl", numbered(5)), validation=0.4)
    made, again = prepare(held, TOKENIZER, seed=1), prepare(held, TOKENIZER, seed=1)
    assert (len(made.train), len(made.held_out)) == (3, 2)
    assert (made.train.tokens == again.train.tokens).all()
    assert set(made.train.origins) | set(made.held_out.origins) == set(range(5))


def test_what_was_tokenised_is_not_tokenised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "SHARD", 10)
    made: list[int] = []
    process = tokenising.process

    def counting(rows: Any, *others: Any) -> Any:
        made.append(len(rows))
        return process(rows, *others)

    monkeypatch.setattr(tokenising, "process", counting)
    source = written(tmp_path / "rows.jsonl", numbered(25))
    first = prepare(data(source=source), TOKENIZER, seed=0)
    assert made == [10, 10, 5]
    again = prepare(data(source=source), TOKENIZER, seed=0)
    assert made == [10, 10, 5]
    for name in ("tokens", "labels", "starts", "origins"):
        assert (getattr(again.train, name) == getattr(first.train, name)).all()
    assert again.counts == first.counts
    source = written(tmp_path / "rows.jsonl", [*numbered(25), {"instruction": "one", "output": "more"}])
    prepare(data(source=source), TOKENIZER, seed=0)
    assert made[3:] == [6]  # the whole shards are as they were
    for change in ({"processor": Instruct(system="hello")}, {"max_length": 63}, {"long_rows": "drop"}):
        del made[:]
        prepare(data(source=source, **change), TOKENIZER, seed=0)
        assert made == [10, 10, 6]
    del made[:]
    prepare(data(source=source), tokenizer(CHATML.replace("\n{% endfor %}", "\n\n{% endfor %}")), seed=0)
    assert made == [10, 10, 6]


PROCESSOR = """
from finetune import Example

class Mine:
    def __call__(self, row, tokenizer):
        ids = tokenizer(row["instruction"] + "SUFFIX")["input_ids"]
        return Example(ids, list(ids))

config = Mine()
"""


@pytest.mark.slow
def test_a_processor_of_the_config_is_cached_by_its_code_and_works_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plugins.loading import load_config

    monkeypatch.setattr(tokenising, "SHARD", 10)
    source = written(tmp_path / "rows.jsonl", numbered(95))

    def made(suffix: str, processes: int) -> Prepared:
        (tmp_path / "config.py").write_text(PROCESSOR.replace("SUFFIX", suffix))
        processor = load_config(tmp_path / "config.py", object)
        return prepare(data(source=source, processor=processor, processes=processes), TOKENIZER, seed=0)

    alone, changed = made("one", 1), made("two", 2)
    assert TOKENIZER.decode(alone.train[94][0][0]) == "say 94one"
    assert [TOKENIZER.decode(changed.train[i][0][0]) for i in (0, 50, 94)] == ["say 0two", "say 50two", "say 94two"]
    bad = written(tmp_path / "rows.jsonl", [*numbered(95), {"output": "x"}])
    source = bad
    with pytest.raises(UserError, match=r"rows\.jsonl line 96: has no field 'instruction'"):
        made("three", 2)


def test_the_cache_makes_room_for_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenising, "CACHE_BYTES", 5000)
    for count in range(1, 9):
        prepare(data(source=written(tmp_path / "rows.jsonl", numbered(count))), TOKENIZER, seed=0)
    files = list((tmp_path / "cache").rglob("*.npz"))
    assert 1 <= len(files) < 8
    assert sum(file.stat().st_size for file in files) <= 5000
    files[0].write_bytes(b"damaged")
    prepare(data(source=written(tmp_path / "rows.jsonl", numbered(8))), TOKENIZER, seed=0)


# packs


def test_packs_hold_every_row_once_and_are_fuller_than_in_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    packs = pack(lengths, 100, np.arange(500))
    assert sorted(row for one in packs for row in one) == list(range(500))
    sizes = [int(lengths[one].sum()) for one in packs]
    assert max(sizes) <= 100
    assert len(packs) <= 1.02 * lengths.sum() / 100 + 1  # best-fit decreasing leaves next to nothing


def test_packs_are_best_fit_decreasing() -> None:
    packs = pack(np.array([6, 5, 4, 3, 2]), 10, np.arange(5))
    assert sorted(map(sorted, packs)) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"bucketing": True}])
@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)])
def test_a_step_sees_the_same_rows_however_it_is_portioned(
    batch_size: int, accumulate: int, world_size: int, how: dict[str, Any]
) -> None:
    rows = of_lengths(list(np.random.default_rng(1).integers(2, 30, 30)))

    def step(size: int, parts: int, ranks: int, number: int) -> list[int]:
        portions = {"batch_size": size, "accumulate": parts, "world_size": ranks, "seed": 5, "first_step": number}
        streams = [training_steps(rows, data(**how, max_length=32), "flat", rank=r, **portions) for r in range(ranks)]
        return sorted({row for stream in streams for row in seen(next(stream))})

    for number in range(6):
        assert step(batch_size, accumulate, world_size, number) == step(8, 1, 1, number)


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"bucketing": True}])
def test_every_epoch_sees_each_row_once_in_a_new_order(how: dict[str, Any]) -> None:
    rows = of_lengths([30, 20, 10, 25, 5, 30, 20, 10, 25, 5])
    size = 5 if not how.get("packing") else units_an_epoch(rows, data(**how, max_length=32))
    portions = ONE_RANK | {"batch_size": size, "first_step": 0}
    steps = training_steps(rows, data(**how, max_length=32), "flat", **portions)
    epochs = [[seen(next(steps)) for _ in range(1 if how.get("packing") else 2)] for _ in range(2)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(100, 110)) for epoch in epochs) or how.get("bucketing")
    assert epochs[0] != epochs[1] or how.get("packing")


def test_buckets_put_rows_of_like_length_into_a_step() -> None:
    lengths = np.random.default_rng(2).integers(1, 200, 512).tolist()
    waste = {}
    for bucketing in (False, True):
        steps = training_steps(of_lengths(lengths), data(bucketing=bucketing), "padded", first_step=0, **ONE_RANK)
        batches = [batch for _ in range(128) for batch in next(steps).micro_batches]
        waste[bucketing] = 1 - sum(batch.tokens for batch in batches) / sum(
            batch.input_ids.numel() for batch in batches
        )
    assert waste[False] > 0.3
    assert waste[True] < 0.1


def test_a_padded_batch_masks_its_padding_and_a_flat_one_has_none() -> None:
    rows = of_lengths([2, 5])
    padded = collate([rows[0], rows[1]], "padded")
    assert padded.attention_mask is not None
    assert padded.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert padded.labels[0].tolist() == [IGNORE, 100, IGNORE, IGNORE, IGNORE]
    flat = collate([rows[0], rows[1]], "flat")
    assert flat.position_ids is not None
    assert flat.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4]]
    assert flat.labels.tolist() == [[IGNORE, 100, IGNORE, 101, 101, 101, 101]]  # nothing predicts a document's first
    assert flat.documents is not None
    assert flat.documents.bounds == (0, 2, 7)
    assert padded.tokens == flat.tokens == 7


def test_pairs_stay_together() -> None:
    pairs = Examples.of(
        Pair(Example([100 + i] * 3, [100 + i] * 3), Example([200 + i] * 4, [200 + i] * 4)) for i in range(6)
    )
    assert len(pairs) == 6
    for layout in ("flat", "padded"):
        step = next(training_steps(pairs, data(), layout, first_step=0, **(ONE_RANK | {"batch_size": 2})))
        batch = step.micro_batches[0]
        owner_of = {int(t): int(o) for t, o in zip(batch.input_ids.flatten(), batch.owners.flatten(), strict=True) if t}
        chosen = [token for token in owner_of if token < 200]
        assert len(owner_of) == 4
        assert all(owner_of[token + 100] == owner_of[token] + 1 for token in chosen)
        assert all(owner_of[token] % 2 == 0 for token in chosen)


# streams


def streaming(tmp_path: Path, count: int, **changes: Any) -> Data:
    rows = [{"token": 100 + i, "length": 3 + i % 20} for i in range(count)]
    source = written(tmp_path / "stream.jsonl", rows)
    return data(source=source, processor=Lengths(), streaming=True, max_length=32, **changes)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.STREAMED", 7)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_at_the_exact_row(tmp_path: Path, packing: bool) -> None:
    how = streaming(tmp_path, 40, packing=packing)
    for rank in range(2):
        portions = ONE_RANK | {"batch_size": 2, "accumulate": 2, "rank": rank, "world_size": 2}
        whole = streamed_steps(how, TOKENIZER, "flat", **portions)
        steps = [next(whole) for _ in range(14)]
        assert steps[-1].epoch >= 1
        for at in (1, 4, 9):
            position = json.loads(json.dumps(steps[at - 1].position))  # as a checkpoint holds it
            resumed = streamed_steps(how, TOKENIZER, "flat", **portions, position=tuple(position))
            for expected in steps[at:]:
                found = next(resumed)
                assert [b.input_ids.tolist() for b in found.micro_batches] == [
                    b.input_ids.tolist() for b in expected.micro_batches
                ]


@pytest.mark.usefixtures("_small_blocks")
def test_a_stream_gives_each_row_to_one_rank_once_an_epoch(tmp_path: Path) -> None:
    how = streaming(tmp_path, 40)
    ranks = [
        streamed_steps(how, TOKENIZER, "flat", **(ONE_RANK | {"batch_size": 1, "rank": rank, "world_size": 2}))
        for rank in range(2)
    ]
    rows = [seen(next(steps))[0] for steps in ranks for _ in range(20)]
    assert sorted(rows) == list(range(100, 140))
    assert rows[:20] != sorted(rows[:20])  # shuffled


def test_a_stream_is_looked_at_before_the_run_and_never_read_whole(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Endless:
        """A source without end."""

        def read(self) -> Iterator[tuple[str, Row]]:
            while True:
                yield "here", {"token": 100, "length": 3}

    endless = data(source=Endless(), processor=Lengths(), streaming=True)
    assert len(prepare(endless, TOKENIZER, seed=0).train) == 0
    assert seen(next(streamed_steps(endless, TOKENIZER, "flat", **ONE_RANK))) == [100]
    with pytest.raises(UserError, match="has no field 'token'"):
        prepare(replace(endless, source=written(tmp_path / "rows.jsonl", numbered(3))), TOKENIZER, seed=0)
    few = streamed_steps(streaming(tmp_path, 1), TOKENIZER, "flat", **(ONE_RANK | {"rank": 1, "world_size": 2}))
    with pytest.raises(UserError, match="worker 1 of 2 finds no row"):
        next(few)


@pytest.mark.parametrize("count", [1, 4, 7, 8, 9])
def test_evaluation_sees_each_row_once_and_all_ranks_go_equally_far(count: int) -> None:
    rows = of_lengths(list(range(2, count + 2)))
    shares = [list(evaluation_batches(rows, "flat", batch_size=2, rank=r, world_size=2)) for r in range(2)]
    assert len(shares[0]) == len(shares[1])
    found = [
        int(batch.input_ids[batch.owners == owner][0])
        for share in shares
        for batch in share
        for owner in batch.owners.unique()
        if (batch.labels[batch.owners == owner] != IGNORE).any()
    ]
    assert sorted(found) == list(range(100, 100 + count))


def shown(config: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["data", str(config), *arguments]) == 0
    return capsys.readouterr().out


def test_the_preview_shows_what_the_model_will_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "base")
    written(tmp_path / "rows.jsonl", [*numbered(40), {"instruction": "long " * 100, "output": "end"}])
    (tmp_path / "config.py").write_text(
        "from finetune import *\n"
        f"config = FinetuneConfig(name='x', model=ModelSource({str(tmp_path / 'base')!r}),\n"
        f"    data=Data(source=Jsonl({str(tmp_path / 'rows.jsonl')!r}), processor=Instruct(), validation=0.25,\n"
        "    max_length=128, packing=True), train=Train(batch_size=2))\n"
    )
    text = shown(tmp_path / "config.py", "--rows", "1", capsys=capsys)
    assert "30 rows to learn from, 10 held out" in text
    assert "1 of 41 rows cut, being longer than 128 tokens; 1 of 41 rows left out, with nothing to learn" in text
    assert re.search(r"packs of 128: \d+, \d\d\.\d% full", text)
    assert re.search(r"<\|im_start\|>assistant\n\[\[(fox )*\d+<\|im_end\|>\]\]", text)
    assert text.count("[[") == 1
    stream = shown(
        tmp_path / "config.py", "data.streaming=true", "data.validation=0", "train.max_steps=3", capsys=capsys
    )
    assert "40 rows to learn from among the first 41 of the stream" in stream
