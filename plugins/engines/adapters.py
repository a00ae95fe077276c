"""LoRA adapters beside an unchanged base, many in one batch: PEFT's files -> what the layers add for an adapter's tokens."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from plugins.engines.layers import Change, Embedding, Linear, Replacement, Turns, Update
from plugins.pretrained import first_line
from plugins.spec import UserError

NONE = ""  # a sequence without an adapter
OWN = re.compile(
    r"base_model\.model\.(.+?)\."
    r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
# What changes what the files mean, in ways that nothing here computes.
UNKNOWN = ("target_parameters", "layer_replication", "alora_invocation_tokens", "lora_bias", "trainable_token_indices")


class Adapters:
    """The adapters of one model, all of whose layers are in `layers`: its own name for a layer -> (Linear or Embedding,
    which of those side by side in it).
    """

    def __init__(self, layers: Mapping[str, tuple[Linear | Embedding, int]], turns: Turns, dtype: torch.dtype) -> None:
        self._layers, self._turns, self._dtype = layers, turns, dtype

    def load(self, key: str, directory: Path) -> None:
        """Read the adapter in `directory` (PEFT's format) under `key`; a key is never used twice.

        Raises UserError, and keeps nothing, for one that does not fit.
        """
        config, weights = _read(directory)
        try:
            changes = self._changes(config, weights)
        except _DoesNotFit as error:
            raise UserError(f"adapter {directory} does not fit the base: {error}") from None
        for name, change in changes.items():
            layer, at = self._layers[name]
            parts = len(layer.outputs) if isinstance(layer, Linear) else 1
            layer.changes.setdefault(key, [None] * parts)[at] = change

    def remove(self, key: str) -> None:
        for layer, _ in self._layers.values():
            layer.changes.pop(key, None)

    def begin(self, tokens: Sequence[str], wanted: Sequence[str]) -> None:
        """Say which adapter each token of the coming step has, and each of those after which the next is wanted."""
        self._turns.tokens = self._grouped(tokens)
        self._turns.wanted = self._grouped(wanted)

    def _grouped(self, tokens: Sequence[str]) -> list[tuple[str, torch.Tensor | None]]:
        adapters = set(tokens)
        if len(adapters) == 1:
            return [] if NONE in adapters else [(tokens[0], None)]
        return [
            (adapter, torch.tensor([at for at, name in enumerate(tokens) if name == adapter]))
            for adapter in sorted(adapters - {NONE})
        ]

    def _changes(self, config: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, Change]:
        """For each layer by its name, what the adapter makes of it."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        replaced: dict[str, dict[str, torch.Tensor]] = {}
        for name, weight in weights.items():
            if match := OWN.fullmatch(name):
                found.setdefault(match[1], {})[match[2]] = weight
            else:
                layer, _, kind = name.removeprefix("base_model.model.").rpartition(".")
                replaced.setdefault(layer, {})[kind] = weight
        for name in [*found, *replaced]:
            if name not in self._layers:
                raise _DoesNotFit(f"only the adapter has {name}")
        self._check_targets(config, set(found))
        changes: dict[str, Change] = {name: self._update(name, config, parts) for name, parts in found.items()}
        return changes | {name: self._replacement(name, parts) for name, parts in replaced.items()}

    def _check_targets(self, config: Any, found: set[str]) -> None:
        """All that it names as targets must be there: half an adapter would answer, and nobody would know."""
        if not isinstance(config.target_modules, set | list) or config.layers_to_transform or config.exclude_modules:
            return
        for target in sorted(config.target_modules):
            mine = [name for name in self._layers if name == target or name.endswith(f".{target}")]
            if absent := next((name for name in mine if name not in found), None if mine else target):
                raise _DoesNotFit(f"the adapter has nothing for {absent}")

    def _update(self, name: str, config: Any, parts: Mapping[str, torch.Tensor]) -> Update:
        down = parts["lora_A"] if "lora_A" in parts else parts["lora_embedding_A"]
        up = parts["lora_B"] if "lora_B" in parts else parts["lora_embedding_B"]
        layer, at = self._layers[name]
        inputs, outputs = _sizes(layer, at)
        if (down.shape[1], up.shape[0]) != (inputs, outputs):
            theirs = f"{down.shape[1]} in and {up.shape[0]} out"
            raise _DoesNotFit(f"size mismatch: {name} has {inputs} in and {outputs} out, and in the adapter {theirs}")
        alpha, rank = _pattern(config.alpha_pattern, name, config.lora_alpha), down.shape[0]
        up = up.float() * (alpha / (rank**0.5 if config.use_rslora else rank))
        factor = None
        if "lora_magnitude_vector" in parts:
            assert isinstance(layer, Linear)
            rows = slice(sum(layer.outputs[:at]), sum(layer.outputs[: at + 1]))
            weight = layer.weight[rows].float().cpu() + up @ down.float()
            factor = parts["lora_magnitude_vector"].flatten().float() / weight.norm(dim=1)
            up = up * factor[:, None]
        return Update(self._here(down), self._here(up), None if factor is None else self._here(factor))

    def _replacement(self, name: str, parts: Mapping[str, torch.Tensor]) -> Replacement:
        layer, at = self._layers[name]
        inputs, outputs = _sizes(layer, at)
        shape = (outputs, inputs) if isinstance(layer, Linear) else (inputs, outputs)
        if tuple(parts["weight"].shape) != shape:
            theirs = tuple(parts["weight"].shape)
            raise _DoesNotFit(f"size mismatch: {name} is {shape}, and in the adapter {theirs}")
        return Replacement(self._here(parts["weight"]), self._here(parts["bias"]) if "bias" in parts else None)

    @cached_property
    def _device(self) -> torch.device:
        device: torch.device = next(iter(self._layers.values()))[0].weight.device
        return device

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype).contiguous()


class _DoesNotFit(Exception):  # noqa: N818  it becomes a UserError with the adapter's directory in it
    """Why an adapter is not one of this base."""


def _read(directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """PEFT's config and weights. Raises UserError for what is no LoRA adapter, or changes the base for everyone."""
    import peft  # takes seconds: only who serves adapters waits for it

    if not (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory} is not an adapter: it has no adapter_config.json")
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(directory))
        weights = peft.load_peft_weights(str(directory), device="cpu")
    except Exception as error:
        raise UserError(f"adapter {directory} cannot be read: {first_line(error)}") from error
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"adapter {directory} is {config.peft_type.value}: only LoRA can be served beside the base")
    if odd := next((name for name in UNKNOWN if getattr(config, name, None)), None):
        raise UserError(f"adapter {directory} uses {odd}: it cannot be served beside the base; merge it")
    saved = [f".{name}." for name in config.modules_to_save or ()]
    # Resized embeddings are saved with an adapter; loading them would change the base for everyone.
    foreign = [name for name in weights if not OWN.fullmatch(name) and not any(part in name for part in saved)]
    if foreign:
        raise UserError(f"adapter {directory} holds weights of the base ({foreign[0]}): merge it")
    return config, weights


def _sizes(layer: Linear | Embedding, at: int) -> tuple[int, int]:
    if isinstance(layer, Linear):
        return layer.inputs, layer.outputs[at]
    vocabulary, width = layer.weight.shape
    return vocabulary, width


def _pattern(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    """PEFT's rule: a pattern is the end of a layer's name, as a regular expression."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)
