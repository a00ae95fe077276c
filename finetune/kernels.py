"""The three computations in which a finetuning step spends its time, each with a backward pass of its own. Plain torch.

On a CPU, torch's own fused attention takes three times as long as the matrix products that it is made of, so these are
written out, block by block; on a GPU its kernels are used. The other two save memory everywhere: a LoRA layer keeps its
input and nothing else, and log-probabilities never hold a row of logits for longer than a chunk.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

BLOCK = 64  # queries at a time: their scores stay in a core's cache
CHUNK = 256  # labelled tokens whose logits exist at the same time


@dataclass(frozen=True)
class Block:
    """Queries `first:last` and the keys `keys:last` that they may see, but for what `mask` [queries, keys] hides.

    `mask` is None, or -inf where a query must not look, over the last columns only.
    """

    first: int
    last: int
    keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Documents:
    """Documents end to end in one row: document i is at `bounds[i]:bounds[i + 1]`. None sees another."""

    bounds: tuple[int, ...]
    _blocks: dict[tuple[int | None, torch.dtype], list[Block]] = field(default_factory=dict, repr=False, compare=False)

    def blocks(self, window: int | None, dtype: torch.dtype) -> list[Block]:
        """What the attention of every layer computes; made once. `window`: how many tokens a query sees, itself the last."""
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = [
                _block(segment, first, window, dtype)
                for segment in self._segments()
                for first in range(segment[0], segment[-1], BLOCK)
            ]
        return self._blocks[window, dtype]

    def _segments(self) -> list[list[int]]:
        """Bounds of what is computed together: a long document, or short ones that fit into one block."""
        segments: list[list[int]] = []
        for first, last in itertools.pairwise(self.bounds):
            if segments and last - segments[-1][0] <= BLOCK:
                segments[-1].append(last)
            else:
                segments.append([first, last])
        return segments


def _block(segment: list[int], first: int, window: int | None, dtype: torch.dtype) -> Block:
    last = min(first + BLOCK, segment[-1])
    keys = segment[0] if window is None else max(segment[0], first - window + 1)
    queries, seen = torch.arange(first, last)[:, None], torch.arange(keys, last)
    hidden = seen > queries
    if window is not None:
        hidden |= queries - seen >= window
    if len(segment) > 2:
        edges = torch.tensor(segment)
        hidden |= torch.bucketize(queries, edges, right=True) != torch.bucketize(seen, edges, right=True)
    columns = hidden.any(0).nonzero()
    if not len(columns):
        return Block(first, last, keys, None)
    hidden = hidden[:, int(columns[0]) :]
    return Block(first, last, keys, torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")))


class CausalAttention(torch.autograd.Function):
    """Causal attention within each document (Vaswani et al. 2017, arXiv 1706.03762), the probabilities computed again in
    the backward pass as in FlashAttention (Dao et al. 2022, arXiv 2205.14135), but by whole rows of keys.

    query [heads, tokens, d], key [KV heads, tokens, d], value [KV heads, tokens, e] -> [tokens, heads, e]. Each KV head
    serves heads / KV heads neighbouring heads.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, blocks: list[Block]
    ) -> torch.Tensor:
        heads, tokens, _ = query.shape
        kv_heads = key.shape[0]
        scaled = (query * scale).view(kv_heads, heads // kv_heads, tokens, -1)
        result = value.new_empty(tokens, kv_heads, heads // kv_heads, value.shape[-1])
        for block in blocks:
            seen = value[:, block.keys : block.last]
            answer = torch.bmm(_probabilities(scaled, key, block), seen)
            result[block.first : block.last] = _by_head(answer, scaled.shape[1]).permute(2, 0, 1, 3)
        ctx.save_for_backward(scaled, key, value)
        ctx.scale, ctx.blocks = scale, blocks
        return result.view(tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled, key, value = ctx.saved_tensors
        kv_heads, group, tokens, _ = scaled.shape
        grad = grad.view(tokens, kv_heads, group, -1).permute(1, 2, 0, 3)
        grad_query = torch.empty_like(scaled)
        # Many blocks add to one key: their sum is kept in fp32.
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=key.device)
        for block in ctx.blocks:
            queries, seen = slice(block.first, block.last), slice(block.keys, block.last)
            probabilities = _probabilities(scaled, key, block)
            grad_answer = grad[:, :, queries].reshape(kv_heads, -1, grad.shape[-1])
            grad_value[:, seen] += torch.bmm(probabilities.transpose(1, 2), grad_answer)
            grad_probabilities = torch.bmm(grad_answer, value[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            grad_query[:, :, queries] = _by_head(torch.bmm(grad_scores, key[:, seen]), group)
            block_queries = scaled[:, :, queries].reshape(kv_heads, -1, scaled.shape[-1])
            grad_key[:, seen] += torch.bmm(grad_scores.transpose(1, 2), block_queries)
        grad_query = grad_query.mul_(ctx.scale).view(kv_heads * group, tokens, -1)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _probabilities(scaled: torch.Tensor, key: torch.Tensor, block: Block) -> torch.Tensor:
    """[KV heads, group x queries, keys]: the heads of a group share their keys, so they go through one product."""
    kv_heads, group, _, width = scaled.shape
    queries = scaled[:, :, block.first : block.last].reshape(kv_heads, -1, width)
    scores = torch.bmm(queries, key[:, block.keys : block.last].transpose(1, 2))
    if block.mask is not None:
        _by_head(scores, group)[..., scores.shape[-1] - block.mask.shape[-1] :] += block.mask
    return torch.softmax(scores, -1)


def _by_head(rows: torch.Tensor, group: int) -> torch.Tensor:
    return rows.view(rows.shape[0], group, -1, rows.shape[-1])


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each document: shapes as in CausalAttention. `window`: as in Documents.blocks."""
    if query.device.type == "cpu":
        blocks = documents.blocks(window, query.dtype)
        result: torch.Tensor = CausalAttention.apply(query, key, value, scale, blocks)  # type: ignore[no-untyped-call]
        return result
    answers = []
    for first, last in itertools.pairwise(documents.bounds):
        part = slice(first, last)
        mask = None
        if window is not None and last - first > window:
            distance = torch.arange(last - first, device=query.device)
            distance = distance[:, None] - distance
            mask = (distance >= 0) & (distance < window)
        answers.append(
            functional.scaled_dot_product_attention(
                query[None, :, part], key[None, :, part], value[None, :, part],
                attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
            )
        )  # fmt: skip
    return torch.cat(answers, 2)[0].transpose(0, 1)


class LoraProduct(torch.autograd.Function):
    """x W^T + bias + scale y A^T B^T (Hu et al. 2021, arXiv 2106.09685) with W and bias frozen.

    x [..., in] and W [out, in] of one dtype; A [rank, in] and B [out, rank] of any. y is x with a part dropped out, of its
    shape and dtype, or None for x itself. Saves y and y A^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        whole = x.reshape(-1, x.shape[-1])
        rows = whole if dropped is None else dropped.reshape(whole.shape)
        cast_a, scaled_b = a.to(x.dtype), (b * scale).to(x.dtype)
        low = torch.mm(rows, cast_a.t())
        result = torch.mm(whole, weight.t()) if bias is None else torch.addmm(bias, whole, weight.t())
        result.addmm_(low, scaled_b.t())
        ctx.save_for_backward(rows, low, weight, cast_a, scaled_b)
        ctx.scale, ctx.shape, ctx.dtypes, ctx.drops = scale, x.shape, (a.dtype, b.dtype), dropped is not None
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, weight, a, scaled_b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = torch.mm(grad, scaled_b)
        grad_a = torch.mm(grad_low.t(), rows).to(ctx.dtypes[0])
        grad_b = torch.mm(grad.t(), low).to(ctx.dtypes[1]).mul_(ctx.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight)
            if ctx.drops:
                grad_dropped = torch.mm(grad_low, a).view(ctx.shape)
            else:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


class LabelLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T + bias) at `labels`, without the logits of more than CHUNK tokens at a time.

    hidden [tokens, d], W [vocabulary, d] of one dtype, labels int64 [tokens] -> fp32 [tokens]. The gradient of each token's
    result with respect to its own hidden state does not depend on what comes after, so the forward pass computes it
    while it has the logits; only for a W that is trained itself are they computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden), CHUNK):
            part = slice(first, first + CHUNK)
            result[part], probabilities = _predictions(hidden[part], weight, bias, labels[part])
            if slopes is not None:
                torch.mm(_minus_label(probabilities, labels[part]).to(hidden.dtype), weight, out=slopes[part])
        ctx.save_for_backward(hidden, weight, bias, labels, slopes)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, slopes = ctx.saved_tensors
        grad_hidden = slopes * -grad[:, None].to(slopes.dtype) if slopes is not None else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            grad_bias = torch.zeros(len(weight), device=weight.device) if ctx.needs_input_grad[2] else None
            for first in range(0, len(hidden), CHUNK):
                part = slice(first, first + CHUNK)
                _, probabilities = _predictions(hidden[part], weight, bias, labels[part])
                slope = _minus_label(probabilities, labels[part]).mul_(-grad[part, None])
                grad_weight += torch.mm(slope.to(hidden.dtype).t(), hidden[part])
                if grad_bias is not None:
                    grad_bias += slope.sum(0)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None


def _predictions(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32: the log-probability of each label, and all probabilities [tokens, vocabulary].

    The softmax is the one pass over logits in fp32. Its largest value is never tiny, so log of the sum comes from it.
    """
    logits = functional.linear(hidden, weight, bias)
    largest, at = logits.max(-1, keepdim=True)
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    log_sum = largest.float() - probabilities.gather(1, at).log()
    return (logits.gather(1, labels[:, None]).float() - log_sum).squeeze(1), probabilities


def _minus_label(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The probabilities minus one at the label, in their place: the slope of -log p with respect to the logits."""
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    return probabilities
