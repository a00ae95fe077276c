"""A finished run -> a model directory that stands alone: base and adapter merged into one model, with the tokenizer.

Nothing of PEFT or of this project is needed to load it, and older versions of transformers read it too.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from plugins.model_files import check_model_files
from plugins.older_transformers import write_older_keys
from plugins.pretrained import first_line, load
from plugins.spec import UserError
from plugins.types import ModelSource, RunManifest

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_free(directory: Path) -> None:
    """Raise UserError where a new `directory` cannot be made: there is something already, or no way to write."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"merged = {str(directory)!r}: there are files already; name a directory that is new or empty")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory.parent).close()
    except OSError as error:
        raise UserError(f"merged = {str(directory)!r}: cannot be written ({error.strerror})") from error


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` when the block ends well, and is gone when it does not."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        partial = Path(scratch) / directory.name
        partial.mkdir()
        yield partial
        partial.rename(directory)


def write_model(run: Path, manifest: RunManifest, directory: Path, dtype: Dtype | None = None) -> None:
    """The whole model of a finished run into the empty `directory`, its weights as `dtype`.

    None is what the base was saved in; a full finetune stays as it is. Merging is done in fp32. Raises UserError for a base
    that is gone, and for an adapter that does not fit it.
    """
    if manifest.method == "full" and dtype is None:
        shutil.copytree(manifest.weights(run), directory, dirs_exist_ok=True)
    else:
        model, saved_dtype = _full(run, manifest) if manifest.method == "full" else _merged(run, manifest)
        model.to(DTYPES[dtype] if dtype else saved_dtype).save_pretrained(str(directory))
        load(AutoTokenizer, ModelSource(str(run))).save_pretrained(str(directory))
    write_older_keys(directory)


def _full(run: Path, manifest: RunManifest) -> tuple[Any, torch.dtype]:
    return _load(ModelSource(str(manifest.weights(run)), trust_remote_code=_trusted(manifest)))


def _merged(run: Path, manifest: RunManifest) -> tuple[Any, torch.dtype]:
    source = ModelSource(manifest.base, revision=manifest.revision, trust_remote_code=_trusted(manifest))
    check_model_files(source, f"run {manifest.name!r}: base")
    base, dtype = _load(source)
    return merge(base, manifest.weights(run)), dtype


def _load(source: ModelSource) -> tuple[Any, torch.dtype]:
    """A model in fp32, and the dtype that it was saved in."""
    saved = load(AutoConfig, source).dtype
    return load(AutoModelForCausalLM, source, dtype=torch.float32), saved or torch.float32


def _trusted(manifest: RunManifest) -> bool:
    return bool(manifest.config.get("model", {}).get("trust_remote_code"))


def merge(base: Any, adapter: Path) -> Any:
    """`base`, a model of transformers, with the adapter in directory `adapter` (PEFT's format) worked into its weights.

    Raises UserError for an adapter that does not fit the base.
    """
    unfit = f"adapter {adapter} does not fit its base"
    try:
        settings = peft.PeftConfig.from_pretrained(str(adapter))
        weights = peft.load_peft_weights(str(adapter), device="cpu")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"adapter {adapter} cannot be read: {first_line(error)}") from error
    tied = _untie(base) if not getattr(settings, "ensure_weight_tying", False) else False
    settings.inference_mode, settings.base_model_name_or_path = True, base.name_or_path
    try:
        model = peft.get_peft_model(base, settings)
    except ValueError as error:
        raise UserError(f"{unfit}: {first_line(error)}") from error
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(wanted.keys() ^ weights.keys()):
        raise UserError(f"{unfit}: only one of them has {name}")
    for name, weight in weights.items():
        if weight.shape != wanted[name].shape:
            raise UserError(f"{unfit}: {name} is {tuple(weight.shape)}, and {tuple(wanted[name].shape)} is needed")
    peft.set_peft_model_state_dict(model, weights)
    merged: Any = model.merge_and_unload()
    if tied and torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    return merged


def _untie(model: Any) -> bool:
    """Give tied output embeddings weights of their own; returns whether they were tied.

    An adapter of one of the two leaves the other as it was in training. Merged into the weights that they share, it would
    change both.
    """
    output = model.get_output_embeddings()
    if not model.config.tie_word_embeddings or output is None:
        return False
    output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True
