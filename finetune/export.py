"""A finished run on disk: weights, tokenizer, config, and run.json last, whose presence means that the run is complete."""

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

from finetune.model import ADAPTER, MODEL
from plugins.template import Tokenizer
from plugins.types import RunManifest


def export(run: Path, checkpoint: Path, tokenizer: Tokenizer, manifest: RunManifest) -> None:
    """Put the weights of directory `checkpoint` and the tokenizer into `run`. What makes it complete is the manifest."""
    weights = manifest.weights(run)
    for left_over in (run / ADAPTER, run / MODEL):
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.copytree(checkpoint / weights.name, weights)
    if manifest.method == "lora":
        _name_base(weights / "adapter_config.json", manifest)
    saved: Any = tokenizer
    saved.save_pretrained(str(run))
    if manifest.method == "full":
        saved.save_pretrained(str(weights))  # so that model/ alone is a model


def _name_base(path: Path, manifest: RunManifest) -> None:
    """The base as the user named it: the path that the workers saw may be a copy that Ray deletes."""
    settings = json.loads(path.read_text())
    settings |= {"base_model_name_or_path": manifest.base, "revision": manifest.revision}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def versions() -> dict[str, str]:
    packages = ("ray", "torch", "transformers", "peft")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
