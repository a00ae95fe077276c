"""Model directories that older versions of transformers read right too.

transformers 5 saves some settings under new names. Version 4 passes over those without a word, computes with its defaults
(other rotary positions, and so other text), or cannot load the tokenizer. Here the older names are written beside the
new ones; version 5 reads both, and finds the same values in them.
"""

import json
from pathlib import Path
from typing import Any

# What GPT-NeoX calls that which all others call by the names on the left.
NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
OUTSIDE = ("rope_theta", "partial_rotary_factor")  # once beside `rope_scaling`, now in `rope_parameters`


def write_older_keys(directory: Path) -> None:
    """Add the names of transformers 4 to config.json and tokenizer_config.json of the model in `directory`."""
    _rewrite(directory / "config.json", _with_older_settings)
    if (directory / "tokenizer_config.json").is_file():
        _rewrite(directory / "tokenizer_config.json", _with_older_tokenizer)


def _rewrite(path: Path, change: Any) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2, ensure_ascii=False) + "\n")


def _with_older_settings(settings: dict[str, Any]) -> dict[str, Any]:
    older: dict[str, Any] = {}
    if settings.get("dtype"):
        older["torch_dtype"] = settings["dtype"]
    rope = settings.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3: one kind of layer looks at all, another at what is near
        older["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta")
        rope = rope["full_attention"] or {}
    names = NEOX_NAMES if settings.get("model_type") == "gpt_neox" else {}
    older |= {names.get(key, key): rope[key] for key in OUTSIDE if key in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in OUTSIDE}
    return settings | {key: value for key, value in older.items() if value is not None}


def _with_older_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """Both versions know the names that come out; the tokens themselves are in tokenizer.json."""
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings
