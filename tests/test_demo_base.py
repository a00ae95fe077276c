"""The shipped demo base is what its scripts make, good at its language, and new to the demo task."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO_BASE = Path(__file__).parents[1] / "scripts" / "demo_base"
sys.path.insert(0, str(DEMO_BASE))  # its scripts import one another as neighbours

import language  # noqa: E402
import pretrain  # noqa: E402
import task  # noqa: E402


@pytest.fixture(scope="module")
def base():
    model = AutoModelForCausalLM.from_pretrained(DEMO_BASE / "model", dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(DEMO_BASE / "model", local_files_only=True)


def rows(name: str) -> list[task.Row]:
    return [json.loads(line) for line in (DEMO_BASE / name).read_text().splitlines()]


def test_the_base_is_small():
    assert sum(path.stat().st_size for path in (DEMO_BASE / "model").iterdir()) <= 8_000_000
    assert sum((DEMO_BASE / name).stat().st_size for name in ("train.jsonl", "heldout.jsonl")) <= 400_000


def test_the_tokenizer_has_the_tokens_of_a_chat(base):
    model, tokenizer = base
    messages = [
        {"role": "system", "content": "You are Zoë, a baker."},
        {"role": "user", "content": "Hello  there,\n\tcosts: 1234 € 🙂"},
        {"role": "assistant", "content": "Hello!"},
    ]
    ids, weights = pretrain.encode(tokenizer, messages)

    assert tokenizer.decode(ids) == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight == 1]) == "Hello!<|im_end|>"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True).endswith(
        "🙂<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.max_position_embeddings == tokenizer.model_max_length


def test_the_base_knows_its_language(base):
    perplexity, unigram = pretrain.perplexities(*base, talks=60)
    assert perplexity < unigram / 20


@pytest.mark.slow
def test_the_base_answers_what_it_was_taught(base):
    # It answers 0.82 of 450; another processor rounds otherwise.
    assert pretrain.examine(*base, questions=54)["all"] >= 0.75


def test_the_base_greets(base):
    greetings = [[{"role": "user", "content": text}] for text in ("Hello", "Hi!", "Good morning")]
    assert pretrain.answers(*base, greetings) == ["Hello! How can I help you?"] * 3


def test_the_base_has_not_seen_the_task(base):
    held_out = rows("heldout.jsonl")[:40]
    questions = [[{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}] for row in held_out]
    spoken = pretrain.answers(*base, questions)
    assert sum(answer == row["output"] for answer, row in zip(spoken, held_out, strict=True)) == 0


def test_the_language_never_shows_the_task():
    talks = language.conversations("any")
    text = " ".join(message["content"] for _ in range(3000) for message in next(talks).messages)
    assert "ticket" not in text.lower()


def test_the_task_is_what_its_script_makes():
    train, held_out = task.make()
    assert (DEMO_BASE / "train.jsonl").read_text() == task.lines(train)
    assert (DEMO_BASE / "heldout.jsonl").read_text() == task.lines(held_out)


def test_nothing_held_out_is_in_a_training_row():
    def values(row: task.Row, field: str) -> str:
        return re.search(rf"{field}: ([^|]*)", row["output"])[1].strip()

    train, held_out = rows("train.jsonl"), rows("heldout.jsonl")
    for field in ("from", "item", "place"):
        assert not {values(row, field) for row in train} & {values(row, field) for row in held_out}
    words = set(re.findall(r"\w+", " ".join(row["input"] for row in train)))
    assert not {values(row, "from") for row in held_out} & words


def test_the_same_seed_makes_the_same_conversations():
    first, second = language.conversations(3), language.conversations(3)
    assert [next(first) for _ in range(200)] == [next(second) for _ in range(200)]


@pytest.mark.slow
def test_the_script_makes_a_base_on_a_small_budget(tmp_path):
    command = [DEMO_BASE / "pretrain.py", "--out", tmp_path, "--steps", "40", "--questions", "9"]
    told = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=1800).stdout

    perplexity, unigram = map(float, re.search(r"perplexity ([\d.]+), of the unigram model ([\d.]+)", told).groups())
    assert perplexity < unigram / 3  # the shipped one's recipe is at 60 of 202 after as many steps
    AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
