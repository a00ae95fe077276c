"""The forward of Llama and its near relations in few operators: at one token a step, it is these that take the time.

The numbers are those of transformers' modules, which are asked (runner.py) whether they agree.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional

from plugins.engines.attention import Forward, NativeAttention, Rule, Step
from plugins.engines.layers import Embedding, Linear, Turns, Weights
from plugins.engines.native import Native
from plugins.engines.native_layers import NativeLayers

L = TypeVar("L", Linear, Embedding)

FEW = 32  # tokens: with more, what operators cost by themselves is little
ALIKE = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def take_over(
    model: Any, turns: Turns, weights: Weights, between: "Between"
) -> tuple[Forward, dict[str, tuple[Linear | Embedding, int]]] | None:
    """The forward of `model`, whose own layers are used up, and ours by their names; None where it is of another kind.

    `between` computes what lies between its products.
    """
    if type(model).__name__ not in ALIKE or not type(model).__module__.startswith("transformers."):
        return None
    if model.config.hidden_act != "silu":
        return None
    made = Lean(model, turns, weights, between)
    return made, made.layers


class Lean:
    """Step -> logits [wanted, vocab]."""

    def __init__(self, model: Any, turns: Turns, weights: Weights, between: "Between") -> None:
        self.layers: dict[str, tuple[Linear | Embedding, int]] = {}
        core = model.model
        head = Linear([model.lm_head], turns, weights=weights, of_wanted=True)
        self._head = self._known({"lm_head": 0}, head)
        self._embed = self._known({"model.embed_tokens": 0}, Embedding(core.embed_tokens, turns))
        self._rotary, self._norm = core.rotary_emb, _Norm(core.norm, between)
        self._blocks = []
        for number, layer in enumerate(core.layers):
            is_last = number == len(core.layers) - 1
            self._blocks.append(Block(layer, number, is_last, turns, weights, between, self._known))
            core.layers[number] = torch.nn.Identity()  # its weights are in our layers now
        self._at_once: NativeLayers | None = None
        self._turns = turns
        if isinstance(between, Native) and NativeLayers.can(self._blocks, core.embed_tokens.weight.dtype):
            self._at_once = NativeLayers(between, self._blocks)

    def __call__(self, step: Step) -> torch.Tensor:
        hidden: torch.Tensor = self._embed(step.ids)
        cos, sin = (part[0] for part in self._rotary(hidden, step.positions[None]))
        # To turn a vector by half its length and to change the sign of the first half is what rotates it.
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        done = 0
        if self._at_once is not None and not self._turns.tokens and isinstance(step.attention, NativeAttention):
            # The last layer makes less where not every token is wanted.
            done = len(self._blocks) - (len(step.wanted) < len(step.ids))
            hidden = self._at_once(hidden, cos, sin, step.attention.rows, done)
        for block in self._blocks[done:]:
            hidden = block(hidden, cos, sin, step)
        logits: torch.Tensor = self._head(self._norm(hidden))
        return logits

    def _known(self, names: dict[str, int], layer: L) -> L:
        self.layers |= {name: (layer, at) for name, at in names.items()}
        return layer


class Block:
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
        between: "Between",
        known: Callable[..., Any],
    ) -> None:
        attention = layer.self_attn
        self._number, self.width, self._is_last = number, attention.head_dim, is_last
        everywhere = getattr(attention.config, "sliding_window", None)
        self.rule = Rule(attention.scaling, getattr(attention, "sliding_window", everywhere))

        def linear(part: str, *names: str, of_wanted: bool = is_last) -> Linear:
            module = getattr(layer, part)
            made = Linear([getattr(module, name) for name in names], turns, weights=weights, of_wanted=of_wanted)
            known({f"model.layers.{number}.{part}.{name}": at for at, name in enumerate(names)}, made)
            return made

        self.qkv = linear("self_attn", "q_proj", "k_proj", "v_proj", of_wanted=False)
        self.o = linear("self_attn", "o_proj")
        self.gate_up = linear("mlp", "gate_proj", "up_proj")
        self.down = linear("mlp", "down_proj")
        self._between = between
        self._before = _Norm(layer.input_layernorm, between)
        self._after = _Norm(layer.post_attention_layernorm, between)
        self._q_norm = _Norm(attention.q_norm, between) if hasattr(attention, "q_norm") else None
        self._k_norm = _Norm(attention.k_norm, between) if hasattr(attention, "k_norm") else None
        self.norms = (self._before, self._after, self._q_norm, self._k_norm)
        self.heads, self.kv_heads, _ = (outputs // self.width for outputs in self.qkv.outputs)

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: Step) -> torch.Tensor:
        heads = self.qkv(self._before(x)).view(len(x), -1, self.width)
        turned, value = heads[:, : self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads :]
        if self._q_norm is not None and self._k_norm is not None:
            queries, keys = turned.split((self.heads, self.kv_heads), 1)
            turned = torch.cat((self._q_norm(queries), self._k_norm(keys)), 1)
        turned = self._between.rotate(turned, cos, sin)
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        seen = step.attention(self._number, query, key, value, self.rule).flatten(1)
        if self._is_last:
            seen, x = seen[step.wanted], x[step.wanted]
        x = self.o.added(seen, x)
        return self.down.added(self._between.gate(self.gate_up(self._after(x))), x)


class _Norm:
    """RMSNorm (arXiv 1910.07467) over the last dimension, of one of the model's layers."""

    def __init__(self, layer: Any, between: "Between") -> None:
        self.weight, self.eps, self._norm = layer.weight.data, layer.variance_epsilon, between.norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.eps)


class Between(Protocol):
    """What lies between the products, computed in fp32 or as if it were."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of x [tokens, width] or [tokens, heads, width]."""
        ...

    def rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """x [tokens, heads, width], which is of no use afterwards, turned; `cosines` and `sines` [tokens, width].

        The first half of the sines has the other sign: x times cosines, and x turned by half its length times sines.
        """
        ...

    def gate(self, both: torch.Tensor) -> torch.Tensor:
        """[tokens, 2 n] -> [tokens, n]: SiLU of the first half times the second."""
        ...


class Torch(Between):
    """By torch's operators."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu" or len(x) > FEW:
            return functional.rms_norm(x, weight.shape, weight, eps)
        # There torch makes it of eight operators. x beside -x has the mean 0, so that its LayerNorm is the RMSNorm of x.
        both, twice = torch.cat((x, -x), -1), torch.cat((weight, weight))
        return functional.layer_norm(both, twice.shape, twice, None, eps)[..., : len(weight)]

    def rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x * cosines[:, None], x.roll(x.shape[-1] // 2, -1), sines[:, None])

    def gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return functional.silu(gate, inplace=True) * up
