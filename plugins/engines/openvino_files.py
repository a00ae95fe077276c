"""A model in OpenVINO's format: exported once by an environment of its own, and kept, by content, for whoever asks next."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from plugins.environments import Environment
from plugins.older_transformers import write_older_keys
from plugins.pretrained import first_line
from plugins.spec import UserError
from plugins.types import ModelSource

log = logging.getLogger(__name__)

ENVIRONMENT = "openvino-export"
SCRIPT = Path(__file__).with_name("openvino_export.py")
# What of a model's files is exported.
READ = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py")
SAYS = "export: "  # how a line of the script begins that is meant for the user


def exported(source: ModelSource, weights: str) -> Path:
    """The directory of `source` in OpenVINO's format with such `weights`; it is written where there is none yet.

    Raises UserError, where it has to be written, for an environment that is missing and a model that cannot be exported.
    """
    model = _directory(source)
    folder = _cache() / _key(model, weights)
    if folder.is_dir():
        return folder
    python = _python(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_suffix(".lock")):
        if not folder.is_dir():  # another process may have written it meanwhile
            _export(python, source, model, folder, weights)
    return folder


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MANTA_CACHE") or Path(home) / "manta") / "openvino"


def _directory(source: ModelSource) -> Path:
    if source.is_local:
        return Path(source.path).expanduser().absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=list(READ)))
    except (OSError, ValueError) as error:
        raise UserError(f"{source.path!r} is no directory here, and cannot be fetched: {first_line(error)}") from error


def _files(model: Path) -> list[Path]:
    return sorted({file for pattern in READ for file in model.glob(pattern)})


def _key(model: Path, weights: str) -> str:
    """Of all that decides what the export writes, but not of where anything lies."""
    whole = hashlib.sha256(repr((weights, version("openvino"))).encode() + SCRIPT.read_bytes())
    for file in _files(model):
        with file.open("rb") as content:
            whole.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()[:40]


def _python(source: ModelSource) -> str:
    """The Python that exports."""
    environment = Environment.find(ENVIRONMENT)
    if problem := environment.problem():
        raise UserError(f"{source.path!r} has to be exported to OpenVINO's format, and {problem}")
    return environment.python


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Whatever else wants `lock` waits, on this machine or another that shares the directory."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which exports the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _export(python: str, source: ModelSource, model: Path, folder: Path, weights: str) -> None:
    """Write `folder`, whole or not at all."""
    started = time.monotonic()
    log.info(
        "exporting %s to OpenVINO's format, weights=%r: once, then it is in %s", source.path, weights, folder.parent
    )
    partial = folder.with_suffix(".partial")  # of one that was killed, where there is one: we are alone here
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _prepare(model, partial / "source")
    wanted = {
        "model": str(partial / "source"),
        "folder": str(partial),
        "weights": weights,
        "trust_remote_code": source.trust_remote_code,
    }
    # -P: or else the files beside the script would hide libraries of the same name.
    command = [python, "-P", str(SCRIPT), json.dumps(wanted)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(SAYS):
                    log.info("%s", line.strip())
        if process.returncode:
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
            shutil.rmtree(partial)
            reason = said[-1] if said else f"exit code {process.returncode}"
            raise UserError(f"{source.path!r} cannot be exported to OpenVINO's format: {reason}")
    shutil.rmtree(partial / "source")
    partial.rename(folder)
    size = (folder / "openvino_model.bin").stat().st_size
    log.info("exported %s: %.0f MiB in %.0f s", source.path, size / 2**20, time.monotonic() - started)


def _prepare(model: Path, prepared: Path) -> None:
    """`model` as the older transformers of the export reads it rightly; weights are linked, not copied."""
    prepared.mkdir()
    for file in _files(model):
        if file.suffix == ".json":
            shutil.copyfile(file, prepared / file.name)
        else:
            (prepared / file.name).symlink_to(file.resolve())
    write_older_keys(prepared)
