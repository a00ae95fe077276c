"""The forward of Llama and its near relations in few operators: at one token a step, it is these that take the time.

The numbers are those of transformers' modules, which are asked (runner.py) whether they agree.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import functional

from plugins.engines.layers import Embedding, Linear, Turns, Weights

if TYPE_CHECKING:
    from plugins.engines.runner import Step

L = TypeVar("L", Linear, Embedding)
MakeNorm = Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]  # of a layer of the model

FEW = 32  # tokens: with more, what operators cost by themselves is little
ALIKE = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def take_over(
    model: Any, turns: Turns, weights: Weights, norm: MakeNorm
) -> tuple[Callable[["Step"], torch.Tensor], dict[str, tuple[Linear | Embedding, int]]] | None:
    """The forward of `model`, whose own layers are used up, and ours by their names; None where it is of another kind.

    `norm` makes what computes a layer's RMSNorm (arXiv 1910.07467) over the last dimension.
    """
    if type(model).__name__ not in ALIKE or not type(model).__module__.startswith("transformers."):
        return None
    if model.config.hidden_act != "silu":
        return None
    made = Lean(model, turns, weights, norm)
    return made, made.layers


class Lean:
    """Step -> logits [wanted, vocab]."""

    def __init__(self, model: Any, turns: Turns, weights: Weights, norm: MakeNorm) -> None:
        self.layers: dict[str, tuple[Linear | Embedding, int]] = {}
        core = model.model
        head = Linear([model.lm_head], turns, weights=weights, of_wanted=True)
        self._head = self._known({"lm_head": 0}, head)
        self._embed = self._known({"model.embed_tokens": 0}, Embedding(core.embed_tokens, turns))
        self._rotary, self._norm = core.rotary_emb, norm(core.norm)
        self._blocks = []
        for number, layer in enumerate(core.layers):
            is_last = number == len(core.layers) - 1
            self._blocks.append(_Block(layer, number, is_last, turns, weights, norm, self._known))
            core.layers[number] = torch.nn.Identity()  # its weights are in our layers now

    def __call__(self, step: "Step") -> torch.Tensor:
        hidden: torch.Tensor = self._embed(step.ids)
        cos, sin = (part[0][:, None] for part in self._rotary(hidden, step.positions[None]))
        # To turn a vector by half its length and to change the sign of the first half is what rotates it.
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        for block in self._blocks:
            hidden = block(hidden, cos, sin, step)
        logits: torch.Tensor = self._head(self._norm(hidden))
        return logits

    def _known(self, names: dict[str, int], layer: L) -> L:
        self.layers |= {name: (layer, at) for name, at in names.items()}
        return layer


class _Block:
    """One layer: x [tokens, width] -> the same; of the last one, what the step wants to know: [wanted, width].

    Of a prompt's other tokens nobody reads more there than the keys and values.
    """

    def __init__(
        self,
        layer: Any,
        number: int,
        is_last: bool,
        turns: Turns,
        weights: Weights,
        norm: MakeNorm,
        known: Callable[..., Any],
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._number, self._width, self._scale = number, attention.head_dim, attention.scaling
        self._is_last = is_last
        everywhere = getattr(attention.config, "sliding_window", None)
        self._window: int | None = getattr(attention, "sliding_window", everywhere)

        def linear(part: str, *names: str, of_wanted: bool = is_last) -> Linear:
            module = getattr(layer, part)
            made = Linear([getattr(module, name) for name in names], turns, weights=weights, of_wanted=of_wanted)
            known({f"model.layers.{number}.{part}.{name}": at for at, name in enumerate(names)}, made)
            return made

        self._qkv = linear("self_attn", "q_proj", "k_proj", "v_proj", of_wanted=False)
        self._o = linear("self_attn", "o_proj")
        self._gate_up = linear("mlp", "gate_proj", "up_proj")
        self._down = linear("mlp", "down_proj")
        self._before, self._after = norm(layer.input_layernorm), norm(layer.post_attention_layernorm)
        self._q_norm = norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self._k_norm = norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self._heads, self._kv_heads, _ = (outputs // self._width for outputs in self._qkv.outputs)
        self._inner = mlp.gate_proj.weight.shape[0]

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: "Step") -> torch.Tensor:
        heads = self._qkv(self._before(x)).view(len(x), -1, self._width)
        turned, value = heads[:, : self._heads + self._kv_heads], heads[:, self._heads + self._kv_heads :]
        if self._q_norm is not None and self._k_norm is not None:
            queries, keys = turned.split((self._heads, self._kv_heads), 1)
            turned = torch.cat((self._q_norm(queries), self._k_norm(keys)), 1)
        turned = torch.addcmul(turned * cos, turned.roll(self._width // 2, -1), sin)
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        seen = step.attention(self._number, query, key, value, scale=self._scale, window=self._window).flatten(1)
        if self._is_last:
            seen, x = seen[step.wanted], x[step.wanted]
        x = self._o.added(seen, x)
        both = self._gate_up(self._after(x))
        gate, up = both.split(self._inner, -1)
        return self._down.added(functional.silu(gate, inplace=True) * up, x)


class Norm:
    """torch's, computed in fp32."""

    def __init__(self, layer: Any) -> None:
        self._weight, self._eps = layer.weight.data, layer.variance_epsilon
        self._width = len(self._weight)
        self._twice = self._weight.repeat(2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu" or len(x) > FEW:
            return functional.rms_norm(x, (self._width,), self._weight, self._eps)
        # There torch makes it of eight operators. x beside -x has the mean 0, so that its LayerNorm is the RMSNorm of x.
        both = torch.cat((x, -x), -1)
        return functional.layer_norm(both, (2 * self._width,), self._twice, None, self._eps)[..., : self._width]
