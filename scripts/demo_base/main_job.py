"""The main job, end to end, as `scripts/demo` runs it: finetune, serve, ask over HTTP, score."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune import FinetuneConfig
from plugins import cluster, entry
from plugins.loading import load_config
from plugins.types import RunManifest
from serve import ServeConfig
from ui.client import Platform

FINETUNE = Path("configs/finetune/demo_lora.py")
SERVE = Path("configs/serve/demo.py")
HELD_OUT = Path("scripts/demo_base/heldout.jsonl")
BASE_AT_MOST, FINETUNED_AT_LEAST = 0.05, 0.9


def main() -> None:
    started = time.monotonic()
    platform = Platform()
    with cluster.connection():
        print("1/3  finetuning the demo base with LoRA on two Ray Train workers", flush=True)
        run = finetune(platform)
        print("2/3  serving base and adapter with Ray Serve", flush=True)
        served = load_config(SERVE, ServeConfig)
        platform.serve(served)
        base, tuned = "demo", f"demo:{run.name}"
        print(f"     {platform.url}/v1/models lists {', '.join(platform.models())}")
        questions = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
        print(f"3/3  asking both {len(questions)} questions that were in no training row", flush=True)
        scores = {model: exact_match(platform, model, questions) for model in (base, tuned)}
        platform.stop(served.name)
    print(f"\nYours to try:  .venv/bin/manta serve {SERVE}   and then   .venv/bin/manta chat {tuned}\n")
    print(
        f"exact match: base {scores[base]:.2f}, finetuned {scores[tuned]:.2f}; {time.monotonic() - started:.0f} seconds"
    )
    if scores[base] > BASE_AT_MOST or scores[tuned] < FINETUNED_AT_LEAST:
        sys.exit(f"expected the base at most {BASE_AT_MOST} and the finetuned model at least {FINETUNED_AT_LEAST}")


def finetune(platform: Platform) -> Path:
    """The demo run: an interrupted one goes on, a finished one is started over."""
    config = load_config(FINETUNE, FinetuneConfig)
    finished = RunManifest.read(cluster.output_root() / config.output / config.name) is not None
    overrides = ["checkpoint.resume=false"] if finished else []
    config = load_config(FINETUNE, FinetuneConfig, overrides)
    return platform.finetune(config, config_file=FINETUNE, overrides=overrides)


def exact_match(platform: Platform, model: str, questions: list[dict[str, str]]) -> float:
    """The share of questions that `model`, greedy, answers to the letter. Shows the first as an example."""

    def ask(question: dict[str, str]) -> str:
        prompt = "\n\n".join(part for part in (question["instruction"], question["input"]) if part)
        return platform.answer(model, prompt, temperature=0, max_tokens=96)

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, questions))
    print(f"     {model}: {questions[0]['input']!r} -> {answers[0]!r}", flush=True)
    right = sum(answer == question["output"] for answer, question in zip(answers, questions, strict=True))
    return right / len(questions)


if __name__ == "__main__":
    sys.exit(entry.run(main, name="demo"))
