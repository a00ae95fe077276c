"""The model as objectives see it: a batch -> the log-probability of each of its labels. And how a model takes its rows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface

from finetune.config import FinetuneConfig
from finetune.data import Batch, Layout, collate
from finetune.kernels import Documents, LabelLogProbs, attention
from plugins.spec import UserError
from plugins.types import IGNORE

log = logging.getLogger(__name__)

OURS, USUAL = "manta", "sdpa"  # what transformers calls the attention of finetune/kernels.py, and its own
PASSED_OVER = {"attention_mask", "dropout", "is_causal", "position_ids", "use_cache", "cache_position"}


class LogProbs(torch.nn.Module):
    """A model, and the layout of the batches that it takes."""

    def __init__(self, model: Any, layout: Layout, *, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self._whole_logits = compiled or not _ends_with_its_head(model)
        if layout == "flat":
            use_our_attention(model)
        if compiled:
            model.compile(dynamic=True)

    def forward(self, batch: Batch) -> torch.Tensor:
        """fp32 [labels], in the order of `batch.labels` without those that are IGNORE."""
        predicts = batch.labels[:, 1:] != IGNORE
        labels = batch.labels[:, 1:][predicts]
        if self._whole_logits:
            logits = _outputs(self.model, batch)[:, :-1][predicts].float()
            return torch.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
        with _headless(self.model):
            hidden = _outputs(self.model, batch)[:, :-1][predicts]
        head: Any = _head_of(self.model)
        device = hidden.device.type
        # The product of hidden states and head is of the dtype that autocast would give it.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        result: torch.Tensor = LabelLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), head.weight.to(dtype), bias, labels
        )
        return result

    @torch.no_grad()
    def reference(self, batch: Batch) -> torch.Tensor:
        """The same of the base: the adapter is switched off."""
        with self.model.disable_adapter():
            result: torch.Tensor = self(batch)
        return result


def use_our_attention(model: Any) -> None:
    AttentionInterface.register(OURS, _attention)
    model.set_attn_implementation(OURS)


@contextmanager
def usual_attention(model: Any) -> Iterator[None]:
    """Within it the model computes as transformers has it: to generate, which needs a cache that our attention has not."""
    if model.config._attn_implementation != OURS:
        yield
        return
    model.set_attn_implementation(USUAL)
    try:
        yield
    finally:
        model.set_attn_implementation(OURS)


def choose_layout(model: Any, config: FinetuneConfig) -> Layout:
    """Flat where the model provably keeps rows apart that stand end to end, else padded, which every model takes.

    What a model is made of says too little about it, so it is asked: a row must not change by a single bit with what stands
    before it, and must come out as it does alone. Raises UserError where rows are to be packed and the model mixes them.
    """
    was_training, usual = model.training, model.config._attn_implementation
    model.eval()
    reason: str | None = "kernels are compiled"  # and want few different shapes
    if not config.train.compile:
        use_our_attention(model)
        try:
            reason = _mixes_rows(model, "flat")
        except _NotOurs as error:
            reason = str(error)
        model.set_attn_implementation(usual)
    if reason is None and any(getattr(model.config, name, 0) for name in ("attention_dropout", "attn_pdrop")):
        reason = "attention drops out"
    if reason is not None and config.data.packing and _mixes_rows(model, "padded"):
        raise UserError(f"data.packing: model {config.model.path!r} mixes the rows of a pack; set data.packing=false")
    model.train(was_training)
    if reason is not None:
        log.info("rows are padded: %s in this model", reason)
    return "flat" if reason is None else "padded"


@torch.no_grad()
def _mixes_rows(model: Any, layout: Layout) -> str | None:
    """What is wrong when two short rows stand in one; None where each comes out as if it were alone."""
    first, other, second = (_row(start, model) for start in (3, 13, 23))

    def of_second(*rows: NDArray[np.int32]) -> torch.Tensor:
        batch = collate([[(row, row) for row in rows]], layout)
        return _outputs(model, batch.to(model.device))[0, -len(second) :].float()

    together = of_second(first, second)
    if not torch.equal(together, of_second(other, second)):
        return "a row sees the one before it"
    alone = of_second(second)
    if (together - alone).norm() > 0.05 * alone.norm():
        return "a row's positions do not begin anew"
    return None


def _row(start: int, model: Any) -> NDArray[np.int32]:
    """Seven tokens that any model has."""
    vocabulary: int = model.get_input_embeddings().num_embeddings
    return (np.arange(start, start + 7) % vocabulary).astype(np.int32)


class _NotOurs(Exception):  # noqa: N818  it is no error: the model has an attention of another kind
    """The model asks of its attention what ours does not do."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Ours, as transformers calls it: query [1, heads, tokens, d] and so on -> [1, tokens, heads, e]."""
    asked = [name for name, setting in others.items() if name not in PASSED_OVER and setting is not None]
    if asked or documents is None or query.shape[2] != documents.bounds[-1]:
        raise _NotOurs(f"attention has {', '.join(asked) or 'a form of its own'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = value.dtype
    result = attention(
        query[0].to(dtype), key[0].to(dtype), value[0], documents, scale=scale, window=sliding_window
    )  # fmt: skip
    return result.unsqueeze(0), None


def _outputs(model: Any, batch: Batch) -> torch.Tensor:
    """What the model makes of a batch: logits [rows, length, vocabulary], or what its head would be given."""
    options: dict[str, Any] = {}
    if batch.documents is not None:
        options["documents"] = batch.documents
    if batch.attention_mask is not None:
        options["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        options["position_ids"] = batch.position_ids
    result: torch.Tensor = model(input_ids=batch.input_ids, use_cache=False, **options).logits
    return result


def _head_of(model: Any) -> torch.nn.Module:
    """The layer that makes the logits; with `modules_to_save` that which is trained, unless the adapter is off."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, peft.utils.ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapter]
    found: torch.nn.Module = head
    return found


@torch.no_grad()
def _ends_with_its_head(model: Any) -> bool:
    """Whether the logits are the head's product and nothing besides: some models scale or bend them afterwards."""
    if type(_head_of(model)) is not torch.nn.Linear:
        return False
    was_training = model.training
    model.eval()
    given: list[torch.Tensor] = []
    with _headless(model, given):
        ids = torch.from_numpy(_row(3, model)).long()[None].to(model.device)
        after = model(input_ids=ids, use_cache=False).logits
    model.train(was_training)
    return torch.equal(after.float(), given[0].float())


@contextmanager
def _headless(model: Any, given: list[torch.Tensor] | None = None) -> Iterator[None]:
    """Within it the model's "logits" are the hidden states that its head would be given (and are added to `given`)."""

    def pass_on(hidden: torch.Tensor) -> torch.Tensor:
        if given is not None:
            given.append(hidden)
        return hidden

    head = model.get_output_embeddings()
    head.forward = pass_on
    try:
        yield
    finally:
        del head.forward
