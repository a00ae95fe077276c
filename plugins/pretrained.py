"""Loading what transformers has saved, with whatever is wrong in one line for the user."""

from pathlib import Path
from typing import Any

from plugins.model_files import BESIDE
from plugins.spec import UserError
from plugins.types import ModelSource

READ = (*BESIDE, "*.safetensors", "*.bin")  # all that there is of use in a model's directory


def load(loader: Any, source: ModelSource, **options: Any) -> Any:
    """`loader.from_pretrained` of `source`; the loader is one of transformers' Auto classes. Raises UserError."""
    path = str(Path(source.path).expanduser()) if source.is_local else source.path
    trust = source.trust_remote_code
    try:
        return loader.from_pretrained(path, revision=source.revision, trust_remote_code=trust, **options)
    except (OSError, ValueError, ImportError) as error:  # ImportError: a library for its kind of weights
        what = repr(source.path) if source.is_local else f"{source.path!r} is no directory here, and as a hub id it"
        raise UserError(f"{what} cannot be loaded ({loader.__name__}): {first_line(error)}") from error


def directory_of(source: ModelSource) -> Path:
    """Where the model lies; one of the hub is fetched if need be. Raises UserError."""
    if source.is_local:
        return Path(source.path).expanduser().absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=list(READ)))
    except (OSError, ValueError) as error:
        raise UserError(f"{source.path!r} is no directory here, and cannot be fetched: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of a library's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
