"""LoRA adapters beside an unchanged base, many in one batch: all that is known about PEFT when serving is here."""

from pathlib import Path
from typing import Any

import torch

from plugins.pretrained import first_line
from plugins.spec import UserError

NONE = "__base__"  # PEFT's name for a row without an adapter


class Adapters:
    """The adapters of one model, which is unchanged before the first is loaded and after the last is gone.

    Rows of a batch may have different adapters (peft: "Inference with different LoRA adapters in the same batch").
    PEFT hooks every layer anew at each forward to say which; here the hooks stay, and read `rows`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows: list[str] = []  # the adapter key, or NONE, of each row of the coming forward
        self._model = model
        self._peft: Any = None
        self._hooks: list[Any] = []

    def load(self, key: str, directory: Path) -> None:
        """Put the adapter in `directory` (PEFT's format) into the model under `key`; a key is never used twice.

        Raises UserError, with the model unchanged, for one that does not fit.
        """
        import peft  # takes seconds: only who serves adapters waits for it

        config, weights = self._read(directory)
        try:
            if self._peft is None:
                self._peft = peft.PeftModel(self._model, config, adapter_name=key, autocast_adapter_dtype=False)
            else:
                self._peft.add_adapter(key, config, autocast_adapter_dtype=False)
            result: Any = peft.set_peft_model_state_dict(self._peft, weights, adapter_name=key)
        except Exception as error:
            self.remove(key)
            raise UserError(f"adapter {directory} does not fit the base: {_one_line(error)}") from error
        unpaired = [name for name in result.missing_keys if f".{key}." in name] + list(result.unexpected_keys)
        if unpaired:
            self.remove(key)
            raise UserError(f"adapter {directory} does not fit the base: only one of them has {unpaired[0]}")
        self._hook()

    def remove(self, key: str) -> None:
        """Take `key` out of the model; with the last one goes all of PEFT."""
        if self._peft is not None and key in self._peft.peft_config:
            self._peft.delete_adapter(key)
        if self._peft is None or not self._peft.peft_config:
            self._restore()
        self._hook()

    def _restore(self) -> None:
        """Put the base's own layers back. PEFT's `unload` needs a whole PeftModel, and there is none where it failed."""
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        own: dict[str, torch.nn.Module] = {}
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer):
                own[name] = module.get_base_layer()
            elif isinstance(module, AuxiliaryTrainingWrapper):
                own[name] = module.original_module
        for name, layer in own.items():
            if not any(name.startswith(f"{outer}.") for outer in own):
                self._model.set_submodule(name, layer)
        vars(self._model).pop("peft_config", None)
        self._peft = None

    def _read(self, directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
        import peft

        if not (directory / "adapter_config.json").is_file():
            raise UserError(f"{directory} is not an adapter: it has no adapter_config.json")
        try:
            config: Any = peft.PeftConfig.from_pretrained(str(directory))
            weights = peft.load_peft_weights(str(directory), device="cpu")
        except Exception as error:
            raise UserError(f"adapter {directory} cannot be read: {_one_line(error)}") from error
        if config.peft_type != peft.PeftType.LORA or config.use_dora:
            kind = "DoRA" if config.peft_type == peft.PeftType.LORA else config.peft_type.value
            raise UserError(f"adapter {directory} is {kind}: only plain LoRA can be served beside the base; merge it")
        own = [f".{name}." for name in config.modules_to_save or ()] + [".lora_"]
        # Resized embeddings are saved with an adapter; loading them would change the base for everyone.
        if foreign := next((name for name in weights if not any(part in name for part in own)), None):
            raise UserError(f"adapter {directory} holds weights of the base ({foreign}): merge it")
        return config, weights

    def _hook(self) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for hook in self._hooks:
            hook.remove()
        self._model.eval().requires_grad_(False)
        self._hooks = [
            module.register_forward_pre_hook(self._tell, with_kwargs=True)
            for module in self._model.modules()
            if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper)
        ]

    def _tell(self, _: torch.nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, options | {"adapter_names": self.rows}


def _one_line(error: Exception) -> str:
    """The telling line of a library's message: torch puts the first mismatch on the second line."""
    mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
    return mismatch or first_line(error)
