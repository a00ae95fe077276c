"""Models whose weights lie in their files as an engine computes with them: integers and their scales (integers.py).

The formats are compressed-tensors' ("int8": int-quantized, W8A8; "int4": pack-quantized, W4A16), which vLLM reads too, and
transformers with that library; without, it refuses the model. (In 4 bits, both want layers whose inputs are whole groups.)
Tables of tokens and the last product stay as they are, and become integers when they are loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from plugins.engines.integers import GROUP, Bits, in_integers, pack, scales_of, unpack, whole
from plugins.model_files import copy_beside
from plugins.pretrained import directory_of, load
from plugins.spec import UserError
from plugins.types import ModelSource

SCALE, PACKED, SHAPE = "weight_scale", "weight_packed", "weight_shape"
INTEGERS: dict[str, Any] = {"type": "int", "symmetric": True}
FORMATS: Mapping[Bits, str] = {"int8": "int-quantized", "int4": "pack-quantized"}
SCHEMES: Mapping[Bits, dict[str, Any]] = {
    "int8": {
        "weights": INTEGERS | {"num_bits": 8, "strategy": "channel", "dynamic": False},
        "input_activations": INTEGERS | {"num_bits": 8, "strategy": "token", "dynamic": True},
    },
    "int4": {
        "weights": INTEGERS
        | {"num_bits": 4, "strategy": "group", "group_size": GROUP, "actorder": None, "dynamic": False},
        "input_activations": None,
    },
}
WORDS: Mapping[Bits, str] = {
    "int8": "integers of 8 bits with a scale for each output",
    "int4": f"integers of 4 bits with a scale for each {GROUP} inputs of an output",
}


def write(source: ModelSource, bits: Bits, directory: Path) -> None:
    """Write `source` into the empty `directory`. Raises UserError for a model without layers to quantise."""
    model = load(AutoModelForCausalLM, source, dtype="auto")
    head, state = model.get_output_embeddings(), model.state_dict()
    for name, layer in _linear(model):
        if layer is not head:
            weight = state.pop(f"{name}.weight")
            state |= {f"{name}.{part}": tensor for part, tensor in _parts(weight, bits).items()}
    if not any(name.endswith(SCALE) for name in state):
        raise UserError(f"{source.path!r} has no linear layers that could be stored as integers")
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": FORMATS[bits],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **SCHEMES[bits]}},
        "ignore": [name for name, layer in _linear(model) if layer is head],
    }
    model.save_pretrained(str(directory), state_dict=state)
    copy_beside(directory_of(source), directory, but=("config.json",))


def stored(source: ModelSource, engine: str, served: Sequence[Bits]) -> Bits | None:
    """As what integers the weights of `source` are stored; None where they are not.

    Raises UserError for what compressed-tensors has compressed into anything but `served`, which is what `engine` takes.
    """
    settings = getattr(load(AutoConfig, source), "quantization_config", None) or {}
    if settings.get("quant_method") != "compressed-tensors":
        return None
    groups = (settings.get("config_groups") or {}).values()
    for bits in served:
        if groups and all(
            _holds(group.get(part), wanted) for group in groups for part, wanted in SCHEMES[bits].items()
        ):
            return bits
    known = ", and ".join(WORDS[bits] for bits in served)
    raise UserError(f"{source.path!r}: of compressed-tensors' formats the {engine} engine serves only {known}")


def read(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model as transformers has it, its weights as `dtype`. Its linear layers have their scales beside their weights.

    Raises UserError for files that have not all of its weights.
    """
    config = load(AutoConfig, source)
    del config.quantization_config  # or else transformers looks for compressed-tensors
    with _silent():  # about parts that it knows nothing of, and weights that are not there whole
        model, told = load(AutoModelForCausalLM, source, config=config, dtype=dtype, output_loading_info=True)
    missing = set(told["missing_keys"])
    for name, integers, scales in _layers(directory_of(source)):
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(f"{source.path!r} has integers for {name}, which {type(model).__name__} has not") from error
        layer.weight_scale = scales
        layer.weight.data = whole(integers, scales).to(dtype)
        missing.discard(f"{name}.weight")
    if missing:
        raise UserError(f"{source.path!r} is not whole: it has no {min(missing)}")
    return model


def _linear(model: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]


def _parts(weight: torch.Tensor, bits: Bits) -> dict[str, torch.Tensor]:
    """What a file has of a layer, instead of its weight."""
    scales = scales_of(weight, bits)
    integers = in_integers(weight, scales, bits)
    if bits == "int8":
        return {"weight": integers, SCALE: scales}
    # Of eight in an int32, the first has the lowest bits: as bytes are on all that we run on.
    return {PACKED: pack(integers).view(torch.int32), SHAPE: torch.tensor(weight.shape), SCALE: scales}


def _holds(found: dict[str, Any] | None, wanted: dict[str, Any] | None) -> bool:
    if not found or not wanted:
        return not found and not wanted
    return all(found.get(key) == value for key, value in wanted.items())


def _layers(directory: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of each layer: its name, integers and scales."""
    with ExitStack() as opened:
        files: dict[str, Any] = {}  # by the name of a tensor that is in it
        for path in sorted(directory.glob("*.safetensors")):
            file = opened.enter_context(safe_open(path, "pt"))
            files |= dict.fromkeys(file.keys(), file)
        for name in [key.removesuffix(f".{SCALE}") for key in files if key.endswith(f".{SCALE}")]:
            keys = {part: f"{name}.{part}" for part in ("weight", PACKED, SHAPE, SCALE)}
            parts = {part: files[key].get_tensor(key) for part, key in keys.items() if key in files}
            scales = parts[SCALE].float()
            if "weight" in parts:
                yield name, parts["weight"], scales
            elif PACKED in parts and SHAPE in parts:
                yield name, unpack(parts[PACKED].view(torch.uint8), int(parts[SHAPE][1])), scales


@contextmanager
def _silent() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
