"""Chat templates: how a conversation becomes text, and where a turn of the assistant ends in it.

Training labels and serving stops both come from here, so that a model learns to end its turn with the token at which
the engine stops.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from plugins.types import Message


class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that this project relies on."""

    chat_template: str | None
    eos_token_id: int | None
    eos_token: str | None
    bos_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def __call__(self, text: str, **options: Any) -> Any: ...
    def decode(self, token_ids: Any, **options: Any) -> str: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


# For a base whose tokenizer has none; finetuning saves it with the run, and serving reads it from there.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def conversation_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    ask: bool = False,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The conversation in the template's words, special tokens included; `ask` opens the assistant's next turn.

    `template` replaces the tokenizer's own. `tools` are schemas in OpenAI's form. Raises what the template raises
    (jinja2.TemplateError) on roles that it refuses.
    """
    text: str = tokenizer.apply_chat_template(
        [{**message.extra, "role": message.role, "content": message.content} for message in messages],
        tools=list(tools) or None,  # templates ask whether there are any
        tokenize=False,
        add_generation_prompt=ask,
        chat_template=template or tokenizer.chat_template,
    )
    return text


def end_of_turn(tokenizer: Tokenizer, template: str | None = None) -> int | None:
    """The id of the token that closes an assistant's turn: the first special token that the template puts after it.

    Often eos, but not always: a ChatML model may have eos <|endoftext|> and end its turns with <|im_end|>. None where
    the template closes a turn with plain text only (then eos has to be appended), or does not write what is said.
    """
    return _end_of_turn(tokenizer, template or tokenizer.chat_template)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=16)  # asked for every row
def _end_of_turn(tokenizer: Any, template: str | None) -> int | None:
    probe = "probe"
    text = conversation_text(tokenizer, [Message("user", "hi"), Message("assistant", probe)], template=template)
    if probe not in text:
        return None
    after = text[text.rindex(probe) + len(probe) :]
    ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return next((token for token in ids if token in special), None)
