"""What one rank does, from its share of the rows to the trained weights."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from finetune import checkpoint
from finetune.checkpoint import State
from finetune.config import FinetuneConfig
from finetune.data import units_an_epoch
from finetune.learner import Learner
from finetune.loop import Window, schedule, total_steps
from finetune.tokenise import Prepared


def run_rank(config: FinetuneConfig, prepared: "ray.ObjectRef[Prepared]") -> None:
    """The train function of Ray Train. Relative paths in `config` have been made absolute."""
    train = config.train
    rows = ray.get(prepared)
    learner = _learner(config)
    strategy = learner.strategy
    steps = total_steps(train, units_an_epoch(rows.train, config.data), strategy.world_size)
    rate, batches = schedule(config.optim, steps), learner.steps(rows.train)

    def held_out() -> dict[str, float]:
        return {f"eval_{name}": value for name, value in learner.evaluate(rows.held_out).items()}

    state = learner.state
    if state.step == 0 and len(rows.held_out) > 0:  # the base's own loss: what the run is to be measured against
        ray.train.report({"step": 0, "steps": steps, "epoch": 0.0, **held_out()})
    window = Window(time.perf_counter())
    while not state.is_done(steps, train.patience):
        step, lr = next(batches), rate(state.step)
        state = state.after(step)
        # Dropout is the same in a run that was resumed.
        torch.manual_seed(hash((train.seed, state.step, strategy.rank)))
        window.add(learner.step(step.micro_batches, lr))
        is_last = state.step == steps
        evaluates = len(rows.held_out) > 0 and (is_last or _due(state.step, train.eval_every))
        saves = is_last or _due(state.step, config.checkpoint.every)
        if not (evaluates or saves or _due(state.step, train.log_every)):
            continue
        metrics = window.close(time.perf_counter()) | {"step": state.step, "steps": steps, "epoch": step.epoch}
        if evaluates:
            metrics |= held_out()
            state = state.evaluated(metrics["eval_loss"])
            saves |= state.is_done(steps, train.patience) or (config.checkpoint.export == "best" and state.stale == 0)
        _report(metrics, state, learner, saves=saves)
        window = Window(time.perf_counter())  # evaluating and saving are no part of the training speed


def _learner(config: FinetuneConfig) -> Learner:
    if saved := ray.train.get_checkpoint():
        with saved.as_directory() as directory:
            return Learner(config, resume=Path(directory))
    return Learner(config)


def _report(metrics: dict[str, Any], state: State, learner: Learner, *, saves: bool) -> None:
    """To Ray Train, as all ranks must; with a checkpoint, which rank 0 writes."""
    strategy = learner.strategy
    if saves:
        state = replace(state, positions=tuple(at for at in strategy.gather(state.position) if at is not None))
    with tempfile.TemporaryDirectory() as directory:
        if saves and strategy.rank == 0:
            checkpoint.save(Path(directory), learner.model, learner.optimizer, state)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint(directory) if saves and strategy.rank == 0 else None)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
