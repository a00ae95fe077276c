"""Where rows come from (sources) and how a row becomes tokens and labels (processors).

Both are plain objects in a config. A source has `read()`, which yields (place, row); the place, such as
"rows.jsonl line 3", is what errors name. A processor is anything that is called with (row, tokenizer) and returns an
Example (a Pair, for an objective that prefers one answer to another), or None to leave the row out; a missing field may
simply raise KeyError.
"""

from typing import Protocol, runtime_checkable

from jinja2 import TemplateError

from plugins.data.chat import Chat
from plugins.data.completion import Completion
from plugins.data.instruct import Instruct
from plugins.data.mixture import Mixture
from plugins.data.preference import Preference
from plugins.data.sources import Csv, Hub, Json, Jsonl, Parquet, Source
from plugins.spec import UserError
from plugins.template import Tokenizer
from plugins.types import Example, Pair, Row


@runtime_checkable
class DataProcessor(Protocol):
    def __call__(self, row: Row, tokenizer: Tokenizer) -> Example | Pair | None:
        """The row's tokens and labels, or None to leave it out. Raises UserError or KeyError for a row that is wrong."""
        ...


def processed(place: str, row: Row, processor: DataProcessor, tokenizer: Tokenizer) -> Example | Pair | None:
    """What `processor` makes of a row. Raises UserError, naming `place`, for a row that is wrong."""
    try:
        return processor(row, tokenizer)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except TemplateError as error:
        raise UserError(f"{place}: the chat template refuses it: {error}") from error
    except KeyError as error:
        field = error.args[0]
        if field in row:  # not a missing field but a mistake inside the processor
            raise
        raise UserError(f"{place}: has no field {field!r} (fields: {', '.join(map(str, row))})") from error


__all__ = [
    "Chat", "Completion", "Csv", "DataProcessor", "Hub", "Instruct", "Json", "Jsonl", "Mixture", "Parquet", "Preference",
    "Source", "processed",
]  # fmt: skip
