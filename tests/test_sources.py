"""Where rows come from: files, directories, globs, the hub's formats, and mixtures of them."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune import Csv, Data, Hub, Instruct, Json, Jsonl, Mixture, Parquet
from plugins.data import Source
from plugins.spec import UserError, override

ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(5)]
KINDS = {"jsonl": Jsonl, "jsonl.gz": Jsonl, "json": Json, "csv": Csv, "parquet": Parquet}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        case ".gz":
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        case ".json":
            path.write_text(json.dumps(rows, indent=2))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
    return path


def rows_of(source: Source) -> list[dict[str, Any]]:
    return [dict(row) for _, row in source.read()]


@pytest.mark.parametrize("suffix", KINDS)
def test_a_directory_is_all_its_files_in_order(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"b.{suffix}", ROWS[2:3])
    write(tmp_path / "deep" / "er" / f"c.{suffix}", ROWS[3:])
    first = write(tmp_path / f"a.{suffix}", ROWS[:2])
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / f"a.{suffix}", ROWS[:2])
    source = KINDS[suffix](str(tmp_path))
    assert rows_of(source) == ROWS
    places = [place for place, _ in source.read()]
    assert len(set(places)) == len(ROWS)
    assert places[0].startswith(f"{first} ")


@pytest.mark.parametrize("suffix", KINDS)
def test_a_glob_takes_what_matches_in_order(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("data") / f"part-1.{suffix}", ROWS[2:])
    write(Path("data") / f"part-0.{suffix}", ROWS[:2])
    write(Path("data") / f"other.{suffix}", ROWS)
    assert rows_of(KINDS[suffix](f"data/part-*.{suffix}")) == ROWS
    assert rows_of(KINDS[suffix](f"**/part-*.{suffix}")) == ROWS
    assert [place for place, _ in KINDS[suffix]("data/part-*").read()][2].startswith(f"data/part-1.{suffix} ")


def test_home_and_names_with_brackets_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows [v1].jsonl", ROWS)
    assert rows_of(Jsonl("~/rows [v1].jsonl")) == ROWS
    assert rows_of(Jsonl("~/*.jsonl")) == ROWS
    assert rows_of(Jsonl("~")) == ROWS


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Jsonl("data/part-*.jsonl"), r"no file matches data/part-\*\.jsonl \(looked in .+\)"),
        (lambda: Jsonl("folder"), r"no \*\.jsonl or \*\.jsonl\.gz file in folder"),
        (lambda: Json("folder"), r"no \*\.json file in folder"),
        (lambda: Csv("folder/*.csv"), r"no file matches folder/\*\.csv \(looked in .+\)"),
        (lambda: Parquet("gone.parquet"), r"no file at gone\.parquet \(looked in .+\)"),
        (lambda: Json("empty.json"), r"empty\.json is empty"),
        (lambda: Csv("empty.*"), r"empty\.json is empty"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    make: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("nothing")
    (tmp_path / "empty.json").touch()
    with pytest.raises(UserError, match=f"^{said}$"):
        list(make().read())


def test_the_place_of_a_mistake_is_the_file_and_the_line_among_many(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text('{"instruction": "a"}\n{oops}')
    with pytest.raises(UserError, match=rf"^{tmp_path}/b\.jsonl line 2: not JSON"):
        list(Jsonl(str(tmp_path)).read())


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps({"version": "1.0", "tags": ["a", "b"], "data": ROWS}),
        "\ufeff" + json.dumps(ROWS, indent=4),
    ],
)
def test_json_is_an_array_or_the_one_in_an_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    found = list(Json(str(tmp_path / "rows.json")).read())
    assert [row for _, row in found] == ROWS
    assert found[4][0] == f"{tmp_path / 'rows.json'} item 5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"a": 1},\n{"a": }]', r"rows\.json line 3: not JSON \(Expecting value at column 7\)"),
        ('{"a": 1}\n{"a": 2}', r"rows\.json line 2: not JSON .*Jsonl reads"),
        ('[{"a": 1}, 2]', r"rows\.json item 2: a JSON object is needed, found int"),
        ('{"train": [{}], "test": [{}]}', r"one array of objects is needed, found 2 \(train, test\)"),
        ('{"a": "b"}', r"one array of objects is needed, found none"),
        ('"text"', r"one array of objects is needed, found str"),
    ],
)
def test_json_that_is_no_rows_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=said):
        list(Json(str(tmp_path / "rows.json")).read())


def test_a_json_array_given_to_jsonl_is_told_of_json(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS, indent=2))
    with pytest.raises(UserError, match=r"line 1: not JSON .*; Json reads a file that is one array$"):
        list(Jsonl(str(tmp_path / "rows.jsonl")).read())


@pytest.mark.parametrize("damage", [lambda whole: whole[:-12], lambda whole: b"this is no gzip"])
def test_a_damaged_gzip_file_is_one_line(damage: Any, tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(map(json.dumps, ROWS * 100)).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(damage(whole))
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: not a whole gzip file"):
        list(Jsonl(str(tmp_path / "rows.jsonl.gz")).read())


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("no_cache")
def test_hub_reads_a_local_directory_or_file(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set" / "train.jsonl", ROWS)
    write(tmp_path / "set" / "test.jsonl", ROWS[:2])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_of(Hub(str(tmp_path / "set"), streaming=streaming)) == ROWS
    assert rows_of(Hub("~/set", "test", streaming=streaming)) == ROWS[:2]
    assert rows_of(Hub(str(tmp_path / "set" / "test.jsonl"), streaming=streaming)) == ROWS[:2]
    assert next(Hub("~/set", streaming=streaming).read())[0] == "~/set train row 1"


@pytest.mark.usefixtures("no_cache")
def test_hub_takes_the_subset_that_is_named(tmp_path: Path) -> None:
    write(tmp_path / "one" / "train.jsonl", ROWS[:2])
    write(tmp_path / "two" / "train.jsonl", ROWS[2:])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*\n- config_name: two\n  data_files: two/*\n---\n"
    )
    assert rows_of(Hub(str(tmp_path), subset="two")) == ROWS[2:]
    with pytest.raises(UserError, match=r"cannot be loaded: .*'one'"):
        list(Hub(str(tmp_path)).read())


@pytest.mark.usefixtures("no_cache")
def test_streaming_reads_no_further_than_it_is_asked(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train-0.jsonl", ROWS)
    (tmp_path / "set" / "train-1.jsonl").write_text("{oops\n")
    source = Hub(str(tmp_path / "set"), streaming=True)
    assert [dict(row) for _, row in islice(source.read(), 5)] == ROWS
    with pytest.raises(UserError, match="cannot be loaded: JSON parse error"):
        list(source.read())
    with pytest.raises(UserError, match="cannot be loaded: JSON parse error"):
        list(replace(source, streaming=False).read())


@dataclass(frozen=True)
class Letters:
    """Rows of a source of one's own; `most` is how many may be read."""

    letter: str
    count: int
    most: int = 1000

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        for number in range(self.count):
            assert number < self.most, "read further than needed"
            yield f"{self.letter} row {number}", {"text": f"{self.letter}{number}"}


