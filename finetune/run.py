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
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from finetune import evaluate, preflight, track
from finetune.config import FinetuneConfig, Lora
from finetune.export import export, versions
from finetune.metrics_file import MetricsFile
from finetune.track import Tracker
from finetune.worker import run_rank
from plugins import cluster
from plugins.pretrained import first_line
from plugins.runs import CHECKPOINTS, CONFIG, RESOLVED, read_metrics
from plugins.spec import UserError, plain, render
from plugins.types import RunManifest

log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, *, config_file: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Run `config` to its end on the Ray cluster that runs here, or on one started for it; returns the run directory.

    `config_file` and `overrides` are kept with the run. Raises UserError before anything starts, for whatever is wrong
    with the config, the rows, the model or the size of the cluster.
    """
    track.check(config.track)
    ready = preflight.check(config, cluster.output_root())
    _say(ready)
    with _alone(ready.directory), cluster.connection():
        preflight.check_cluster(ready, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        _begin(ready, config, config_file)
        _say_start(config)
        started = time.monotonic()
        with track.opened(config, ready.directory) as trackers:
            with _progress(ready.directory, trackers):
                saved, metrics = _weights_to_export(_fit(ready), config)
            manifest = RunManifest(
                name=config.name,
                base=config.model.path if cluster.in_uploaded_copy() else ready.config.model.path,
                revision=config.model.revision,
                method="lora" if isinstance(config.method, Lora) else "full",
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - started, 1),
                steps=int(metrics["step"]),
                metrics=metrics | _base_metrics(ready.directory),
                overrides=list(overrides),
                config=plain(config),
                versions=versions(),
            )
            with saved.as_directory() as directory:
                export(ready.directory, Path(directory), ready.tokenizer, manifest)
            if config.scoring:
                scores = evaluate.score(ready.config, ready.directory, ready.rows.held_out, ready.tokenizer)
                manifest = replace(manifest, metrics=manifest.metrics | scores)
            manifest.write(ready.directory)
            for tracker in trackers:
                tracker.finish(manifest.metrics)
    log.info("run %s is finished: %s", config.name, ready.directory)
    return ready.directory


def _say(ready: preflight.Ready) -> None:
    rows, config = ready.rows, ready.config
    log.info(
        "%d rows to learn from, %d held out; %d of %d weights trained; %d steps",
        len(rows.train), len(rows.held_out), ready.trained_weights, ready.weights, ready.steps,
    )  # fmt: skip
    if said := rows.counts.words(config.data.max_length):
        log.info("%s", said)


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
            checkpoint_config=_checkpoints(config),
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


def _checkpoints(config: FinetuneConfig) -> CheckpointConfig:
    """The newest always stays, to go on from; those that stay besides are the newest, or the best where that is exported."""
    if config.checkpoint.export == "last":
        return CheckpointConfig(num_to_keep=config.checkpoint.keep)
    return CheckpointConfig(
        num_to_keep=config.checkpoint.keep, checkpoint_score_attribute="eval_loss", checkpoint_score_order="min"
    )


def _weights_to_export(result: Result, config: FinetuneConfig) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint, and the line of metrics that came with it: the last, or that with the lowest held-out loss."""
    assert result.checkpoint is not None  # the last step always saves
    assert result.metrics is not None
    if config.checkpoint.export == "last":
        return result.checkpoint, result.metrics
    evaluated = [(saved, metrics) for saved, metrics in result.best_checkpoints or [] if "eval_loss" in metrics]
    saved, metrics = min(evaluated, key=lambda found: found[1]["eval_loss"])
    log.info("step %d had the lowest held-out loss: its weights are taken", metrics["step"])
    return saved, metrics


def _base_metrics(run: Path) -> dict[str, float]:
    """The base's held-out loss, from the first line of metrics.jsonl."""
    first = read_metrics(run)[0]
    return {"base_eval_loss": first["eval_loss"]} if first["step"] == 0 else {}


@contextmanager
def _progress(run: Path, trackers: Sequence[Tracker]) -> Iterator[None]:
    """Log the lines of metrics.jsonl as they come, and hand every line to `trackers` once, until the block ends."""
    ended = threading.Event()

    def follow() -> None:
        before = {line["step"] for line in read_metrics(run)}  # of an earlier attempt
        seen: set[int] = set()
        while True:
            last_look = ended.wait(0.5)
            for line in read_metrics(run):
                if line["step"] in seen:
                    continue
                seen.add(line["step"])
                for tracker in trackers:
                    tracker.log(line)
                if line["step"] not in before:
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
    if "accuracy" in metrics:
        line += f"  chosen ahead {metrics['accuracy']:.0%}"
    if "eval_loss" in metrics:
        line += f"  held-out loss {metrics['eval_loss']:.4f}"
    return line + (f" (chosen ahead {metrics['eval_accuracy']:.0%})" if "eval_accuracy" in metrics else "")
