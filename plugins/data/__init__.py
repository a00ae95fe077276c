"""Where rows come from (sources) and how a row becomes tokens and labels (processors).

Both are plain objects in a config. A source has `read()`, which yields (place, row); the place, such as
"rows.jsonl line 3", is what errors name. A processor is anything that is called with (row, tokenizer) and returns an
Example, or None to leave the row out; a missing field may simply raise KeyError.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from plugins.data.chat import Chat
from plugins.data.completion import Completion
from plugins.data.instruct import Instruct
from plugins.data.sources import Csv, Hub, Jsonl, Parquet
from plugins.template import Tokenizer
from plugins.types import Example, Row


@runtime_checkable
class Source(Protocol):
    def read(self) -> Iterator[tuple[str, Row]]:
        """Every row in order with its place. Raises UserError for a file that is missing, empty or not readable."""
        ...


@runtime_checkable
class DataProcessor(Protocol):
    def __call__(self, row: Row, tokenizer: Tokenizer) -> Example | None:
        """The row's tokens and labels, or None to leave it out. Raises UserError or KeyError for a row that is wrong."""
        ...


__all__ = ["Chat", "Completion", "Csv", "DataProcessor", "Hub", "Instruct", "Jsonl", "Parquet", "Source"]
