"""Conversations, with the loss on what the assistant says."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from plugins.data.messages import messages_of, tools_of
from plugins.spec import UserError, spec
from plugins.template import Tokenizer, conversation_text, end_of_turn
from plugins.types import IGNORE, Example, Message, Row

Loss = Literal["turns", "last", "all"]


@spec
class Chat:
    """A row's list of messages, through the tokenizer's chat template.

    A message is {"role", "content"}, perhaps with OpenAI's "tool_calls"; `role` and `content` name these fields where
    rows call them otherwise: ShareGPT's rows are Chat(messages="conversations", role="from", content="value"). `tools`
    is the field with the schemas of tools, a list or JSON of one, for rows that have it.

    The loss is on every answer of the assistant ("turns") or on the last one ("last"), calls of tools and the token that
    ends the turn included; or on every token of the conversation ("all").
    """

    messages: str = "messages"
    loss: Loss = "turns"
    role: str = "role"
    content: str = "content"
    tools: str | None = "tools"

    def __call__(self, row: Row, tokenizer: Tokenizer) -> Example | None:
        messages = messages_of(row[self.messages], self.messages, role=self.role, content=self.content)
        tools = [] if self.tools is None else tools_of(row.get(self.tools), self.tools)
        return conversation(messages, tokenizer, loss=self.loss, tools=tools)


def conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, *, loss: Loss, tools: Sequence[Mapping[str, Any]] = ()
) -> Example:
    """The tokens of a conversation, with labels on the assistant's words and on the token that ends its turn.

    The text is tokenised whole and a token belongs to a turn by its characters: pieces tokenised apart may come out
    differently from what the model sees when it is served. What the assistant says before anybody else is no answer, and
    has no labels. Raises UserError where there is no answer, or where the template leaves out a tool or a call.
    """
    write = partial(conversation_text, tokenizer, tools=tools)
    text = write(messages)
    if lost := next((name for tool in tools if (name := tool["function"]["name"]) not in text), None):
        raise UserError(
            f"the chat template does not write the row's tools: {lost!r} is not in its text; "
            "choose a model whose template does, or Chat.tools=None"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    end = end_of_turn(tokenizer)
    labels = list(ids) if loss == "all" else [IGNORE] * len(ids)
    for span in [] if loss == "all" else _answers(messages, loss, text, write):
        _label(span, ids, offsets, labels, end)
    if end is None:  # the template closes turns in plain text: eos is what can be learned as the end
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token, and its chat template ends a turn with none")
        while ids and labels[-1] == IGNORE:  # what the template writes after the last answer
            ids.pop(), labels.pop()
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return Example(ids, labels)


def _answers(messages: Sequence[Message], loss: Loss, text: str, write: Callable[..., str]) -> list[tuple[int, int]]:
    """Where in `text` the answers stand that carry the loss."""
    turns = [index for index, message in enumerate(messages) if message.role == "assistant" and index > 0]
    if not turns:
        raise UserError("the conversation has no answer of the assistant to learn from")
    spans = []
    for index in turns if loss == "turns" else turns[-1:]:
        start, stop = _span(messages, index, text, write)
        calls = [call["function"]["name"] for call in messages[index].extra.get("tool_calls", ())]
        if lost := next((name for name in calls if name not in text[start:stop]), None):
            raise UserError(
                f"the chat template does not write the call of {lost!r}: choose a model whose template does"
            )
        spans.append((start, stop))
    return spans


def _span(messages: Sequence[Message], index: int, text: str, write: Callable[..., str]) -> tuple[int, int]:
    """Where in `text` the turn `index` stands: from after the opening of the turn to the end of all that closes it."""
    before = write(messages[:index], ask=True)
    last = index == len(messages) - 1
    through = text if last else write(messages[: index + 1])
    if not text.startswith(before) or not text.startswith(through):
        # Some templates rewrite earlier turns (they drop the reasoning of all but the last); then only "last" is exact.
        if not last:
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
