"""Pairs of answers, one of which is to be preferred."""

from plugins.data.chat import conversation
from plugins.data.messages import messages_of
from plugins.spec import UserError, spec
from plugins.template import Tokenizer
from plugins.types import Message, Pair, Row


@spec
class Preference:
    """The names of a row's fields: a prompt and two answers to it. The labels are on the last answer of each.

    The prompt is text, which is a turn of the user, or a list of messages. Answers are texts, or lists of messages: what
    follows the prompt, or whole conversations that begin with it. Whole conversations need no prompt; None as `prompt`
    leaves it out. `system` is a system message for conversations that have none of their own.

    Rows whose answers are the same, or of which one is empty, are left out.
    """

    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None

    def __call__(self, row: Row, tokenizer: Tokenizer) -> Pair | None:
        chosen, rejected = self._conversation(row, self.chosen), self._conversation(row, self.rejected)
        if chosen == rejected or Message("assistant", "") in (chosen[-1], rejected[-1]):
            return None
        return Pair(conversation(chosen, tokenizer, loss="last"), conversation(rejected, tokenizer, loss="last"))

    def _conversation(self, row: Row, field: str) -> list[Message]:
        messages = _turns(row[field], field, "assistant")
        prompt = []
        if self.prompt is not None and (isinstance(row[field], str) or row.get(self.prompt)):
            prompt = _turns(row[self.prompt], self.prompt, "user")
        if not prompt and messages[0].role == "assistant":
            raise UserError(
                f"field {field!r} begins with an answer, and there is no prompt: Preference.prompt names it"
            )
        if not _same(messages[: len(prompt)], prompt):
            if messages[0].role != "assistant":
                raise UserError(
                    f"field {field!r} begins neither with the prompt nor with an answer; "
                    "where it is a whole conversation, set Preference.prompt=None"
                )
            messages = prompt + messages
        if messages[-1].role != "assistant":
            raise UserError(f"field {field!r} must end with an answer of the assistant")
        if self.system is not None and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        return messages


def _turns(found: object, field: str, role: str) -> list[Message]:
    if isinstance(found, str):
        return [Message(role, found)]
    if not isinstance(found, list):
        raise UserError(f"field {field!r} must be text or a list of messages, found {found!r}")
    return messages_of(found, field)


def _same(some: list[Message], others: list[Message]) -> bool:
    return [(one.role, one.content) for one in some] == [(one.role, one.content) for one in others]
