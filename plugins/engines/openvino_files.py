"""A model in OpenVINO's format: exported once by an environment of its own, and kept, by content, for whoever asks next."""

import fcntl
import hashlib
import json
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from plugins.cache_folder import cache_folder
from plugins.engines import OpenVino
from plugins.environments import Environment
from plugins.model_files import copy_beside, is_openvino, quantization
from plugins.older_transformers import write_older_keys
from plugins.pretrained import READ, directory_of
from plugins.spec import UserError
from plugins.types import ModelSource

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("openvino_export.py")
SAYS = "export: "  # how a line of the script begins that is meant for the user


def exported(source: ModelSource, weights: str, adapter: Path | None = None) -> Path:
    """The directory of `source` in OpenVINO's format with such `weights`; it is written where there is none yet.

    `adapter`: a directory in PEFT's format; it is worked into the weights. Raises UserError, where it has to be written,
    for an environment that is missing, and for a model and an adapter that cannot be exported.
    """
    model = directory_of(source)
    if is_openvino(model):
        _check_as_it_is(model, weights, adapter)
        return model
    folder = cache_folder("openvino") / _key(model, weights, adapter)
    if folder.is_dir():
        return folder
    python = _python(f"{source.path!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_suffix(".lock")):
        if not folder.is_dir():  # another process may have written it meanwhile
            log.info("what is exported now is kept in %s", folder.parent)
            for left in folder.parent.glob(f"{folder.name}.*.partial"):  # by one that was killed
                shutil.rmtree(left)
            # A name of its own: the script of one that was killed may still be writing.
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".partial"))
            try:
                _export(python, source, weights, adapter, partial)
            except BaseException:
                shutil.rmtree(partial)
                raise
            partial.rename(folder)
    return folder


def check_export(source: ModelSource, weights: str, field: str) -> None:
    """Raise UserError, naming `field`, where the local `source` has yet to be exported and there is nothing that does it."""
    try:
        _python(f"{field} = {source.path!r}")
    except UserError:
        model = directory_of(source)
        # The key last: it takes reading all of the model.
        if not is_openvino(model) and not (cache_folder("openvino") / _key(model, weights)).is_dir():
            raise


def write(source: ModelSource, weights: str, folder: Path) -> None:
    """Write `source` into the empty `folder` as a model in OpenVINO's format that stands alone, with such `weights`.

    Raises UserError as `exported` does.
    """
    _export(_python(f"{source.path!r}"), source, weights, None, folder)
    copy_beside(directory_of(source), folder)  # for those that the export has written anew


def _check_as_it_is(model: Path, weights: str, adapter: Path | None) -> None:
    """Raise UserError where more is wanted of `model`, which is in OpenVINO's format already, than to serve it."""
    if weights != "same":
        raise UserError(f"OpenVino.weights = {weights!r}: {model} is in OpenVINO's format already; leave it at 'same'")
    if adapter is not None:
        raise UserError(
            f"{model} is in OpenVINO's format already, and takes no adapter: serve the model that it was made of, "
            f"or what manta quantize makes of {adapter.parent}"
        )


def _files(model: Path) -> list[Path]:
    return sorted({file for pattern in READ for file in model.glob(pattern)})


def _key(model: Path, weights: str, adapter: Path | None = None) -> str:
    """Of all that decides what the export writes, but not of where anything lies."""
    whole = hashlib.sha256(repr((weights, version("openvino"))).encode() + SCRIPT.read_bytes())
    for file in [*_files(model), *(_files(adapter) if adapter else ())]:
        with file.open("rb") as content:
            whole.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()[:40]


def _python(model: str) -> str:
    """The Python that exports, for what is called `model` in the UserError where there is none."""
    environment = Environment.find(OpenVino.exporter)
    if problem := environment.problem():
        raise UserError(f"{model} has to be exported to OpenVINO's format, and {problem}")
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


def _export(python: str, source: ModelSource, weights: str, adapter: Path | None, folder: Path) -> None:
    """Write into the empty `folder`. On an error, part of it may be there."""
    started = time.monotonic()
    name = f"{source.path} with {adapter}" if adapter else source.path
    log.info("exporting %s to OpenVINO's format, weights=%r", name, weights)
    with tempfile.TemporaryDirectory(dir=folder, prefix="source.") as prepared:
        if adapter:
            _merge(source, adapter, Path(prepared))
        else:
            _prepare(directory_of(source), Path(prepared))
        write_older_keys(Path(prepared))
        wanted = {
            "model": prepared,
            "folder": str(folder),
            "weights": weights,
            "trust_remote_code": source.trust_remote_code,
        }
        # -P: or else the files beside the script would hide libraries of the same name.
        _run([python, "-P", str(SCRIPT), json.dumps(wanted)], name)
    size = (folder / "openvino_model.bin").stat().st_size
    log.info("exported %s: %.0f MiB in %.0f s", name, size / 2**20, time.monotonic() - started)


def _run(command: list[str], name: str) -> None:
    """Run the script, showing what it says meanwhile."""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(SAYS):
                    log.info("%s", line.strip())
        if process.returncode:
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
            reason = said[-1] if said else f"exit code {process.returncode}"
            raise UserError(f"{name!r} cannot be exported to OpenVINO's format: {reason}")


def _prepare(model: Path, prepared: Path) -> None:
    """The files of `model` for the export; weights are linked, not copied."""
    if method := quantization(model):
        raise UserError(f"{model} is quantised already ({method}): OpenVino takes the model that it was made of")
    for file in _files(model):
        if file.suffix == ".json":
            shutil.copyfile(file, prepared / file.name)
        else:
            (prepared / file.name).symlink_to(file.resolve())


def _merge(source: ModelSource, adapter: Path, prepared: Path) -> None:
    """Base and adapter as one model for the export."""
    from plugins.merging import merged  # PEFT takes seconds: only who serves adapters waits for it

    log.info("merging %s into its base", adapter)
    model, dtype = merged(source, adapter)
    model.to(dtype).save_pretrained(prepared)
    copy_beside(directory_of(source), prepared, but=("config.json",))  # which may have changed
