"""The driver's side of a run: a config -> Ray Train -> a finished run directory."""

import fcntl
import functools
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from finetune import preflight
from finetune.config import FinetuneConfig, Lora
from finetune.export import export, versions
from finetune.worker import run_rank
from plugins import cluster
from plugins.pretrained import first_line
from plugins.runs import CHECKPOINTS, CONFIG, METRICS, RESOLVED, drop_metrics_from, read_metrics
from plugins.spec import UserError, plain, render
from plugins.types import RunManifest

log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, *, config_file: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Run `config` to its end on the Ray cluster that runs here, or on one started for it; returns the run directory.

    `config_file` and `overrides` are kept with the run. Raises UserError before anything starts, for whatever is wrong
    with the config, the rows, the model or the size of the cluster.
    """
    ready = preflight.check(config, cluster.output_root())
    _say(ready)
    with _alone(ready.directory), cluster.connection():
        preflight.check_cluster(ready, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        _begin(ready, config, config_file)
        _say_start(config)
        started = time.monotonic()
        with _progress(ready.directory):
            result = _fit(ready)
        metrics = _final_metrics(ready.directory)
        manifest = RunManifest(
            name=config.name,
            base=config.model.path if cluster.in_uploaded_copy() else ready.config.model.path,
            revision=config.model.revision,
            method="lora" if isinstance(config.method, Lora) else "full",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 1),
            steps=int(metrics["step"]),
            metrics=metrics,
            overrides=list(overrides),
            config=plain(config),
            versions=versions(),
        )
        assert result.checkpoint is not None  # the last step always saves
        with result.checkpoint.as_directory() as saved:
            export(ready.directory, Path(saved), ready.tokenizer, manifest)
    log.info("run %s is finished: %s", config.name, ready.directory)
    return ready.directory


def _say(ready: preflight.Ready) -> None:
    rows, config = ready.rows, ready.config
    log.info(
        "%d rows to learn from, %d held out; %d of %d weights trained; %d steps",
        len(rows.train), len(rows.held_out), ready.trained_weights, ready.weights, ready.steps,
    )  # fmt: skip
    if rows.cut or rows.left_out:
        log.info("%d rows were cut to %d tokens, %d left out", rows.cut, config.data.max_length, rows.left_out)


def _say_start(config: FinetuneConfig) -> None:
    scaling = config.scaling
    wanted, free = scaling.workers * scaling.cpus, ray.available_resources().get("CPU", 0.0)
    log.info("starting %d worker%s", scaling.workers, "s" * (scaling.workers > 1))
    if wanted > free:
        log.info("waiting for %g CPUs: %g are free (manta status shows what runs, manta stop ends it)", wanted, free)


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Hold the run, so that no other process writes to it. The lock goes with the process that has it."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f".{run.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"run {run.name!r} is being trained by another process: choose another name=...") from error
        yield


def _begin(ready: preflight.Ready, config: FinetuneConfig, config_file: Path | None) -> None:
    """The run directory as the run finds it: empty, or as an unfinished run of the same name left it."""
    if not config.checkpoint.resume:
        shutil.rmtree(ready.directory, ignore_errors=True)
    ready.directory.mkdir(parents=True, exist_ok=True)
    text = config_file.read_text() if config_file else f"from finetune import *\n\nconfig = {render(config)}\n"
    (ready.directory / CONFIG).write_text(text)
    (ready.directory / RESOLVED).write_text(json.dumps(plain(config), indent=2) + "\n")
    if (ready.directory / CHECKPOINTS).exists():
        log.info("going on where run %s stopped", config.name)


def _fit(ready: preflight.Ready) -> Result:
    config, scaling = ready.config, ready.config.scaling
    trainer = TorchTrainer(
        functools.partial(run_rank, config, ray.put(ready.rows)),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.gpus > 0,
            resources_per_worker={"CPU": scaling.cpus} | ({"GPU": scaling.gpus} if scaling.gpus else {}),
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=str(ready.directory),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            # Ray's own limits are none: what cannot work would be tried for ever.
            failure_config=FailureConfig(max_failures=1, controller_failure_limit=1),  # type: ignore[call-arg]
            callbacks=[MetricsFile(str(ready.directory))],  # type: ignore[list-item]
        ),
    )
    try:
        return trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise UserError(str(failure)) from error
        raise
    except ControllerError as error:
        raise UserError(f"Ray could not start the workers: {first_line(error)}") from error


class MetricsFile(UserCallback):
    """Writes each report of rank 0 to metrics.jsonl. Ray Train calls it in its controller, on the driver's node."""

    def __init__(self, run: str) -> None:
        self.run = Path(run)
        self.attempt_begins = True

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        line = metrics[0]
        if self.attempt_begins:
            drop_metrics_from(self.run, line["step"])
            self.attempt_begins = False
        with (self.run / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.attempt_begins = True  # the next attempt goes back to the last checkpoint


def _final_metrics(run: Path) -> dict[str, float]:
    """The last line of metrics.jsonl, and the base's held-out loss from its first."""
    lines = read_metrics(run)
    base = {"base_eval_loss": lines[0]["eval_loss"]} if lines[0]["step"] == 0 else {}
    return lines[-1] | base


@contextmanager
def _progress(run: Path) -> Iterator[None]:
    """Log the lines of metrics.jsonl as they come, until the block ends."""
    ended = threading.Event()

    def follow() -> None:
        seen = {line["step"] for line in read_metrics(run)}
        while True:
            last_look = ended.wait(0.5)
            for line in read_metrics(run):
                if line["step"] not in seen:
                    seen.add(line["step"])
                    log.info("%s", progress_line(line))
            if last_look:
                return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def progress_line(metrics: dict[str, Any]) -> str:
    """A line of metrics.jsonl for people. Step 0 is the base, before anything was learned."""
    line = f"step {metrics['step']}/{metrics['steps']}"
    if "loss" in metrics:
        line += f"  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {metrics['tokens_per_s']:,.0f} tokens/s"
    return line + (f"  held-out loss {metrics['eval_loss']:.4f}" if "eval_loss" in metrics else "")
