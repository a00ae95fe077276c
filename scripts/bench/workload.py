"""What the contenders train: a Llama of 124.7 M random weights and 500 dialogues with their summaries.

    python -m scripts.bench.workload [--rows FILE] [--to .bench]

Made once and kept in a directory whose name follows from the rows; prints that directory. In it:

    model/            the model in bf16, with a byte-level BPE tokenizer that was trained on the rows, and a chat template
    small/            a Llama of 2 layers in fp32 with the same tokenizer, for comparisons of losses
    rows.jsonl        {"dialogue": ..., "summary": ...} a line
    full_rows.jsonl   {"input_ids": [...]} a line: the same dialogues end to end, cut every 512 tokens, so nothing is padding

Without --rows the dialogues are invented: words as rare and as long as those of English, in turns, and as many of them
in a dialogue as in real ones (about 190 tokens on average, from 60 to 900; the summary a fifth of that).
"""

import argparse
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MODEL, SMALL, ROWS, FULL_ROWS = "model", "small", "rows.jsonl", "full_rows.jsonl"
MAX_LENGTH = 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, dict[str, Any]] = {
    MODEL: {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    SMALL: {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # large, so that there is something to unlearn and the losses move
    },
}
DTYPE = {MODEL: torch.bfloat16, SMALL: torch.float32}

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description="make what the contenders train")
    parser.add_argument("--rows", type=Path, help="JSON lines with the fields dialogue and summary")
    parser.add_argument("--to", type=Path, default=Path(".bench"))
    options = parser.parse_args()
    print(make(given(options.rows) if options.rows else invented(), options.to))


def make(rows: list[Row], to: Path) -> Path:
    """The workload of `rows` under `to`, made if it is not there yet."""
    # This file is part of the name: what an older version of it made is not taken for what this one would make.
    text = "".join(json.dumps(row) + "\n" for row in rows)
    name = hashlib.sha256(text.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    directory, unfinished = to / name, to / f"{name}.unfinished"
    if directory.exists():
        return directory
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer = train_tokenizer(rows)
    for model in (MODEL, SMALL):
        save_model(unfinished / model, SIZES[model], DTYPE[model])
        tokenizer.save_pretrained(unfinished / model)
    (unfinished / ROWS).write_text(text)
    with (unfinished / FULL_ROWS).open("w") as file:
        file.writelines(json.dumps({"input_ids": ids}) + "\n" for ids in full_rows(rows, tokenizer))
    return unfinished.rename(directory)


def given(file: Path) -> list[Row]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{"dialogue": line["dialogue"], "summary": line["summary"]} for line in lines]


def invented(count: int = 500, seed: int = 0) -> list[Row]:
    """Dialogues without sense, whose lengths and whose words' frequencies are those of real ones."""
    rng = Random(seed)
    syllables = [
        first + vowel + last for first in "bdfgklmnprstvw" for vowel in "aeiou" for last in ("", "n", "r", "s")
    ]
    words = sorted({"".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(12000)})
    rng.shuffle(words)
    rare = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))  # Zipf's law

    def sentence(length: int) -> str:
        return " ".join(rng.choices(words, cum_weights=rare, k=length)).capitalize() + rng.choice(".?!")

    def speech(length: int) -> Iterator[str]:
        while length > 0:
            said = min(length, rng.randint(5, 20))
            yield sentence(said)
            length -= said

    rows = []
    for _ in range(count):
        length = round(min(640, max(36, rng.lognormvariate(math.log(112), 0.52))))
        turns = [f"{'Anna' if turn % 2 else 'Omar'}: {said}" for turn, said in enumerate(speech(length))]
        rows.append({"dialogue": "\n".join(turns), "summary": " ".join(speech(max(6, length // 5)))})
    return rows


def train_tokenizer(rows: list[Row]) -> Any:
    """A byte-level BPE of at most 32,000 tokens (the embeddings have 32,000 in any case)."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32000,
        min_frequency=3,  # else every word of the rows would be a token of its own
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((text for row in rows for text in row.values()), trainer)
    pad, start, end = SPECIAL
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token=end, additional_special_tokens=[start]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_model(directory: Path, sizes: Mapping[str, Any], dtype: torch.dtype, device: str = "cpu") -> None:
    """`device`: where its numbers are drawn; billions take minutes on a CPU."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=2,
        **sizes,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(directory)


def chat(row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["dialogue"]}, {"role": "assistant", "content": row["summary"]}]


def full_rows(rows: list[Row], tokenizer: Any) -> Iterator[list[int]]:
    text = "".join(tokenizer.apply_chat_template(chat(row), tokenize=False) for row in rows)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for first in range(0, len(ids) - MAX_LENGTH, MAX_LENGTH):
        yield ids[first : first + MAX_LENGTH]


if __name__ == "__main__":
    main()
