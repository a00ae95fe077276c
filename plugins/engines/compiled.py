"""The forward of a model as torch.compile makes it: what lies between the layers and the attention, in few fused operators.

Layers and attention stay as they are, operators that the compiler does not look into: it cannot trace packed weights,
adapters come and go, and each step has an attention of its own. Nothing is left that changes but two sizes, the tokens and
the logits of a step; the kinds of them that there are, are compiled before the first request.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch

from plugins.engines.attention import Attention, Rule, Step
from plugins.engines.layers import Embedding, Linear
from plugins.pretrained import first_line
from plugins.spec import UserError

SIZES = ((3, 2), (3, 1), (1, 1))  # tokens, logits: what has a size of 1 is compiled by itself
NUMBERS = itertools.count()  # of the models of this process: torch knows operators by name


@dataclass
class _Turn:
    """The attention of the step that is being computed."""

    attention: "Attention | None" = None


class Compiled:
    """Step -> logits [wanted, vocab]. It is `forward` (ids, positions, attention, wanted -> logits), compiled.

    `layers`: all of the forward's that are ours.
    """

    def __init__(
        self, forward: Callable[..., torch.Tensor], layers: Iterable[Linear | Embedding], device: torch.device
    ) -> None:
        self._turn = _Turn()
        self._library = torch.library.Library(f"manta_model{next(NUMBERS)}", "DEF")
        mine = list(dict.fromkeys(layers))
        attention = _hide(self._library, mine, self._turn, device)
        weakref.finalize(self, mine.clear)  # torch keeps the operators' functions for ever, but not the model

        def traced(ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return forward(ids, positions, attention, wanted)

        # torch keeps what it compiles with the code of a function: each model has its own.
        own = FunctionType(traced.__code__.replace(), globals(), closure=traced.__closure__)
        options: dict[str, Any] = {"guard_filter_fn": _of_sizes}
        self._compiled = torch.compile(own, fullgraph=True, options=options)

    def __call__(self, step: Step) -> torch.Tensor:
        self._turn.attention = step.attention
        logits: torch.Tensor = self._compiled(step.ids, step.positions, step.wanted)
        self._turn.attention = None
        return logits

    @torch.inference_mode()
    def warm_up(self, steps: Iterable[Step]) -> None:
        """Compile what the sizes of `steps` need. Raises UserError."""
        try:
            for step in steps:
                for tensor in (step.ids, step.positions, step.wanted):
                    if len(tensor) > 1:
                        # Only these: with `dynamic=True` the numbers of layers and heads would have names too, and
                        # what follows from them would take minutes to find.
                        torch._dynamo.mark_dynamic(tensor, 0)
                self(step)
        except Exception as error:
            wrong = f"this model cannot be compiled: {first_line(error)}"
            if "InvalidCxxCompiler" in wrong:
                wrong = "needs a C++ compiler (g++) on each node"
            raise UserError(f"Torch.compile = True: {wrong}") from error


def _of_sizes(guards: Sequence[Any]) -> list[bool]:
    """Which of what a compiled function would check at each call is checked: its tensors, since all else is constant."""
    mine = ("ids", "positions", "wanted")
    return [guard.guard_type == "SHAPE_ENV" or guard.name.strip("L[']") in mine for guard in guards]


def _hide(
    library: torch.library.Library, layers: Sequence[Any], turn: _Turn, device: torch.device
) -> Callable[..., torch.Tensor]:
    """Make operators of `layers`, which they are from then on where a compiler sees them, and of the attention: this."""

    def linear(x: torch.Tensor, to: torch.Tensor | None, number: int) -> torch.Tensor:
        result: torch.Tensor = layers[number](x) if to is None else layers[number].added(x, to)
        return result

    def linear_like(x: torch.Tensor, to: torch.Tensor | None, number: int) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], sum(layers[number].outputs))

    def embedding(ids: torch.Tensor, number: int) -> torch.Tensor:
        result: torch.Tensor = layers[number](ids)
        return result

    def embedding_like(ids: torch.Tensor, number: int) -> torch.Tensor:
        weight = layers[number].weight
        return ids.new_empty(*ids.shape, weight.shape[1], dtype=weight.dtype)

    def attention(
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        assert turn.attention is not None
        return turn.attention(layer, query, key, value, Rule(scale, window, softcap)).contiguous()

    def attention_like(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        return query.new_empty(*query.shape[:2], value.shape[2])

    def operator(function: Callable[..., torch.Tensor], like: Callable[..., torch.Tensor]) -> Any:
        name = function.__name__
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, device.type.upper())
        torch.library.register_fake(f"{library.ns}::{name}", like, lib=library)
        return getattr(getattr(torch.ops, library.ns), name).default

    linears, embeddings = operator(linear, linear_like), operator(embedding, embedding_like)
    for number, layer in enumerate(layers):
        layer.hidden = partial(linears if isinstance(layer, Linear) else embeddings, number=number)
    hidden = operator(attention, attention_like)
    return lambda layer, query, key, value, rule: hidden(layer, query, key, value, *rule)
