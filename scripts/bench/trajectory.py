"""Trains a small model with our Sft and with TRL's SFTTrainer from the same weights on the same tokens in the same order.

    scripts/bench/trajectory [--rows FILE] [--steps 20]

Both in fp32, with LoRA and in full, with gradient accumulation, clipping and weight decay, at a constant rate: then the
losses of all steps must be the same. Prints both columns and the largest difference; exit code 1 if it is above 1e-3.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from finetune import Data, FinetuneConfig, Full, Instruct, Jsonl, Lora, ModelSource, Optim, Train
from finetune.data import Batch
from finetune.learner import Learner
from finetune.loop import schedule
from finetune.model import load_tokenizer, save
from finetune.tokenise import prepare
from scripts.bench import workload
from scripts.bench.workload import ROWS, SMALL

TRL = ".venv-trl/bin/python"
ALLOWED = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description="our losses beside those of TRL")
    parser.add_argument(
        "--rows", type=Path, help="JSON lines with the fields dialogue and summary (default: invented ones)"
    )
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rows = workload.given(options.rows) if options.rows else workload.invented()
    made = workload.make(rows, Path(".bench")).absolute()
    config = FinetuneConfig(
        name="trajectory",
        model=ModelSource(str(made / SMALL), dtype="fp32"),
        data=Data(
            source=Jsonl(str(made / ROWS)),
            processor=Instruct(instruction="dialogue", input=None, output="summary"),
            max_length=256,
        ),
        train=Train(max_steps=options.steps, batch_size=4, accumulate=2),
    )
    lora = replace(config, method=Lora(), optim=Optim(lr=1e-2, weight_decay=0.1, warmup=0, schedule="constant"))
    full = replace(config, method=Full(), optim=Optim(lr=2e-3, weight_decay=0.1, warmup=0, schedule="constant"))
    differs = [compare("LoRA", lora), compare("full", full)]
    return 1 if any(differs) else 0


def compare(what: str, config: FinetuneConfig) -> bool:
    """Train with both, print both, say whether they differ by more than what is allowed."""
    with tempfile.TemporaryDirectory() as directory:
        ours = train_ours(config, Path(directory))
        theirs = train_trl(config, Path(directory))
    print(f"{what + ', step':<12}{'ours':>10}{'TRL':>10}{'difference':>14}")
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"{step:>12}{one:>10.5f}{other:>10.5f}{one - other:>14.1e}")
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    print(f"{what}: the largest difference is {max(differences):.1e}; allowed is {ALLOWED:.0e}\n")
    return not all(difference <= ALLOWED for difference in differences)  # one that is no number is no match


def train_ours(config: FinetuneConfig, shared: Path) -> list[float]:
    """Our losses; `shared` gets what TRL has to begin with: the first adapter, and the rows in the order of training."""
    train = config.train
    assert train.max_steps is not None
    rows = prepare(config.data, load_tokenizer(config.model), seed=train.seed)
    learner = Learner(config)
    if isinstance(config.method, Lora):
        save(learner.model, shared)
    steps, rate = learner.steps(rows.train), schedule(config.optim, train.max_steps)
    losses = []
    with (shared / "tokens.jsonl").open("w") as file:
        for step in range(train.max_steps):
            micro_batches = next(steps).micro_batches
            file.writelines(json.dumps(row) + "\n" for batch in micro_batches for row in rows_of(batch))
            losses.append(learner.step(micro_batches, rate(step)).loss)
    return losses


def rows_of(batch: Batch) -> list[dict[str, list[int]]]:
    """The rows that a flat batch has end to end."""
    assert batch.documents is not None
    parts = [slice(*bounds) for bounds in itertools.pairwise(batch.documents.bounds)]
    return [{"input_ids": batch.input_ids[0, at].tolist(), "labels": batch.labels[0, at].tolist()} for at in parts]


def train_trl(config: FinetuneConfig, shared: Path) -> list[float]:
    settings = {
        "base": config.model.path,
        "per_device_train_batch_size": config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulate,
        "max_steps": config.train.max_steps,
        "learning_rate": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.clip,
    }
    (shared / "settings.json").write_text(json.dumps(settings))
    command = [TRL, "-m", "scripts.bench.trajectory_trl", str(shared)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{ran.stderr}\ntrajectory: {' '.join(command)} ended with exit code {ran.returncode}")
    losses: list[float] = json.loads(ran.stdout.splitlines()[-1])
    return losses


if __name__ == "__main__":
    sys.exit(main())
