"""What transformers has saved, loaded for inference; whatever is wrong with it is one line for the user."""

from pathlib import Path
from typing import Any

import transformers

from plugins import hardware
from plugins.spec import UserError
from plugins.types import ModelSource

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_model(source: ModelSource) -> Any:
    """The model of `source` on this process's device, in its compute dtype. Raises UserError where there is none."""
    where = _directory(source)
    if where is not None and not (where / "config.json").is_file():
        raise UserError(f"model directory {where} has no config.json: it is not a transformers model")
    device = hardware.device()
    dtype = hardware.compute_dtype(source.dtype, device)
    five = int(transformers.__version__.split(".")[0]) >= 5
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            where or source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            **{"dtype" if five else "torch_dtype": dtype},
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {source.path}: {first_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of `source`. Raises UserError where there is none."""
    where = _directory(source)
    if where is not None and not has_tokenizer(where):
        raise UserError(f"model directory {where} has no tokenizer: put tokenizer.json and tokenizer_config.json there")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            where or source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {source.path}: {first_line(error)}") from error


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def first_line(error: Exception) -> str:
    """The first line of a library's message, for a message of one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _directory(source: ModelSource) -> Path | None:
    """Where `source` lies on disk; None for a hub id."""
    if not source.is_local:
        return None
    where = Path(source.path).expanduser()
    if not where.is_dir():
        raise UserError(f"ModelSource.path = {source.path!r}: no such directory")
    return where
