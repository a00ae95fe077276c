"""Conversations, with the loss on what the assistant says."""

from collections.abc import Sequence
from typing import Literal

from plugins.spec import UserError, spec
from plugins.template import Tokenizer, conversation_text, end_of_turn
from plugins.types import IGNORE, Example, Message, Row


@spec
class Chat:
    """A row's list of {"role", "content"} messages, through the tokenizer's chat template.

    The loss is on every turn of the assistant ("turns") or on the last one ("last"), each with the token that ends it.
    """

    messages: str = "messages"
    loss: Literal["turns", "last"] = "turns"

    def __call__(self, row: Row, tokenizer: Tokenizer) -> Example | None:
        return conversation(_messages(row[self.messages], self.messages), tokenizer, loss=self.loss)


def _messages(found: object, field: str) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise UserError(f"field {field!r} must be a list of messages")
    for message in found:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"field {field!r}: each message needs 'role' and 'content', found {message!r}")
        if not isinstance(message["content"], str):
            raise UserError(f"field {field!r}: 'content' must be text, found {message['content']!r}")
    return [Message(message["role"], message["content"]) for message in found]


def conversation(messages: Sequence[Message], tokenizer: Tokenizer, *, loss: Literal["turns", "last"]) -> Example:
    """The tokens of a conversation, with labels on the assistant's words and on the token that ends its turn.

    The text is tokenised whole and a token belongs to a turn by its characters: pieces tokenised apart may come out
    differently from what the model sees when it is served. Raises UserError where the assistant says nothing.
    """
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise UserError("the conversation has no turn of the assistant to learn from")
    text = conversation_text(tokenizer, messages)
    spans = [_span(messages, index, text, tokenizer) for index in (turns if loss == "turns" else turns[-1:])]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    end = end_of_turn(tokenizer)
    labels = [IGNORE] * len(ids)
    for span in spans:
        _label(span, ids, offsets, labels, end)
    if end is None:  # the template closes turns in plain text: eos is what can be learned as the end
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token, and its chat template ends a turn with none")
        while ids and labels[-1] == IGNORE:  # what the template writes after the last answer
            ids.pop(), labels.pop()
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return Example(ids, labels)


def _span(messages: Sequence[Message], index: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """Where in `text` the turn `index` stands: from after the opening of the turn to the end of all that closes it."""
    before = conversation_text(tokenizer, messages[:index], ask=True)
    through = text if index == len(messages) - 1 else conversation_text(tokenizer, messages[: index + 1])
    if not text.startswith(before) or not text.startswith(through):
        # Some templates rewrite earlier turns (they drop the reasoning of all but the last); then only "last" is exact.
        if index < len(messages) - 1:
            raise UserError("the chat template rewrites earlier turns: use loss='last'")
        raise UserError(
            "the chat template opens an answer otherwise than it writes one, so no answer can be learned with it"
        )
    return len(before), len(through)


def _label(
    span: tuple[int, int], ids: list[int], offsets: Sequence[tuple[int, int]], labels: list[int], end: int | None
) -> None:
    """Put labels on the tokens of `span`, up to and including the token that ends the turn."""
    for position, (start, stop) in enumerate(offsets):
        if span[0] <= start < span[1] and stop > start:
            labels[position] = ids[position]
            if ids[position] == end:
                return