def texts(source: Source) -> list[str]:
    return [row["text"] for _, row in source.read()]


def test_a_mixture_draws_by_weight_and_the_same_each_time() -> None:
    mixture = Mixture(sources=(Letters("a", 1000), Letters("b", 1000), Letters("c", 1000)), weights=(5, 3, 2))
    drawn = texts(mixture)
    shares = Counter(text[0] for text in drawn[:1000])
    assert [round(shares[letter] / 1000, 1) for letter in "abc"] == [0.5, 0.3, 0.2]
    assert drawn == texts(mixture)
    assert drawn != texts(replace(mixture, seed=1))
    of_a = [text for text in drawn if text[0] == "a"]
    assert of_a == texts(Letters("a", len(of_a)))


def test_first_ends_with_the_first_source_that_ends_and_repeats_no_row() -> None:
    drawn = texts(Mixture(sources=(Letters("a", 1000), Letters("b", 10)), weights=(1, 1)))
    assert drawn[-1] == "b9"
    assert len(set(drawn)) == len(drawn) < 40


def test_all_ends_when_each_source_was_read_to_its_end_and_shorter_ones_begin_again() -> None:
    drawn = texts(Mixture(sources=(Letters("a", 100), Letters("b", 7)), weights=(1, 1), stop="all"))
    assert drawn[-1] == "a99"
    times = Counter(drawn)
    assert {times[f"a{i}"] for i in range(100)} == {1}
    assert len(times) == 107
    assert {times[f"b{i}"] // 10 for i in range(7)} == {1}  # about 100 draws of 7 rows, each again in turn


def test_a_mixture_reads_its_sources_only_as_far_as_it_is_read() -> None:
    mixture = Mixture(sources=(Letters("a", 1000, most=12), Letters("b", 1000, most=12)), weights=(1, 1))
    assert len(list(islice(mixture.read(), 10))) == 10


def test_a_mixture_of_files_names_their_places_and_takes_overrides(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.csv", ROWS)
    data = Data(
        source=Mixture(sources=(Jsonl(str(tmp_path / "a.jsonl")), Csv("gone.csv")), weights=(0.7, 0.3), stop="all"),
        processor=Instruct(),
    )
    with pytest.raises(UserError, match=r"no file at gone\.csv"):
        next(iter(data.source.read()))
    data = override(data, f"source.sources.1.path={tmp_path}/b.csv", "source.weights=1,2")
    assert {place.split(" ")[0] for place, _ in data.source.read()} == {f"{tmp_path}/a.jsonl", f"{tmp_path}/b.csv"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weights": (1, 2, 3)}, "Mixture.weights: 3 weights for 2 sources"),
        ({"weights": (1, 0)}, r"Mixture\.weights = \(1\.0, 0\.0\): each must be above 0"),
        ({"sources": (Letters("a", 1),), "weights": (1,)}, "Mixture.sources: a mixture is of two or more"),
        ({"sources": (Letters("a", 1), "rows.jsonl")}, r"Mixture\.sources = .*must be a tuple of Source"),
        ({"stop": "last"}, "Mixture.stop = 'last': must be 'first' or 'all'"),
    ],
)
def test_a_wrong_mixture_is_one_line(fields: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {"sources": (Letters("a", 1), Letters("b", 1)), "weights": (1, 1)}
    with pytest.raises(UserError, match=said):
        Mixture(**(right | fields))


@pytest.mark.parametrize("stop", ["first", "all"])
def test_a_source_without_rows_cannot_be_mixed(stop: Any) -> None:
    mixture = Mixture(sources=(Letters("a", 3), Letters("b", 0)), weights=(1, 1), stop=stop)
    with pytest.raises(UserError, match=r"Mixture\.sources\.1: Letters\(.*\) has no rows"):
        list(mixture.read())
