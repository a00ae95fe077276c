"""Base model + tokenizer + method -> a model with trainable weights, and those weights to and from a directory."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.config import FinetuneConfig, Full, Lora
from plugins import hardware
from plugins.pretrained import load
from plugins.spec import UserError, choices
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
    return _with_method(model, config.method)


def build(config: FinetuneConfig, device: torch.device) -> torch.nn.Module:
    """The model on `device`, ready to train: trained weights in fp32.

    Frozen weights are in the compute dtype on a GPU, for memory; on a CPU in fp32, where casting once a use is faster.
    """
    frozen_dtype = torch.float32
    if isinstance(config.method, Lora) and device.type == "cuda":
        frozen_dtype = hardware.compute_dtype(config.model.dtype, device)
    model = load(AutoModelForCausalLM, config.model, dtype=frozen_dtype)
    return _with_method(model, config.method).to(device)


def save(model: torch.nn.Module, directory: Path) -> None:
    """Write what was trained into `directory`: `adapter/` in PEFT's format, or `model/` in transformers'."""
    if isinstance(model, peft.PeftModel):
        # The embeddings are never resized; asking PEFT to find out would look the base up on the hub.
        model.save_pretrained(str(directory / ADAPTER), save_embedding_layers=False)
    else:
        saved: Any = model
        saved.save_pretrained(str(directory / MODEL))


def load_trained(model: torch.nn.Module, directory: Path) -> None:
    """Put the weights that `save` wrote back into a model that `build` made."""
    if isinstance(model, peft.PeftModel):
        weights = peft.load_peft_weights(str(directory / ADAPTER), device="cpu")
        peft.set_peft_model_state_dict(model, weights)
    else:
        saved = AutoModelForCausalLM.from_pretrained(str(directory / MODEL), dtype=torch.float32)
        model.load_state_dict(saved.state_dict())


def _with_method(model: Any, method: Lora | Full) -> torch.nn.Module:
    if isinstance(method, Full):
        full: torch.nn.Module = model.train()
        return full
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in () if method.targets == "all-linear" else method.targets:
        if target not in names:
            raise UserError(f"method.targets = {target!r}: no such linear layer; {choices(target, names)}")
    lora = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.targets if method.targets == "all-linear" else list(method.targets),
        task_type="CAUSAL_LM",
    )
    adapted: torch.nn.Module = peft.get_peft_model(model, lora)
    return adapted.train()
