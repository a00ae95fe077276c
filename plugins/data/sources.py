"""Rows from files and from the Hugging Face hub.

The `path` of a source of files is a file, a directory (all files below it that have the source's suffix) or a glob
such as "data/part-*.jsonl", where ** is any depth. Several files are read one after another, in the order of their names.
"""

import csv
import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

from plugins.spec import NOT_EMPTY, UserError, short_spec
from plugins.types import Row


@runtime_checkable
class Source(Protocol):
    def read(self) -> Iterator[tuple[str, Row]]:
        """Every row in order with its place. Raises UserError for a file that is missing, empty or not readable."""
        ...


@short_spec
class Jsonl:
    """A JSON object a line; *.jsonl, or *.jsonl.gz, which is unpacked as it is read. Blank lines are passed over."""

    path: Annotated[str, NOT_EMPTY]

    def read(self) -> Iterator[tuple[str, Row]]:
        for file in _files(self.path, ".jsonl", ".jsonl.gz"):
            for number, raw in enumerate(_lines(file), 1):
                place = f"{file} line {number}"
                line = _text(raw, place)
                if not line.strip():
                    continue
                hint = "; Json reads a file that is one array" if line.lstrip().startswith("[") else ""
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno}){hint}") from error
                if not isinstance(row, dict):
                    raise UserError(f"{place}: a JSON object is needed, found {type(row).__name__}{hint}")
                yield place, row


@short_spec
class Json:
    """*.json: one array of objects, or an object of which exactly one field is such an array.

    A file is read whole before its first row: large ones are better kept as Jsonl or Parquet.
    """

    path: Annotated[str, NOT_EMPTY]

    def read(self) -> Iterator[tuple[str, Row]]:
        for file in _files(self.path, ".json"):
            try:
                found = json.loads(_text(file.read_bytes(), str(file)))
            except json.JSONDecodeError as error:
                hint = "; Jsonl reads a file of an object a line" if error.msg == "Extra data" else ""
                wrong = f"{error.msg} at column {error.colno}"
                raise UserError(f"{file} line {error.lineno}: not JSON ({wrong}){hint}") from error
            for number, row in enumerate(_array(found, file), 1):
                if not isinstance(row, dict):
                    raise UserError(f"{file} item {number}: a JSON object is needed, found {type(row).__name__}")
                yield f"{file} item {number}", row


@short_spec
class Csv:
    """*.csv: comma-separated values with the field names in the first line; every value is text."""

    path: Annotated[str, NOT_EMPTY]

    def read(self) -> Iterator[tuple[str, Row]]:
        for path in _files(self.path, ".csv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                for row in _readable(reader, path):
                    place = f"{path} line {reader.line_num}"
                    if None in row or None in row.values():
                        raise UserError(
                            f"{place}: has not the {len(reader.fieldnames or [])} columns of the first line"
                        )
                    yield place, row


@short_spec
class Parquet:
    """*.parquet, read a portion of its rows at a time."""

    path: Annotated[str, NOT_EMPTY]

    def read(self) -> Iterator[tuple[str, Row]]:
        import pyarrow
        import pyarrow.parquet

        for path in _files(self.path, ".parquet"):
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
                    for number, row in enumerate(rows, 1):
                        yield f"{path} row {number}", row
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path} is not a parquet file: {_one_line(error)}") from error


@short_spec
class Hub:
    """A data set of the Hugging Face hub, by its name there, or a directory or file that `datasets.load_dataset` reads.

    `subset` is what the hub calls a subset or a configuration: "main", say. `streaming`: rows come one by one while they
    are read, and nothing is downloaded beyond them.
    """

    name: Annotated[str, NOT_EMPTY]
    split: str = "train"
    revision: str | None = None
    subset: str | None = None
    streaming: bool = False

    def read(self) -> Iterator[tuple[str, Row]]:
        import datasets

        here = Path(self.name).expanduser()
        # load_dataset knows a file only as a part of a directory.
        name, files = (here.parent, here.name) if here.is_file() else (here if here.exists() else self.name, None)
        try:
            rows = datasets.load_dataset(
                str(name),
                self.subset,
                data_files=files,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
            for number, row in enumerate(rows, 1):
                yield f"{self.name} {self.split} row {number}", row
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = _one_line(error.__cause__ or error)
            raise UserError(f"data set {self.name!r}, split {self.split!r}, cannot be loaded: {reason}") from error


def _files(path: str, *suffixes: str) -> list[Path]:
    """The files that `path` names, sorted. Raises UserError where there is none, or one that is empty."""
    where = Path(path).expanduser()
    looked = "" if where.is_absolute() else f" (looked in {Path.cwd()})"
    ends: tuple[str, ...] = ("",)
    if where.is_dir():
        pattern, ends = f"{glob.escape(str(where))}/**", suffixes
        missing = f"no {' or '.join(f'*{suffix}' for suffix in suffixes)} file in {path}"
    elif where.exists() or not glob.has_magic(path):
        pattern, missing = glob.escape(str(where)), f"no file at {path}{looked}"
    else:
        pattern, missing = str(where), f"no file matches {path}{looked}"
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # Path.glob would take hidden files too
    files = [file for file in map(Path, found) if file.is_file() and file.name.endswith(ends)]
    if not files:
        raise UserError(missing)
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
    return files


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole gzip file ({error})") from error


def _text(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1})") from error


def _array(found: object, file: Path) -> list[object]:
    """The array of a JSON file: the file itself, or the only field of it that is an array of objects."""
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        raise UserError(f"{file}: one array of objects is needed, found {type(found).__name__}")
    arrays = {
        name: value
        for name, value in found.items()
        if isinstance(value, list) and all(isinstance(member, dict) for member in value)
    }
    if len(arrays) != 1:
        many = f"{len(arrays)} ({', '.join(arrays)})" if arrays else f"none (fields: {', '.join(found)})"
        raise UserError(f"{file}: one array of objects is needed, found {many}")
    [array] = arrays.values()
    return array


def _readable(reader: "csv.DictReader[str]", path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} line {reader.line_num + 1}: not CSV in UTF-8 ({error})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
