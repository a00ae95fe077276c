"""Base model + tokenizer + method -> a model with trainable weights, and those weights to and from a directory."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune import lora
from finetune.config import FinetuneConfig, Lora
from plugins import hardware
from plugins.pretrained import load
from plugins.spec import UserError
from plugins.template import PLAIN, Tokenizer
from plugins.types import ModelSource

ADAPTER, MODEL = "adapter", "model"


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The base's tokenizer; one that has no chat template gets a plain one. Raises UserError where there is none."""
    tokenizer: Any = load(AutoTokenizer, source)
    if not tokenizer.is_fast:
        raise UserError(f"model.path = {source.path!r}: its tokenizer has no tokenizer.json, and a fast one is needed")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN
    result: Tokenizer = tokenizer
    return result


def outline(config: FinetuneConfig) -> torch.nn.Module:
    """The trainable model without its weights (on torch's meta device): to check and to count, in a moment.

    Raises UserError for a directory or hub id that holds no model, and for LoRA targets that the model does not have.
    """
    settings = load(AutoConfig, config.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.model.trust_remote_code)
        return _with_method(model, config)


def build(config: FinetuneConfig, device: torch.device) -> torch.nn.Module:
    """The model on `device`, ready to train: trained weights in fp32, frozen ones in the dtype that it computes in."""
    compute_dtype = hardware.compute_dtype(config.model.dtype, device)
    options: dict[str, Any] = {"dtype": torch.float32}
    if isinstance(config.method, Lora):
        options["dtype"] = compute_dtype
        if quantization := lora.quantization(config.method, compute_dtype):
            options |= {"quantization_config": quantization, "device_map": {"": device}}
    model = load(AutoModelForCausalLM, config.model, **options)
    trained = _with_method(model, config).to(device)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained


def save(model: torch.nn.Module, directory: Path) -> None:
    """Write what was trained into `directory`: `adapter/` in PEFT's format, or `model/` in transformers'."""
    if isinstance(model, peft.PeftModel):
        lora.save(model, directory / ADAPTER)
    else:
        saved: Any = model
        saved.save_pretrained(str(directory / MODEL))


def load_trained(model: torch.nn.Module, directory: Path) -> None:
    """Put the weights that `save` wrote back into a model that `build` made."""
    if isinstance(model, peft.PeftModel):
        lora.load(model, directory / ADAPTER)
    else:
        saved = AutoModelForCausalLM.from_pretrained(str(directory / MODEL), dtype=torch.float32)
        model.load_state_dict(saved.state_dict())


def _with_method(model: Any, config: FinetuneConfig) -> torch.nn.Module:
    if isinstance(config.method, Lora):
        # torch.compile makes kernels of PEFT's own layers; it cannot look into ours.
        model = lora.adapt(model, config.method, own_layers=not config.train.compile)
    ready: torch.nn.Module = model.train()
    return ready
