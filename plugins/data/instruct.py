"""Instruction rows: an instruction, perhaps an input, and the answer to learn."""

from plugins.data.chat import conversation
from plugins.spec import UserError, spec
from plugins.template import Tokenizer
from plugins.types import Example, Message, Row


@spec
class Instruct:
    """The names of a row's fields. The user's turn is the instruction and, after a blank line, the input if it has any.

    Rows with an empty answer are left out.

    `input` None: rows have no such field. `system` is a fixed system message for every row.
    """

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"
    system: str | None = None

    def __call__(self, row: Row, tokenizer: Tokenizer) -> Example | None:
        question, answer = _text(row, self.instruction), _text(row, self.output)
        if not answer:
            return None
        if self.input is not None and row.get(self.input):
            question += "\n\n" + _text(row, self.input)
        messages = [Message("user", question), Message("assistant", answer)]
        if self.system is not None:
            messages.insert(0, Message("system", self.system))
        return conversation(messages, tokenizer, loss="last")


def _text(row: Row, field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"field {field!r} must be text, found {value!r}")
    return value
