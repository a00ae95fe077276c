"""Conversations with tools, of other shapes, learned whole, and in pairs: what is labelled, decoded again."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_data import CHATML, INST, TOKENIZERS, learned, tokenizer

from finetune import Chat, Instruct, Jsonl, Pair, Parquet, Preference
from plugins.spec import UserError
from plugins.template import PLAIN, conversation_text
from plugins.types import IGNORE, Message

# In the manner of Hermes and Qwen: tools in the system turn, calls as JSON, results of tools together in a user's turn.
HERMES = """\
{% if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}Tools:
{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{% for m in messages %}
{% if m.role == 'tool' %}
{% if loop.previtem.role != 'tool' %}<|im_start|>user
{% endif %}<result>{{ m.content }}</result>
{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}
{% elif m.role != 'system' %}<|im_start|>{{ m.role + '\n' + m.content }}
{%- for call in m.tool_calls %}<call>{{ call.function | tojson }}</call>
{%- endfor %}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT = tokenizer("<|im_end|>", HERMES)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def call(city: str, identity: str = "call_1") -> dict[str, Any]:
    return {
        "id": identity,
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps({"city": city})},
    }


def result(text: str, identity: str = "call_1") -> dict[str, str]:
    return {"role": "tool", "tool_call_id": identity, "name": "weather", "content": text}


WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "Rain in 東京 or Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [call("東京"), call("Paris", "call_2")]},
    result("rain"),
    result("sun", "call_2"),
    {"role": "assistant", "content": "In 東京 only.", "tool_calls": None},
    {"role": "user", "content": "And Oslo?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call("Oslo", "call_3")]},
    result("snow", "call_3"),
    {"role": "assistant", "content": "Snow 🙂"},
]
TEXT = (
    "<|im_start|>system\nbe brief\nTools:\n" + json.dumps(WEATHER) + "\n<|im_end|>\n"
    "<|im_start|>user\nRain in 東京 or Paris?<|im_end|>\n<|im_start|>assistant\n"
    '<call>{"name": "weather", "arguments": {"city": "東京"}}</call>'
    '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call><|im_end|>\n'
    "<|im_start|>user\n<result>rain</result>\n<result>sun</result>\n<|im_end|>\n"
    "<|im_start|>assistant\nIn 東京 only.<|im_end|>\n<|im_start|>user\nAnd Oslo?<|im_end|>\n<|im_start|>assistant\n"
    'I look.<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|im_end|>\n'
    "<|im_start|>user\n<result>snow</result>\n<|im_end|>\n<|im_start|>assistant\nSnow 🙂<|im_end|>\n"
)
SAID = [
    (
        '<call>{"name": "weather", "arguments": {"city": "東京"}}</call>'
        '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call><|im_end|>'
    ),
    "In 東京 only.<|im_end|>",
    'I look.<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|im_end|>',
    "Snow 🙂<|im_end|>",
]


@pytest.mark.parametrize(("loss", "expected"), [("turns", SAID), ("last", SAID[-1:]), ("all", [TEXT])])
def test_calls_of_tools_are_learned_and_their_results_are_not(loss: Any, expected: list[str]) -> None:
    example = Chat(loss=loss)({"messages": WITH_TOOLS, "tools": [WEATHER]}, CHAT)
    assert example is not None
    assert CHAT.decode(example.input_ids) == TEXT
    assert learned(example, CHAT) == expected


def test_a_conversation_that_ends_with_a_call_learns_the_call() -> None:
    example = Chat(loss="last")({"messages": WITH_TOOLS[:3], "tools": [WEATHER]}, CHAT)
    assert example is not None
    assert learned(example, CHAT) == SAID[:1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": WITH_TOOLS, "schemas": json.dumps([WEATHER])},
        {"messages": WITH_TOOLS, "schemas": [json.dumps(WEATHER)]},
        {  # arguments as an object, and calls without their wrapping: what chat templates see is the same
            "messages": [
                m
                | {
                    "tool_calls": [
                        {"name": "weather", "arguments": json.loads(c["function"]["arguments"])} for c in calls
                    ]
                }
                if (calls := m.get("tool_calls"))
                else m
                for m in WITH_TOOLS
            ],
            "schemas": [WEATHER],
        },
        {
            "messages": [
                m | {"tool_calls": json.dumps(m["tool_calls"])} if m.get("tool_calls") else m for m in WITH_TOOLS
            ],
            "schemas": [WEATHER],
        },
    ],
    ids=["tools as JSON", "each tool as JSON", "bare calls", "calls as JSON"],
)
def test_tools_and_calls_may_be_written_otherwise(row: Any) -> None:
    example = Chat(tools="schemas")(row, CHAT)
    assert example is not None
    assert CHAT.decode(example.input_ids) == TEXT
    assert learned(example, CHAT) == SAID


