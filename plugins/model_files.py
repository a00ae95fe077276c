"""What the directory of a model, or of an adapter, must hold, checked before anything heavy loads it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from plugins.spec import UserError
from plugins.types import ModelSource

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
OPENVINO = "openvino_model.xml"  # its weights lie beside it, in openvino_model.bin
BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")  # what there is of use besides weights
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_model_files(source: ModelSource, field: str, weights: Sequence[str] = WEIGHTS) -> None:
    """Raise UserError, naming `field`, where `source` is a directory that is not a whole model. Hub ids pass.

    `weights`: patterns of names, of which its weights have one.
    """
    if not source.is_local:
        return
    directory = Path(source.path).expanduser()
    named = f"{field} = {source.path!r}"
    if not directory.is_dir():
        raise UserError(f"{named}: no such directory" + ("" if directory.is_absolute() else f" in {Path.cwd()}"))
    if not (directory / "config.json").is_file():
        raise UserError(f"{named}: no config.json there, so it is not a model directory")
    if not has_weights(directory, weights):
        if is_openvino(directory):
            raise UserError(f"{named}: it is in OpenVINO's format, which only engine=OpenVino() serves")
        raise UserError(f"{named}: no weights there ({' or '.join(weights)})")
    if not has_tokenizer(directory):
        raise UserError(
            f"{named}: no tokenizer there; put the model's tokenizer.json and tokenizer_config.json beside it"
        )


def has_weights(directory: Path, patterns: Sequence[str] = (*WEIGHTS, OPENVINO)) -> bool:
    return any(True for pattern in patterns for _ in directory.glob(pattern))


def is_openvino(directory: Path) -> bool:
    return (directory / OPENVINO).is_file()


def quantization(directory: Path) -> str | None:
    """What the weights of the model in `directory` have been quantised by; None where they have not. Raises UserError."""
    if is_openvino(directory):
        return "OpenVINO"
    path = directory / "config.json"
    try:
        settings = json.loads(path.read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return None if settings is None else str(settings.get("quant_method"))


def copy_beside(model: Path, directory: Path, *, but: Sequence[str] = ()) -> None:
    """Copy into `directory` all of `model` that goes with its weights, except the files named `but`."""
    for file in {file for pattern in BESIDE for file in model.glob(pattern)}:
        if file.name not in but and not file.name.endswith(".index.json"):  # of weights in several files
            shutil.copyfile(file, directory / file.name)


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZERS)


def adapter_directory(run: Path) -> Path:
    """Where the adapter of run directory `run` lies. Raises UserError where there is none."""
    if not run.is_dir():
        raise UserError(f"run {run}: no such directory")
    if not (run / "adapter").is_dir():
        if (run / "model").is_dir():
            raise UserError(f"run {run} is a full finetune, not an adapter: serve {run / 'model'} as a model")
        raise UserError(f"run {run} has no adapter/: it is not a finished LoRA run")
    return run / "adapter"
