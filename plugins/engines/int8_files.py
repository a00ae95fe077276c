"""Models whose weights lie in their files as the torch engine computes with them: 8-bit integers, a scale for each output.

The format is compressed-tensors' (int-quantized, W8A8), which vLLM reads too, and transformers with that library; without,
it refuses the model. Tables of tokens and the last product stay as they are, and become integers when they are loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from plugins.engines.layers import in_int8, row_scales
from plugins.model_files import copy_beside
from plugins.pretrained import directory_of, load
from plugins.spec import UserError
from plugins.types import ModelSource

SCALE = "weight_scale"
INTEGERS: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEME: dict[str, Any] = {
    "weights": INTEGERS | {"strategy": "channel", "dynamic": False},
    "input_activations": INTEGERS | {"strategy": "token", "dynamic": True},
}


def write(source: ModelSource, directory: Path) -> None:
    """Write `source` into the empty `directory`. Raises UserError for a model without layers to quantise."""
    model = load(AutoModelForCausalLM, source, dtype="auto")
    head, state = model.get_output_embeddings(), model.state_dict()
    for name, layer in _linear(model):
        if layer is not head:
            scales = row_scales(layer.weight)
            state[f"{name}.weight"] = in_int8(layer.weight, scales)
            state[f"{name}.{SCALE}"] = scales[:, None]
    if not any(name.endswith(SCALE) for name in state):
        raise UserError(f"{source.path!r} has no linear layers that torch would compute with in 8 bits")
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **SCHEME}},
        "ignore": [name for name, layer in _linear(model) if layer is head],
    }
    model.save_pretrained(str(directory), state_dict=state)
    copy_beside(directory_of(source), directory, but=("config.json",))


def is_int8(source: ModelSource) -> bool:
    """Whether the weights of `source` are such. Raises UserError for what compressed-tensors has compressed otherwise."""
    settings = getattr(load(AutoConfig, source), "quantization_config", None) or {}
    if settings.get("quant_method") != "compressed-tensors":
        return False
    groups = settings.get("config_groups", {}).values()
    if not all(_holds(group.get(part) or {}, SCHEME[part]) for group in groups for part in SCHEME):
        raise UserError(
            f"{source.path!r}: of compressed-tensors' formats the torch engine serves integers of 8 bits only, "
            "with a scale for each output"
        )
    return True


def read(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model as transformers has it, its weights as `dtype`. Its linear layers have their scales beside their weights.

    Raises UserError for files that have not all of its weights.
    """
    config = load(AutoConfig, source)
    del config.quantization_config  # or else transformers looks for compressed-tensors
    with _silent():  # about scales that it knows nothing of
        # bf16 holds the integers exactly.
        model, told = load(AutoModelForCausalLM, source, config=config, dtype=dtype, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise UserError(f"{source.path!r} is not whole: it has no {missing[0]}")
    for name, scales in _scales(directory_of(source)):
        layer = model.get_submodule(name)
        layer.weight_scale = scales
        layer.weight.data = (layer.weight.float() * scales[:, None]).to(dtype)
    return model


def _linear(model: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]


def _holds(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(found.get(key) == value for key, value in wanted.items())


def _scales(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Of each layer, by its name."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                if key.endswith(f".{SCALE}"):
                    yield key.removesuffix(f".{SCALE}"), file.get_tensor(key).flatten().float()


@contextmanager
def _silent() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
