"""Our contender: the loop of finetune/ on the same model and rows, in this process or on Ray Train with one worker.

    python -m scripts.bench.ours WORKLOAD --mode full-rows | rows | padded | packed [--ray]

Batches as the peers have them: 4 full rows of 512 tokens; 8 rows; 8 packs. `padded` is what models get whose attention is
not the usual one: rows side by side, padded, through transformers' own attention. With --ray it is a whole run, as `manta
finetune` does it, on a cluster of its own; its speed is that of the steps as the worker reports them, and the memory of the
worker is not known here.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import Data, FinetuneConfig, Instruct, Jsonl, Lora, ModelSource, Optim, Scaling, Train
from finetune.learner import Learner
from finetune.loop import schedule
from finetune.model import load_tokenizer
from finetune.tokenise import prepare
from plugins import cluster
from plugins.runs import read_metrics
from plugins.types import Example
from scripts.bench import contender
from scripts.bench.workload import FULL_ROWS, MAX_LENGTH, MODEL, ROWS


class AsGiven:
    """A processor for rows that are tokens already: all of them are learned."""

    def __call__(self, row: Any, tokenizer: Any) -> Example:
        return Example(row["input_ids"], row["input_ids"])


def main() -> None:
    parser = contender.arguments("our own loop")
    parser.add_argument("--mode", choices=("full-rows", "rows", "padded", "packed"), required=True)
    parser.add_argument("--ray", action="store_true", help="on Ray Train, with one worker")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = config_of(options.workload.absolute(), options.mode, options.steps, options.threads)
    if options.ray:
        on_ray(config, options.warmup)
    else:
        in_process(config, options.warmup, padded=options.mode == "padded")


def config_of(workload: Path, mode: str, steps: int, threads: int) -> FinetuneConfig:
    full = mode == "full-rows"
    return FinetuneConfig(
        name="bench",
        model=ModelSource(str(workload / MODEL)),
        data=Data(
            source=Jsonl(str(workload / (FULL_ROWS if full else ROWS))),
            processor=AsGiven() if full else Instruct(instruction="dialogue", input=None, output="summary"),
            max_length=MAX_LENGTH,
            packing=mode == "packed",
        ),
        method=Lora(rank=8, alpha=16),
        optim=Optim(lr=2e-5, schedule="linear", warmup=0),  # TRL's
        train=Train(max_steps=steps, batch_size=4 if full else 8, log_every=1),
        scaling=Scaling(cpus=threads),
    )


def in_process(config: FinetuneConfig, warmup: int, *, padded: bool) -> None:
    """What finetune/worker.py does, without Ray."""
    assert config.train.max_steps is not None
    rows = prepare(config.data, load_tokenizer(config.model), seed=config.train.seed)
    learner = Learner(config)
    if padded:
        learner.logprobs.layout = "padded"
        learner.model.set_attn_implementation("sdpa")  # type: ignore[operator]
    steps, rate = learner.steps(rows.train), schedule(config.optim, config.train.max_steps)
    watch = contender.Stopwatch(warmup)
    for step in range(config.train.max_steps):
        result = learner.step(next(steps).micro_batches, rate(step))
        watch.step(result.tokens, result.loss)
    watch.report()


def on_ray(config: FinetuneConfig, warmup: int) -> None:
    """The whole run; its speed is the mean over the steps between two reports, of which the first ones are not counted.

    Exact where every step has as many tokens. Reports are as rare as the warm-up is long: what Ray does with one takes time
    of the same cores.
    """
    cluster.prepare()  # before Ray is imported
    from finetune.run import finetune

    with tempfile.TemporaryDirectory() as output:
        run = finetune(replace(config, output=output, train=replace(config.train, log_every=warmup)))
        lines = read_metrics(run)
    speed = statistics.harmonic_mean(line["tokens_per_s"] for line in lines[1:])
    contender.report(speed, int(lines[-1]["step"]), lines[-1]["loss"], peak_rss=None)


if __name__ == "__main__":
    main()
