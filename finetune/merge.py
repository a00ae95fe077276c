"""A finished run -> a model directory that stands alone: base and adapter merged into one model, with the tokenizer.

Nothing of PEFT or of this project is needed to load it, and older versions of transformers read it too.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from plugins.merging import load_whole, merged
from plugins.model_files import check_model_files
from plugins.older_transformers import write_older_keys
from plugins.pretrained import load
from plugins.types import ModelSource, RunManifest

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    return load_whole(ModelSource(str(manifest.weights(run)), trust_remote_code=_trusted(manifest)))


def _merged(run: Path, manifest: RunManifest) -> tuple[Any, torch.dtype]:
    source = ModelSource(manifest.base, revision=manifest.revision, trust_remote_code=_trusted(manifest))
    check_model_files(source, f"run {manifest.name!r}: base")
    return merged(source, manifest.weights(run))


def _trusted(manifest: RunManifest) -> bool:
    return bool(manifest.config.get("model", {}).get("trust_remote_code"))
