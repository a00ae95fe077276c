"""Rows -> tokens and labels -> batches."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune import Data
from finetune.tokenise import prepare
from plugins.data import Chat, Completion, Csv, Hub, Instruct, Jsonl, Parquet, Source
from plugins.spec import UserError
from plugins.template import PLAIN, conversation_text, end_of_turn
from plugins.types import IGNORE, Example, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(eos: str, template: str | None, *, pad: str | None = None) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<s>", eos, pad or eos, "<|im_start|>", "<|im_end|>"]))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["hello there, how are you", "the answer is five apples", "assistant user"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad or eos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    wrapped.chat_template = template
    return wrapped


TOKENIZERS = {
    "</s> after each answer, pad = eos": (tokenizer("</s>", INST), "</s>"),
    "<|endoftext|> as eos and pad, turns end with it": (tokenizer("<|endoftext|>", ZEPHYR), "<|endoftext|>"),
    "<|im_end|> as eos and pad": (tokenizer("<|im_end|>", CHATML), "<|im_end|>"),
    "<|im_end|> ends turns, eos is another": (tokenizer("<|endoftext|>", CHATML), "<|im_end|>"),
    "<|im_end|> as eos, a pad of its own": (tokenizer("<|im_end|>", CHATML, pad="<|pad|>"), "<|im_end|>"),
    "no template of its own": (tokenizer("</s>", PLAIN), "</s>"),
}


def learned(example: Example, tok: Any) -> list[str]:
    """The labelled stretches, as text; every label must be the token that stands there."""
    stretches: list[list[int]] = []
    previous = IGNORE
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            if previous == IGNORE:
                stretches.append([])
            stretches[-1].append(label)
        previous = label
    return [tok.decode(stretch).lstrip(" ") for stretch in stretches]


@pytest.mark.parametrize(("tok", "end"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_the_answer_and_the_end_of_its_turn_are_learned_and_nothing_else(tok: Any, end: str) -> None:
    row = {"instruction": "how are you", "input": "hello", "output": "five apples"}
    example = Instruct()(row, tok)
    assert example is not None
    assert learned(example, tok) == [f"five apples{end}"]
    assert tok.convert_tokens_to_ids(end) == end_of_turn(tok)


@pytest.mark.parametrize(("tok", "end"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_what_is_learned_continues_the_very_tokens_that_serving_sends(tok: Any, end: str) -> None:
    row = {"instruction": "hello there", "output": "the answer"}
    example = Instruct()(row, tok)
    assert example is not None
    prompt = conversation_text(tok, [Message("user", "hello there")], ask=True)
    served = tok(prompt, add_special_tokens=False)["input_ids"]
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    assert example.input_ids[:first] == served


@pytest.mark.parametrize(("tok", "end"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_chat_learns_every_turn_of_the_assistant_or_the_last(tok: Any, end: str) -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello there"},
        {"role": "user", "content": "how are you"},
        {"role": "assistant", "content": "the answer"},
    ]
    every = Chat()({"messages": messages}, tok)
    last = Chat(loss="last")({"messages": messages}, tok)
    assert every is not None
    assert last is not None
    assert learned(every, tok) == [f"hello there{end}", f"the answer{end}"]
    assert learned(last, tok) == [f"the answer{end}"]


def test_a_system_message_and_several_bytes_a_character() -> None:
    tok = tokenizer("<|im_end|>", CHATML)
    example = Instruct(system="be brief")({"instruction": "東京?", "output": "東京 🙂"}, tok)
    assert example is not None
    assert learned(example, tok) == ["東京 🙂<|im_end|>"]
    assert tok.decode(example.input_ids).startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_a_template_that_ends_turns_in_plain_text_gets_eos() -> None:
    tok = tokenizer("</s>", "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                            "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    assert end_of_turn(tok) is None
    example = Instruct()({"instruction": "hello", "output": "five"}, tok)
    assert example is not None
    assert learned(example, tok) == ["five\n</s>"]


@pytest.mark.parametrize("eos", ["</s>", "<|endoftext|>", "<|im_end|>"])
def test_a_completion_is_learned_whole_with_its_end(eos: str) -> None:
    tok = tokenizer(eos, None)
    example = Completion()({"text": "hello there"}, tok)
    assert example is not None
    assert learned(example, tok) == [f"hello there{eos}"]
    assert Completion()({"text": ""}, tok) is None


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all_turns() -> None:
    drops = (
        "{% for m in messages %}{{ m['role'] }} {% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
        "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    tok = tokenizer("</s>", drops)
    messages = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(UserError, match="loss='last'"):
        Chat()({"messages": messages}, tok)
    last = Chat(loss="last")({"messages": messages}, tok)
    assert last is not None
    assert learned(last, tok) == ["hello</s>"]


def test_what_the_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}')
    data = Data(source=Jsonl(str(tmp_path / "rows.jsonl")), processor=Instruct(system="be brief"))
    with pytest.raises(UserError, match="line 1: the chat template refuses it: no system here"):
        prepare(data, tokenizer("<|im_end|>", refuses), seed=0)


def test_a_row_with_an_empty_answer_is_left_out() -> None:
    assert Instruct()({"instruction": "hello", "output": ""}, tokenizer("<|im_end|>", CHATML)) is None


ROWS = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(5)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Source]:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return {
        "jsonl": Jsonl(str(tmp_path / "rows.jsonl")),
        "csv": Csv(str(tmp_path / "rows.csv")),
        "parquet": Parquet(str(tmp_path / "rows.parquet")),
        "hub": Hub(str(tmp_path / "hub")),
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub"])
def test_every_source_reads_the_same_rows(kind: str, files: dict[str, Source]) -> None:
    places, rows = zip(*files[kind].read(), strict=True)
    assert [dict(row) for row in rows] == ROWS
    assert len(set(places)) == len(ROWS)


def test_a_blank_line_does_not_shift_the_line_that_an_error_names(files: dict[str, Source]) -> None:
    assert [place.rpartition(" ")[2] for place, _ in files["jsonl"].read()] == ["1", "3", "5", "7", "9"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no file at"),
        ("", "is empty"),
        ("\n\n", "has no rows"),
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a"}',
            "line 2: has no field 'output' (fields: instruction)",
        ),
        ('{"instruction": "a", "output": 3}', "line 1: field 'output' must be text, found 3"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: a JSON object is needed, found list"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    tok = tokenizer("<|im_end|>", CHATML)
    with pytest.raises(UserError) as caught:
        prepare(Data(source=Jsonl(str(path)), processor=Instruct()), tok, seed=0)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_other_wrong_files_are_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match="line 3"):
        list(Csv(str(tmp_path / "rows.csv")).read())
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl line 1: not UTF-8"):
        list(Jsonl(str(tmp_path / "latin.jsonl")).read())
    (tmp_path / "rows.parquet").write_text("this is no parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        list(Parquet(str(tmp_path / "rows.parquet")).read())
    with pytest.raises(UserError, match="cannot be loaded"):
        list(Hub(str(tmp_path / "nothing")).read())
