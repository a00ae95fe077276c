"""A text encoder as a directory in sentence-transformers' format describes it. It needs transformers and nothing else.

The format is that of Reimers and Gurevych, Sentence-BERT (EMNLP 2019): modules.json lists the parts, with a folder for
each; sentence_bert_config.json says how texts are read. A directory without modules.json is a plain encoder.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
)

from plugins import hardware
from plugins.pretrained import first_line, load
from plugins.spec import UserError
from plugins.types import ModelSource, RequestError

Text = str | Sequence[int]  # a text, or its token ids
Step = Callable[[Tensor], Tensor]  # vectors [rows, size] -> [rows, another size]

ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}
PROBES = ("one", "one two three, four five six; seven and eight")


def _mean(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights).sum(1) / weights.sum(1)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum((1, 2)).long() - 1]


# Hidden states [rows, tokens, size] and their mask [rows, tokens, 1] of 0 and 1 -> [rows, size]; the names are
# sentence-transformers' own.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -math.inf).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda hidden, mask: _mean(hidden, mask) * mask.sum(1).sqrt(),
    "weightedmean": lambda hidden, mask: _mean(hidden, mask * mask.cumsum(1)),  # later tokens weigh more
    "lasttoken": _last,
}
# How the format said it before it had `pooling_mode`; several are joined in this order.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Encoder:
    """Texts -> token ids -> vectors of `dimensions` numbers. A text has at most `max_length` tokens."""

    def __init__(self, source: ModelSource, *, max_length: int | None, gpus: float = 0) -> None:
        """`max_length` None: the model's own. Raises UserError for a model that cannot be computed as it is meant."""
        device = hardware.device(gpus)
        self._tokenizer = load(AutoTokenizer, source)
        folder = _settings_folder(source)
        is_plain = not (folder / "modules.json").is_file()
        self._model = _load_model(source, device, is_plain)
        self._poolings: Sequence[str] = ["mean"]
        self._steps: Sequence[Step] = [functional.normalize]
        if not is_plain:
            self._poolings, self._steps = _read_parts(folder, device)
        reading = _read_json(folder / "sentence_bert_config.json")
        self._lowers = bool(reading.get("do_lower_case"))
        self._prompt = _default_prompt(folder / "config_sentence_transformers.json")
        self.max_length = self._longest(max_length, reading.get("max_seq_length"))
        words = self._model.get_input_embeddings()
        self._vocabulary: int = words.num_embeddings
        self._padding: int = words.padding_idx or 0  # models of RoBERTa's kind count positions by it
        self.dimensions = self._prove()

    def read(self, texts: Sequence[Text]) -> list[list[int]]:
        """The token ids of each text, with the special tokens that the model wants; given ids are taken as they are.

        Raises RequestError for a text that is empty or too long, and for ids that are not the model's.
        """
        rows = self._tokenise(texts)
        for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
            name = f"input[{index}]" if len(texts) > 1 else "input"
            if not text or not row:
                raise RequestError(f"{name} is empty", "input")
            if len(row) > self.max_length:
                raise RequestError(
                    f"{name} is too long: {len(row)} tokens, and this model takes {self.max_length}", "input"
                )
            if wrong := next((token for token in row if not 0 <= token < self._vocabulary), None):
                last = self._vocabulary - 1
                raise RequestError(f"{name}: {wrong} is not a token of this model (0 to {last})", "input")
        return rows

    @torch.inference_mode()
    def vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The embeddings of `rows` of token ids, computed as one batch: [rows, dimensions], fp32."""
        longest = max(map(len, rows))
        padded = [[*row, *[self._padding] * (longest - len(row))] for row in rows]
        ids = torch.tensor(padded, device=self._model.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = (torch.arange(longest, device=ids.device) < lengths[:, None]).long()
        hidden = self._model(input_ids=ids, attention_mask=mask)[0].float()
        vectors = torch.cat([POOLINGS[name](hidden, mask[:, :, None].float()) for name in self._poolings], dim=1)
        for step in self._steps:
            vectors = step(vectors)
        return vectors

    def _tokenise(self, texts: Sequence[Text]) -> list[list[int]]:
        written = [self._prompt + text for text in texts if isinstance(text, str)]
        if self._lowers:
            written = [text.lower() for text in written]
        tokens = iter(self._tokenizer(written, verbose=False)["input_ids"] if written else [])
        return [next(tokens) if isinstance(text, str) else list(text) for text in texts]

    def _longest(self, wanted: int | None, own: int | None) -> int:
        """Tokens of a text: `wanted`, or the model's `own`, or what it has positions for."""
        positions = _positions(self._model)
        if wanted is not None and wanted > positions:
            raise UserError(f"Embedder.max_length = {wanted}: this model was made for at most {positions} tokens")
        longest = wanted or min(own or self._tokenizer.model_max_length, positions)
        if longest > 10**9:  # transformers' way to say that nobody knows
            raise UserError("Embedder.max_length = None: this model does not say how many tokens a text may have")
        return int(longest)

    def _prove(self) -> int:
        """How many dimensions a vector has. Raises UserError where a text's vector depends on the company of others.

        Models differ in how they take padding, and a wrong answer is worse than none.
        """
        refusal = f"the embedder cannot serve {type(self._model).__name__}"
        rows = [row[: self.max_length] for row in self._tokenise(PROBES)]
        try:
            together = self.vectors(rows)
            alone = torch.cat([self.vectors([row]) for row in rows])
        except Exception as error:
            raise UserError(f"{refusal}: {type(error).__name__}: {first_line(error)}") from error
        off = ((together - alone).norm() / alone.norm()).item()
        if not off <= (1e-3 if self._model.dtype == torch.float32 else 0.1):
            raise UserError(f"{refusal}: in a batch its embeddings are off by {off:.1%}")
        return together.shape[1]


