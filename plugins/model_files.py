"""What the directory of a model, or of an adapter, must hold, checked before anything heavy loads it."""

from pathlib import Path

from plugins.spec import UserError
from plugins.types import ModelSource

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_model_files(source: ModelSource, field: str) -> None:
    """Raise UserError, naming `field`, where `source` is a directory that is not a whole model. Hub ids pass."""
    if not source.is_local:
        return
    directory = Path(source.path).expanduser()
    named = f"{field} = {source.path!r}"
    if not directory.is_dir():
        raise UserError(f"{named}: no such directory" + ("" if directory.is_absolute() else f" in {Path.cwd()}"))
    if not (directory / "config.json").is_file():
        raise UserError(f"{named}: no config.json there, so it is not a model directory")
    if not any(True for pattern in WEIGHTS for _ in directory.glob(pattern)):
        raise UserError(f"{named}: no weights there ({' or '.join(WEIGHTS)})")
    if not has_tokenizer(directory):
        raise UserError(
            f"{named}: no tokenizer there; put the model's tokenizer.json and tokenizer_config.json beside it"
        )


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