def test_what_a_row_does_not_have_changes_nothing() -> None:
    plain: list[dict[str, Any]] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello there"},
    ]
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello there<|im_end|>\n"
    # Columns of other rows leave nulls and empty lists behind.
    padded = [message | {"tool_calls": None, "name": None} for message in plain[:1]] + [plain[1] | {"tool_calls": []}]
    for row in (
        {"messages": plain},
        {"messages": padded, "tools": None},
        {"messages": plain, "tools": []},
        {"messages": plain, "tools": ""},
    ):
        example = Chat()(row, CHAT)
        assert example is not None
        assert CHAT.decode(example.input_ids) == expected
    example = Chat(tools=None)({"messages": plain, "tools": [WEATHER]}, CHAT)
    assert example is not None
    assert CHAT.decode(example.input_ids) == expected


def test_rows_with_tools_come_out_of_parquet_as_they_went_in(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": WITH_TOOLS, "tools": json.dumps([WEATHER])},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with_tools, without = (Chat()(row, CHAT) for _, row in Parquet(str(tmp_path / "rows.parquet")).read())
    assert with_tools is not None
    assert without is not None
    assert CHAT.decode(with_tools.input_ids) == TEXT
    assert learned(with_tools, CHAT) == SAID
    assert CHAT.decode(without.input_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        ({"tools": [WEATHER]}, CHATML, "the chat template does not write the row's tools: .* or Chat.tools=None"),
        ({}, PLAIN, "the chat template does not write the call of 'weather'"),
        ({"tools": "[{"}, HERMES, "field 'tools' is not JSON .*: '\\[{'"),
        ({"tools": {"name": "weather"}}, HERMES, "field 'tools' must be a list of tools, found {'name'"),
        ({"tools": [{"type": "function"}]}, HERMES, "field 'tools': a tool needs a name, found {'type'"),
    ],
)
def test_tools_that_would_be_lost_or_are_wrong_are_one_line(row: Any, template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Chat()({"messages": WITH_TOOLS[1:3]} | row, tokenizer("<|im_end|>", template))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "a"}, "each message needs 'role' and 'content', found {'content': 'a'}"),
        ({"role": "user"}, "'content' must be text, found None"),
        ({"role": "user", "content": ["a"]}, r"'content' must be text, found \['a'\]"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "'tool_calls' must be a list, found {'name': 'f'}"),
        ({"role": "assistant", "tool_calls": [{"arguments": "{}"}]}, "a call needs a name, found {'arguments': '{}'}"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "Oslo"}]}, "is not JSON .*: 'Oslo'"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]},
            r"the arguments of a call must be an object, found \[1\]",
        ),
    ],
)
def test_a_wrong_message_is_one_line(message: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^field 'messages'.* {said}$"):
        Chat()({"messages": [{"role": "user", "content": "hi"}, message]}, CHAT)


SHAREGPT = Chat(messages="conversations", role="from", content="value")


def test_sharegpt_rows_are_read_by_naming_their_fields() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "Rain in Oslo?", "weight": None},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "snow"},
            {"from": "gpt", "value": "Snow"},
        ],
        "tools": json.dumps([WEATHER["function"]]),
    }
    example = SHAREGPT(row, CHAT)
    assert example is not None
    assert learned(example, CHAT) == [
        '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|im_end|>',
        "Snow<|im_end|>",
    ]
    text = CHAT.decode(example.input_ids)
    assert "<|im_start|>user\nRain in Oslo?<|im_end|>" in text
    assert "<|im_start|>user\n<result>snow</result>\n<|im_end|>" in text
    tool = {"from": "tool", "value": "snow"}
    assert (
        SHAREGPT({**row, "conversations": [*row["conversations"][:3], tool, row["conversations"][4]]}, CHAT) == example
    )


def test_what_the_assistant_says_before_it_is_asked_is_read_but_not_learned() -> None:
    greeting = {"from": "gpt", "value": "welcome"}
    asked = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello there"}]
    example = SHAREGPT({"conversations": [greeting, *asked]}, CHAT)
    assert example is not None
    assert learned(example, CHAT) == ["hello there<|im_end|>"]
    assert "welcome" in CHAT.decode(example.input_ids)
    with pytest.raises(UserError, match="no answer of the assistant to learn from"):
        SHAREGPT({"conversations": [greeting]}, CHAT)


