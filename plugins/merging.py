"""Base and adapter, worked into one model of transformers."""

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from plugins.pretrained import first_line, load
from plugins.spec import UserError
from plugins.types import ModelSource


def load_whole(source: ModelSource) -> tuple[Any, torch.dtype]:
    """A model in fp32, and the dtype that it was saved in."""
    saved = load(AutoConfig, source).dtype
    return load(AutoModelForCausalLM, source, dtype=torch.float32), saved or torch.float32


def merged(source: ModelSource, adapter: Path) -> tuple[Any, torch.dtype]:
    """The model of `source`, in fp32, with the adapter in directory `adapter`; and the dtype that it was saved in."""
    base, dtype = load_whole(source)
    return merge(base, adapter), dtype


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
