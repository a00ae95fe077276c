"""Rows from files and from the Hugging Face hub."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from plugins.spec import NOT_EMPTY, UserError, short_spec
from plugins.types import Row


@short_spec
class Jsonl:
    """A JSON object a line. Blank lines are passed over."""

    path: Annotated[str, NOT_EMPTY]

    def read(self) -> Iterator[tuple[str, Row]]:
        with _existing(self.path).open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                line = _text(raw, f"{self.path} line {number}")
                if not line.strip():
                    continue
                place = f"{self.path} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
                if not isinstance(row, dict):
                    raise UserError(f"{place}: a JSON object is needed, found {type(row).__name__}")
                yield place, row


@short_spec
class Csv:
    """Comma-separated values with the field names in the first line; every value is text."""

    path: Annotated[str, NOT_EMPTY]

    def read(self) -> Iterator[tuple[str, Row]]:
        with _existing(self.path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in _readable(reader, self.path):
                place = f"{self.path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{place}: has not the {len(reader.fieldnames or [])} columns of the first line")
                yield place, row


@short_spec
class Parquet:
    path: Annotated[str, NOT_EMPTY]

    def read(self) -> Iterator[tuple[str, Row]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(_existing(self.path)) as file:
                rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield f"{self.path} row {number}", row
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{self.path} is not a parquet file: {error}") from error


@short_spec
class Hub:
    """A data set of the Hugging Face hub, by its name there, or a directory that `datasets.load_dataset` reads."""

    name: Annotated[str, NOT_EMPTY]
    split: str = "train"
    revision: str | None = None

    def read(self) -> Iterator[tuple[str, Row]]:
        import datasets

        try:
            rows = datasets.load_dataset(self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"data set {self.name!r}, split {self.split!r}, cannot be loaded: {reason}") from error
        for number, row in enumerate(rows, 1):
            yield f"{self.name} {self.split} row {number}", row


def _text(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1})") from error


def _readable(reader: "csv.DictReader[str]", path: str) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} line {reader.line_num + 1}: not CSV in UTF-8 ({error})") from error


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{path} is a directory; a file is needed")
    if not file.exists():
        raise UserError(f"no file at {path}" + (f" (looked in {Path.cwd()})" if not file.is_absolute() else ""))
    if file.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return file