def _settings_folder(source: ModelSource) -> Path:
    """Where the files lie that say what to do with the model; from the hub they are fetched, the model itself is not."""
    if source.is_local:
        return Path(source.path).expanduser()
    patterns = ["*.json", "*_Dense/*"]
    try:
        return Path(huggingface_hub.snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(f"{source.path!r} cannot be loaded: {first_line(error)}") from error


def _load_model(source: ModelSource, device: torch.device, is_plain: bool) -> Any:
    config = load(AutoConfig, source)
    kinds = [kind for kind in config.architectures or [] if kind.endswith(("ForCausalLM", "LMHeadModel"))]
    if kinds and is_plain:
        raise UserError(
            f"{source.path!r} is a {kinds[0]}, which writes text: serve it with Torch(); Embedder is for encoders"
        )
    # T5's kind has a decoder too, which nothing here needs.
    loader = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    config.use_cache = False  # of what was read: only a decoder that goes on needs it
    model = load(loader, source, config=config, dtype=hardware.compute_dtype(source.dtype, device))
    return model.to(device).eval().requires_grad_(False)


def _read_parts(folder: Path, device: torch.device) -> tuple[list[str], list[Step]]:
    """From modules.json: the names of the poolings, and what is done with the vectors after them."""
    file = folder / "modules.json"
    parts = [(part["type"].rpartition(".")[2], part["path"]) for part in _read_json(file)]
    if [kind for kind, _ in parts[:2]] != ["Transformer", "Pooling"] or parts[0][1]:
        raise UserError(f"{file}: begins with {parts[:2]}; a Transformer at '' and a Pooling are needed here")
    steps: list[Step] = []
    for kind, path in parts[2:]:
        if kind == "Normalize":
            steps.append(functional.normalize)
        elif kind == "Dense":
            steps.append(_read_dense(folder / path).to(device))
        else:
            raise UserError(f"{file}: {kind} is not supported after the Pooling (choices: Dense, Normalize)")
    return _read_poolings(folder / parts[1][1] / "config.json"), steps


def _read_poolings(file: Path) -> list[str]:
    settings = _read_json(file)
    if not settings.get("include_prompt", True):
        raise UserError(f"{file}: include_prompt = false is not supported: what is a prompt, a request does not say")
    named = settings.get("pooling_mode")
    if named is None:
        unknown = [flag for flag in settings if flag.startswith("pooling_mode_") and flag not in FLAGS]
        named = [
            name for flag, name in (FLAGS | dict(zip(unknown, unknown, strict=True))).items() if settings.get(flag)
        ]
    modes = [named] if isinstance(named, str) else list(named) or ["mean"]
    if wrong := [mode for mode in modes if mode not in POOLINGS]:
        raise UserError(f"{file}: pooling {wrong[0]!r} is not supported (choices: {', '.join(POOLINGS)})")
    return modes


def _read_dense(folder: Path) -> nn.Module:
    settings = _read_json(folder / "config.json")
    activation = str(settings.get("activation_function")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise UserError(f"{folder}: activation {activation!r} is not supported (choices: {', '.join(ACTIVATIONS)})")
    if settings.get("use_residual") or settings.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise UserError(f"{folder}: a Dense module that is residual, or of tokens, is not supported")
    try:
        linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
        if (folder / "model.safetensors").is_file():
            weights = load_file(folder / "model.safetensors")
        else:
            weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        linear.load_state_dict({name.removeprefix("linear."): weight.float() for name, weight in weights.items()})
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read as a Dense module: {first_line(error)}") from error
    return nn.Sequential(linear, ACTIVATIONS[activation]()).requires_grad_(False)


def _default_prompt(file: Path) -> str:
    """What the model wants before every text. Its other prompts (of queries, say) a client writes into the text."""
    settings = _read_json(file)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts", {})
    if name is not None and name not in prompts:
        raise UserError(
            f"{file}: default_prompt_name = {name!r} is none of the prompts ({', '.join(prompts) or 'none'})"
        )
    return prompts[name] or "" if name is not None else ""


def _positions(model: Any) -> float:
    """How many tokens of a text the model has positions for; infinite where nothing says so."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # Models of RoBERTa's kind begin to count after the padding's index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def _read_json(file: Path) -> Any:
    """What `file` says; nothing where it is not there."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: {error}") from error
