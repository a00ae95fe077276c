"""The model that the contenders serve: the Llama of workload.py, 124.7 M random weights in bf16, that speaks in words.py.

    python -m scripts.bench.serve_model [--to .bench]

Made once and kept in a directory whose name follows from what makes it; prints that directory.
"""

import argparse
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scripts.bench import words, workload

PARTS = (__file__, words.__file__, workload.__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description="make the model that the contenders serve")
    parser.add_argument("--to", type=Path, default=Path(".bench"))
    print(make(parser.parse_args().to))


def make(to: Path, sizes: Mapping[str, Any] = workload.SIZES[workload.MODEL], device: str = "cpu") -> Path:
    """The model's directory under `to`, made if it is not there yet. `device`: where its numbers are drawn."""
    parts = [*(Path(part).read_bytes() for part in PARTS), repr(sizes).encode()]
    name = "serve-" + hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    directory, unfinished = to / name, to / f"{name}.unfinished"
    if directory.exists():
        return directory
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    workload.save_model(unfinished, sizes, torch.bfloat16, device)
    word_tokenizer().save_pretrained(unfinished)
    return unfinished.rename(directory)


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level, and every word with the space before it is a token."""
    tokens = [*words.SPECIAL, *(f"Ġ{word}" for word in words.words())]  # Ġ: how the byte of a space is written
    pad, start, end = words.SPECIAL
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=pad))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token=end, additional_special_tokens=[start]
    )


if __name__ == "__main__":
    main()
