"""LoRA by PEFT, with a faster layer for the usual case, and adapters that always belong to the base as it was given."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from finetune.config import CHANGE_BASE, Lora
from finetune.kernels import LoraProduct
from plugins.spec import UserError, choices

ADAPTER_NAME = "default"  # PEFT's own name for an adapter that was given none


class LoraLinear(peft.tuners.lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA of a linear layer; with one adapter at work it is one function, of less memory and less time."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.active_adapters != [ADAPTER_NAME] or args or kwargs:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.get_base_layer()
        a, b = self.lora_A[ADAPTER_NAME].weight, self.lora_B[ADAPTER_NAME].weight
        x, dropout = x.to(base.weight.dtype), self.lora_dropout[ADAPTER_NAME]
        drops = self.training and isinstance(dropout, torch.nn.Dropout)
        product: torch.Tensor = LoraProduct.apply(  # type: ignore[no-untyped-call]
            x, dropout(x) if drops else None, base.weight, base.bias, a, b, self.scaling[ADAPTER_NAME]
        )
        return product


def adapt(model: Any, method: Lora, *, own_layers: bool = True) -> torch.nn.Module:
    """`model` with an adapter to train in fp32. On the meta device, an outline. `own_layers` False: PEFT's throughout.

    Raises UserError for targets and modules that the model does not have.
    """
    _check_names(model, method)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.targets if method.targets == "all-linear" else list(method.targets),
        modules_to_save=list(method.modules_to_save) or None,
        use_rslora=method.rslora,
        use_dora=method.dora,
        # Some of these decompose every weight, and an outline has none.
        init_lora_weights=True if method.init == "default" or on_meta else method.init,
        task_type="CAUSAL_LM",
    )
    if own_layers and not (method.dora or method.quantize):
        config._register_custom_module({torch.nn.Linear: LoraLinear})
    adapted: torch.nn.Module = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if method.init in CHANGE_BASE and not on_meta:
        _keep_beginning(adapted)
    return adapted


def _check_names(model: Any, method: Lora) -> None:
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    for target in () if method.targets == "all-linear" else method.targets:
        if target not in linear:
            raise UserError(f"method.targets = {target!r}: no such linear layer; {choices(target, linear)}")
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for module in method.modules_to_save:
        if module not in modules:
            raise UserError(f"method.modules_to_save = {module!r}: the model has none; {choices(module, modules)}")


def check_quantize(method: Lora) -> None:
    """Raise UserError where the library that `method.quantize` needs is not installed."""
    if method.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"method.quantize = {method.quantize!r} needs bitsandbytes, which is not installed: "
            "pip install -e '.[quantize]' (or set method.quantize=none)"
        )


def quantization(method: Lora, dtype: torch.dtype) -> Any:
    """What transformers needs to load the base in 8 or 4 bits, computing in `dtype`; None to load it as it is."""
    if method.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    if method.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


# PiSSA and OLoRA begin with an adapter that is not zero and take it out of the base's weights. What was learned is then
# B A - B0 A0 beside the base as it was: an adapter of twice the rank. Only that is ever written.


def _keep_beginning(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.beginning_a = module.lora_A[ADAPTER_NAME].weight.detach().clone()
            module.beginning_b = module.lora_B[ADAPTER_NAME].weight.detach().clone()


def save(model: peft.PeftModel, directory: Path) -> None:
    """Write the adapter into `directory`, in PEFT's format and for the base as it was given."""
    # The embeddings are never resized; asking PEFT to find out would look the base up on the hub.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    begun = {name: module for name, module in model.named_modules() if hasattr(module, "beginning_a")}
    if not begun:
        return
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    for name, module in begun.items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        weights[a] = torch.cat([weights[a], module.beginning_a.to(weights[a])])
        weights[b] = torch.cat([weights[b], -module.beginning_b.to(weights[b])], 1)
    save_file(weights, path, metadata={"format": "pt"})
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text())
    grown = math.sqrt(2) if settings["use_rslora"] else 2
    settings |= {"r": 2 * settings["r"], "lora_alpha": grown * settings["lora_alpha"], "init_lora_weights": True}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def load(model: peft.PeftModel, directory: Path) -> None:
    """Put what `save` wrote back into a model that `adapt` made of the same base."""
    weights = peft.load_peft_weights(str(directory), device="cpu")
    for name, module in model.named_modules():
        if hasattr(module, "beginning_a"):
            rank = len(module.beginning_a)
            weights[f"{name}.lora_A.weight"] = weights[f"{name}.lora_A.weight"][:rank]
            weights[f"{name}.lora_B.weight"] = weights[f"{name}.lora_B.weight"][:, :rank]
    peft.set_peft_model_state_dict(model, weights)
