"""A finished run -> a repository of the Hugging Face hub, with a model card that says what it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined] # of httpx, or httpx2
from transformers import AutoTokenizer

from plugins.pretrained import first_line, load
from plugins.spec import UserError
from plugins.types import ModelSource, RunManifest


def create(repo: str, *, private: bool) -> str:
    """Make model repository `repo` on the hub, if it is not there; returns its full id.

    Raises UserError where there is no token, the hub refuses, or `private` is wanted of a repository that is public.
    """
    if huggingface_hub.get_token() is None:
        raise UserError("push: the hub wants a token: set HF_TOKEN, or run hf auth login")
    hub = huggingface_hub.HfApi()
    try:
        made = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        is_public = private and not hub.model_info(made).private
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"push = {repo!r}: {_reason(error)}") from error
    if is_public:  # it was there before
        raise UserError(f"push = {made!r}: everyone can read this repository: name another one for --private")
    return made


def upload(repo: str, folder: Path, message: str) -> str:
    """Send all files of `folder` to `repo` in one commit; returns where to look at it. Raises UserError."""
    try:
        huggingface_hub.HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"push = {repo!r}: {_reason(error)}") from error
    return f"{huggingface_hub.constants.ENDPOINT}/{repo}"


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or error.response.reason_phrase
        return f"the hub refuses ({error.response.status_code}: {first_line(Exception(said))})"
    if isinstance(error, HTTPError):
        return f"{huggingface_hub.constants.ENDPOINT} cannot be reached: {first_line(error)}"
    return first_line(error)


def write_adapter(run: Path, manifest: RunManifest, directory: Path) -> None:
    """The adapter of a finished run (PEFT's format) and the tokenizer into `directory`; the base by its name only."""
    shutil.copytree(manifest.weights(run), directory, dirs_exist_ok=True)
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": base_name(manifest)}
    path.write_text(json.dumps(settings, indent=2) + "\n")
    load(AutoTokenizer, ModelSource(str(run))).save_pretrained(str(directory))


def base_name(manifest: RunManifest) -> str:
    """The base's hub id; of a base that is a directory here, only the directory's name."""
    source = ModelSource(manifest.base)
    return Path(source.path).name if source.is_local else source.path


SETTINGS = ("method", "objective", "optim", "train", "scaling")  # the parts of a config that a card shows
PROGRESS = ("step", "steps", "epoch", "lr", "grad_norm", "tokens_per_s")  # of a metrics line: no result


def model_card(manifest: RunManifest, *, repo: str, adapter: bool) -> str:
    """README.md of `repo`, which holds the run's adapter or its whole model: what it is, of what, how made, how to load it.

    It says nothing of the machine that made it: files and directories are named without their place.
    """
    base, config = base_name(manifest), manifest.config
    data = config.get("data", {})
    sources = [*_sources(data.get("source")), *_sources(data.get("validation"))]
    results = {name: value for name, value in manifest.metrics.items() if name not in PROGRESS}
    settings = {
        key if field == "type" else f"{key}.{field}": value
        for key in SETTINGS
        for field, value in config.get(key, {}).items()
        if value not in (None, False, [])
    }
    lora = "LoRA adapter for" if adapter else "LoRA finetune (the adapter is merged in) of"
    kind = lora if manifest.method == "lora" else "full finetune of"
    lines = [
        *_front_matter(manifest, [name for name, on_hub in sources if on_hub], adapter=adapter),
        f"# {repo.rpartition('/')[2]}\n",
        f"A {kind} `{base}`, trained for {manifest.steps} steps with Manta ({manifest.created[:10]}).\n",
        "## Use\n",
        *(_adapter_use(base, repo) if adapter else _model_use(repo)),
        "## Data\n",
        f"Rows: {', '.join(f'`{name}`' for name, _ in sources) or 'not known'}.",
        f"{_processing(data)}\n",
        "## Training\n",
        *_table("setting", settings),
        "## Results\n",
        "Losses are means over the tokens of the answers; `base_eval_loss` is the base's own, before training.\n",
        *_table("metric", results),
        "Made with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(manifest: RunManifest, data_sets: list[str], *, adapter: bool) -> list[str]:
    """What the hub itself reads of a card. It may name only what is on the hub."""
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if not ModelSource(manifest.base).is_local:
        lines.append(f"base_model: {manifest.base}")
        lines.append(f"base_model_relation: {'adapter' if adapter else 'finetune'}")
    if data_sets:
        lines += ["datasets:", *(f"- {name}" for name in dict.fromkeys(data_sets))]
    return [*lines, "---\n"]


def _model_use(repo: str) -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        "```\n",
        "Or with Manta, as `manta serve my_serve.py`:\n",
        "```python",
        "from serve import *\n",
        f'model = ServedModel(id="{repo.rpartition("/")[2]}", source=ModelSource("{repo}"))',
        "config = ServeConfig(models=(model,))",
        "```\n",
    ]


def _adapter_use(base: str, repo: str) -> list[str]:
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        "```\n",
        "`manta serve` serves it from the run's directory, beside its base; or merged, as any model:",
        '`model.merge_and_unload().save_pretrained("merged")`, `tokenizer.save_pretrained("merged")`, and',
        '`ServedModel(id="merged", source=ModelSource("merged"))`.\n',
    ]


def _sources(found: Any) -> list[tuple[str, bool]]:
    """The names of the sources in a part of a config, and of each whether it is on the hub."""
    if isinstance(found, list):
        return [name for member in found for name in _sources(member)]
    if not isinstance(found, dict):
        return []
    if "path" in found:
        return [(Path(found["path"]).name, False)]
    if found.get("type") == "Hub":
        source = ModelSource(found["name"])  # the same rule: a directory, or an id of the hub
        return [(Path(source.path).name, False) if source.is_local else (source.path, True)]
    return [name for member in found.values() for name in _sources(member)]


def _processing(data: dict[str, Any]) -> str:
    processor = data.get("processor")
    name = processor.get("type") if isinstance(processor, dict) else processor
    held_out = data.get("validation")
    share = f", {held_out:.0%} of the rows held out" if isinstance(held_out, float) and held_out else ""
    return f"Made into examples by `{name}`, of up to {data.get('max_length')} tokens{share}."


def _table(head: str, values: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return [f"| {head} | |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
