"""What one rank does, from its share of the rows to the trained weights."""

import tempfile
import time
from pathlib import Path

import ray
import ray.train
import torch

from finetune import checkpoint
from finetune import model as models
from finetune.config import FinetuneConfig
from finetune.data import Prepared, evaluation_batches, training_batches
from finetune.loop import Window, evaluate, make_optimizer, schedule, total_steps, training_step
from finetune.objective import objective_of
from finetune.strategy import strategy_of
from plugins import hardware


def run_rank(config: FinetuneConfig, prepared: "ray.ObjectRef[Prepared]") -> None:
    """The train function of Ray Train. Relative paths in `config` have been made absolute."""
    train = config.train
    hardware.use_threads(config.scaling.cpus)
    device = hardware.device(config.scaling.gpus)
    dtype = hardware.compute_dtype(config.model.dtype, device)
    strategy = strategy_of(config.strategy, device)
    rank, world_size = strategy.rank, strategy.world_size
    rows = ray.get(prepared)
    steps = total_steps(train, len(rows.train), world_size)

    torch.manual_seed(train.seed)  # the same new weights on every rank
    model = models.build(config, device)
    optimizer = make_optimizer(model, config.optim)
    first_step = 0
    if saved := ray.train.get_checkpoint():
        with saved.as_directory() as directory:
            first_step = checkpoint.load(Path(directory), model, optimizer)
    ranks_model = strategy.wrap(model)
    objective, rate = objective_of(config.objective), schedule(config.optim, steps)
    batches = training_batches(
        rows.train,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        rank=rank,
        world_size=world_size,
        seed=train.seed,
        first_step=first_step,
    )

    def held_out_loss() -> float:
        shares = evaluation_batches(rows.held_out, batch_size=train.batch_size, rank=rank, world_size=world_size)
        return evaluate(ranks_model, shares, objective=objective, strategy=strategy, dtype=dtype)

    if first_step == 0 and len(rows.held_out) > 0:  # the base's own loss: what the run is to be measured against
        ray.train.report({"step": 0, "steps": steps, "epoch": 0.0, "eval_loss": held_out_loss()})
    window = Window(time.perf_counter())
    for step in range(first_step + 1, steps + 1):
        torch.manual_seed(hash((train.seed, step, rank)))  # dropout is the same in a run that was resumed
        window.add(
            training_step(
                ranks_model,
                next(batches),
                objective=objective,
                optimizer=optimizer,
                strategy=strategy,
                clip=config.optim.clip,
                lr=rate(step - 1),
                dtype=dtype,
            )
        )
        is_last = step == steps
        evaluates = len(rows.held_out) > 0 and (is_last or _due(step, train.eval_every))
        saves = is_last or _due(step, config.checkpoint.every)
        if not (evaluates or saves or _due(step, train.log_every)):
            continue
        epoch = step * train.batch_size * train.accumulate * world_size / len(rows.train)
        metrics = window.close(time.perf_counter()) | {"step": step, "steps": steps, "epoch": epoch}
        if evaluates:
            metrics["eval_loss"] = held_out_loss()
        with tempfile.TemporaryDirectory() as directory:
            if saves and rank == 0:
                checkpoint.save(Path(directory), model, optimizer, step=step)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint(directory) if saves and rank == 0 else None)
        window = Window(time.perf_counter())  # evaluating and saving are no part of the training speed


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