@pytest.mark.parametrize(("tok", "end"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_all_learns_every_token(tok: Any, end: str) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello there"}]
    example = Chat(loss="all")({"messages": messages}, tok)
    assert example is not None
    assert example.labels == example.input_ids
    assert tok.decode(example.input_ids).rstrip().endswith(f"hello there{end}")


def test_all_needs_no_assistant_and_ends_with_eos_where_the_template_has_no_end() -> None:
    example = Chat(loss="all")({"messages": [{"role": "user", "content": "hello"}]}, CHAT)
    assert example is not None
    assert learned(example, CHAT) == ["<|im_start|>user\nhello<|im_end|>\n"]
    tok = tokenizer("</s>", "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    example = Chat(loss="all")({"messages": [{"role": "user", "content": "hello"}]}, tok)
    assert example is not None
    assert learned(example, tok) == ["user: hello\n</s>"]


def test_instruct_takes_the_names_of_the_fields() -> None:
    row = {"frage": "how are you", "dazu": "hello", "antwort": "five apples"}
    example = Instruct(instruction="frage", input="dazu", output="antwort")(row, CHAT)
    assert example is not None
    assert CHAT.decode(example.input_ids) == (
        "<|im_start|>user\nhow are you\n\nhello<|im_end|>\n<|im_start|>assistant\nfive apples<|im_end|>\n"
    )


ASKED = [{"role": "user", "content": "hello"}]
GOOD, BAD = {"role": "assistant", "content": "hello there"}, {"role": "assistant", "content": "five"}
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "hello", "chosen": "hello there", "rejected": "five"},
    "a list of messages and texts": {"prompt": ASKED, "chosen": "hello there", "rejected": "five"},
    "a list of messages and answers": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "a text and whole conversations": {"prompt": "hello", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
    "messages and whole conversations": {"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
    "no prompt": {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
    "an empty prompt": {"prompt": None, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize(("tok", "end"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_pair_is_two_answers_to_one_prompt(row: Any, tok: Any, end: str) -> None:
    pair = Preference()(row, tok)
    assert isinstance(pair, Pair)
    assert learned(pair.chosen, tok) == [f"hello there{end}"]
    assert learned(pair.rejected, tok) == [f"five{end}"]
    served = tok(conversation_text(tok, [Message("user", "hello")], ask=True), add_special_tokens=False)["input_ids"]
    for example in (pair.chosen, pair.rejected):
        assert example.input_ids[: len(served)] == served
        assert {*example.labels[: len(served)]} == {IGNORE}


def test_only_the_last_answer_of_a_long_conversation_is_compared() -> None:
    before = [*ASKED, GOOD, {"role": "user", "content": "how are you"}]
    for row in (
        {"prompt": before, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hello", "chosen": [*before, GOOD], "rejected": [*before, BAD]},
    ):
        pair = Preference()(row, CHAT)
        assert pair is not None
        assert (learned(pair.chosen, CHAT), learned(pair.rejected, CHAT)) == (
            ["hello there<|im_end|>"],
            ["five<|im_end|>"],
        )
        assert "how are you" in CHAT.decode(pair.rejected.input_ids)


def test_a_system_message_goes_before_rows_that_have_none() -> None:
    opening = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    own = [{"role": "system", "content": "be long"}, *ASKED]
    for row in PAIRS.values():
        pair = Preference(system="be brief")(row, CHAT)
        assert pair is not None
        assert CHAT.decode(pair.rejected.input_ids).startswith(opening)
    pair = Preference(system="be brief")({"prompt": own, "chosen": [GOOD], "rejected": [BAD]}, CHAT)
    assert pair is not None
    assert CHAT.decode(pair.chosen.input_ids).startswith(opening.replace("brief", "long"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "chosen": "five", "rejected": "five"},
        {"prompt": "hello", "chosen": "", "rejected": "five"},
        {"prompt": "hello", "chosen": "five", "rejected": ""},
        {"chosen": [*ASKED, BAD], "rejected": [*ASKED, BAD]},
    ],
)
def test_a_pair_that_says_nothing_is_left_out(row: Any) -> None:
    assert Preference()(row, CHAT) is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "field 'prompt' must be text or a list of messages, found 3"),
        ({"prompt": "a", "chosen": {}, "rejected": "b"}, "field 'chosen' must be text or a list of messages, found {}"),
        (
            {"prompt": "hello", "chosen": ASKED, "rejected": [BAD]},
            "field 'chosen' must end with an answer of the assistant",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "field 'chosen' begins with an answer, and there is no prompt"),
        (
            {"prompt": "other", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
            "field 'chosen' begins neither with the prompt nor with an answer; .*Preference.prompt=None",
        ),
    ],
)
def test_a_wrong_pair_is_one_line(row: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Preference()(row, CHAT)


def test_a_pair_without_its_fields_names_them() -> None:
    with pytest.raises(KeyError, match="prompt"):
        Preference()({"chosen": "a", "rejected": "b"}, CHAT)
    with pytest.raises(KeyError, match="rejected"):
        Preference()({"prompt": "a", "chosen": "a"}, CHAT)
    row = {"prompt": "other", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}
    pair = Preference(prompt=None)(row, CHAT)
    assert pair is not None
    assert learned(pair.chosen, CHAT) == ["hello there<|im_end|>"]
    with pytest.raises(UserError, match=r"field 'chosen' begins with an answer, and there is no prompt"):
        Preference(prompt=None)({"chosen": "a", "rejected": "b"}, CHAT)


def test_the_fields_of_pairs_have_names_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"q": "hello", "good": "hello there", "bad": "five"}))
    [(_, row)] = Jsonl(str(tmp_path / "pairs.jsonl")).read()
    pair = Preference(prompt="q", chosen="good", rejected="bad")(row, tokenizer("</s>", INST))
    assert pair is not None
