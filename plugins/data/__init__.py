"""Where rows come from (sources) and how a row becomes tokens and labels (processors).

Both are plain objects in a config. A source has `read()`, which yields (place, row); the place, such as
"rows.jsonl line 3", is what errors name. A processor is anything that is called with (row, tokenizer) and returns an
Example (a Pair, for an objective that prefers one answer to another), or None to leave the row out; a missing field may
simply raise KeyError.
"""

from typing import Protocol, runtime_checkable

from plugins.data.chat import Chat
from plugins.data.completion import Completion
from plugins.data.instruct import Instruct
from plugins.data.mixture import Mixture
from plugins.data.preference import Preference
from plugins.data.sources import Csv, Hub, Json, Jsonl, Parquet, Source
from plugins.template import Tokenizer
from plugins.types import Example, Pair, Row


@runtime_checkable
class DataProcessor(Protocol):
    def __call__(self, row: Row, tokenizer: Tokenizer) -> Example | Pair | None:
        """The row's tokens and labels, or None to leave it out. Raises UserError or KeyError for a row that is wrong."""
        ...


__all__ = [
    "Chat", "Completion", "Csv", "DataProcessor", "Hub", "Instruct", "Json", "Jsonl", "Mixture", "Parquet", "Preference",
    "Source",
]  # fmt: skip
