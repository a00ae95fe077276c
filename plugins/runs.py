"""Run directories, `outputs/<run>/`: what lies where, and which there are. They are the registry of finetuned models."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.spec import UserError
from plugins.types import RunManifest

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
CONFIG = "config.py"
CHECKPOINTS = "checkpoints"
RESOLVED = "config.json"  # the config with its overrides, as JSON


@dataclass(frozen=True)
class Run:
    """A run directory as it stands. `manifest` is None until the run is finished; `progress` is its last metrics line."""

    path: Path
    manifest: RunManifest | None
    progress: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.path.name


def read_run(path: Path) -> Run:
    lines = read_metrics(path)
    return Run(path, RunManifest.read(path), lines[-1] if lines else None)


def finished(run: Path) -> RunManifest:
    """The manifest of run directory `run`. Raises UserError for a run that is unfinished or has lost its weights."""
    found = read_run(run)
    if found.manifest is None:
        came = f"step {found.progress['step']} of {found.progress['steps']}" if found.progress else "nothing yet"
        raise UserError(f"run {run.name!r} is not finished ({came}): manta finetune with its config goes on with it")
    if not found.manifest.weights(run).is_dir():
        raise UserError(f"run {run.name!r} has lost its weights: no {found.manifest.weights(run)}")
    return found.manifest


def find_runs(output: Path) -> list[Run]:
    """The runs in `output`, finished or not, by name."""
    if not output.is_dir():
        return []
    runs = []
    for folder in sorted(filter(is_run, output.iterdir())):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            log.warning("%s is left out: %s", folder, error)
    return runs


def is_run(folder: Path, *, or_model: bool = False) -> bool:
    """Whether a run has begun in `folder`; with `or_model` that may be a model instead, which has a config.json too."""
    markers = (
        (RunManifest.FILE, METRICS, CHECKPOINTS) if or_model else (RunManifest.FILE, RESOLVED, METRICS, CHECKPOINTS)
    )
    return any((folder / marker).exists() for marker in markers)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl that may still be written to; none where there is no file yet."""
    path = run / METRICS
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def drop_metrics_from(run: Path, step: int) -> None:
    """Drop the lines from `step` on: a resumed run does these steps again."""
    lines = [line for line in read_metrics(run) if line["step"] < step]
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def same_base(first: str, second: str) -> bool:
    """Whether two model paths mean the same base: the same hub id, or the same directory."""
    if first == second:
        return True
    one, other = Path(first).expanduser(), Path(second).expanduser()
    return one.is_dir() and other.is_dir() and one.resolve() == other.resolve()
