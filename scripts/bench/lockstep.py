"""A peer that takes a batch of prompts and gives it back when all of them are answered, driven through the same loads.

Each contender of this kind is a script, run in an environment of its own with MODEL, PLAN (see in_process.py), --threads and
--dtype; it hands `drive` what generates.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from scripts.bench import load
from scripts.bench.contender import peak_rss_mib

Generate = Callable[[list[list[int]]], None]  # NEW_TOKENS after each prompt of a batch; all have the same length


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    return parser.parse_args()


def drive(options: argparse.Namespace, generate: Generate) -> None:
    """Every client's first prompt as one batch, then every client's second. Prints the line of JSON."""
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    answers: dict[str, list[load.Answer]] = {}
    for one in [load.Load(**asked) for asked in json.loads(options.plan.read_text())]:
        answers[one.name] = []
        for is_timed, prompts in ((False, one.warm_up), (True, one.prompts)):
            for batch in zip(*prompts, strict=True):
                tokens = [tokenizer.encode(prompt).ids for prompt in batch]
                sent = time.perf_counter()
                generate(tokens)
                chunk = load.Chunk(time.perf_counter(), load.NEW_TOKENS)
                if is_timed:
                    answers[one.name] += [load.Answer(sent, [chunk], load.NEW_TOKENS)] * len(batch)
    print(json.dumps({"answers": answers, "peak_rss_mib": peak_rss_mib()}))
