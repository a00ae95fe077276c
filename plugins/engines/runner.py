"""The model of a torch engine: it computes one step for many sequences at once, whose tokens stand end to end in one row.

Nothing is padded but the keys of sequences that decode side by side. transformers' own forward runs over that row, with an
attention that reads and writes our cache; for the usual architectures lean.py does the same in fewer operators.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from plugins import hardware
from plugins.engines import lean, native
from plugins.engines.adapters import NONE, Adapters
from plugins.engines.attention import Attention, Forward, NativeAttention, Rule, Step, Tables, TorchAttention
from plugins.engines.cache import Cache
from plugins.engines.compiled import SIZES, Compiled
from plugins.engines.graphs import Graphs
from plugins.engines.layers import Embedding, Linear, Turns, Weights
from plugins.engines.scheduler import BALANCE, Piece, Running, is_scored
from plugins.pretrained import first_line
from plugins.spec import UserError

OURS = "manta_serve"  # what transformers calls our attention


class Runner:
    """A model and its `adapters`. `tables` makes the rows of keys and values that its steps read and write."""

    spec: ClassVar[str] = "Torch"
    tolerated = 0.1  # how far off its logits may be, relatively, where it rounds more than fp32 does

    def __init__(
        self, model: Any, *, weights: Weights = "same", compiled: bool = False, cuda_graphs: bool = False
    ) -> None:
        """Takes `model` over: its layers become ours. Raises UserError where that does not compute what the model does.

        `compiled`: what lies between them is compiled, which takes from some seconds to minutes. `cuda_graphs`: steps in
        which sequences only decode are recorded.
        """
        self.device, self.dtype = model.device, model.dtype
        self._native = native.load() if self.device.type == "cpu" else None
        refusal = f"the {self.spec.lower()} engine cannot serve {type(model).__name__}"
        try:
            alone = [_alone(model, ids) for ids in PROBES]
            turns = Turns()
            # torch.compile fuses torch's operators, and does not see into ours.
            between = lean.Torch() if compiled or self._native is None else self._native
            self._forward, layers = lean.take_over(model, turns, weights, between) or _take_over(model, turns, weights)
            self.adapters = Adapters(layers, turns, self.dtype)
            self.tables = self._tables(self._shapes())
            if compiled:
                self._forward = self._compile([layer for layer, _ in layers.values()])
            self._graphs: Graphs | None = None
            off = self._off(alone)
            if cuda_graphs:
                off = max(off, self._off_with_graphs(alone))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{refusal}: {type(error).__name__}: {first_line(error)}") from error
        if not off <= (self.tolerated if weights != "same" or self.dtype != torch.float32 else 1e-3):
            raise UserError(f"{refusal}: in a batch its logits are off by {off:.1%}")

    @property
    def balance(self) -> int:
        """Tokens whose products take as long as reading the weights."""
        if self.device.type != "cpu":
            return 10 * BALANCE
        in_tiles = self._native is not None and self._native.has_tiles and self.dtype == torch.bfloat16
        return 3 * BALANCE if in_tiles else BALANCE

    def check_length(self, config: Any, length: int) -> None:
        """Raise UserError where sequences of `length` tokens would be computed otherwise than one by one."""
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if window and window < length and kinds != {"full_attention"} and self.windows == {None}:
            wrong = f"its window of {window} is not told to its attention"
            raise UserError(f"the {self.spec.lower()} engine cannot serve this model: {wrong}")
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            made_for = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if length > made_for:
                words = "beyond which this model's positions depend on the batch"
                raise UserError(f"{self.spec}.max_length = {length}: at most {made_for}, {words}")

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece[Any]]) -> tuple[torch.Tensor, list[tuple[Piece[Any], slice]]]:
        """As in Computer."""
        decoding = [piece for piece in pieces if piece.running.decodes and not is_scored(piece)]
        # In the order in which they lie, so that attention can take whole slabs.
        decoding.sort(key=lambda piece: (id(piece.running.place.slab), piece.running.place.row))
        if self._graphs is not None and len(decoding) == len(pieces) and self._graphs.fit(decoding):
            self.adapters.begin((), ())
            return self._graphs(decoding), [(piece, slice(at, at + 1)) for at, piece in enumerate(decoding)]
        pieces = decoding + [piece for piece in pieces if not piece.running.decodes or is_scored(piece)]
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        rows = []
        for piece in pieces:
            start, tokens = piece.running.place.length, piece.running.sequence.tokens
            first, known = len(ids), len(wanted)
            ids += tokens[start : start + piece.count]
            positions += range(start, start + piece.count)
            wanted += range(first if is_scored(piece) else len(ids) - piece.ends, len(ids))
            if len(wanted) > known:
                rows.append((piece, slice(known, len(wanted))))
        self._tell_adapters(pieces, wanted or [0])
        step = Step(
            ids=torch.tensor(ids, device=self.device),
            positions=torch.tensor(positions, device=self.device),
            attention=self._attention(decoding, pieces[len(decoding) :]),
            wanted=torch.tensor(wanted or [0], device=self.device),  # not every product takes no rows at all
        )
        return self._forward(step)[: len(wanted)], rows

    def _tables(self, shapes: Sequence[tuple[int, int, int]]) -> Any:
        return Tables(shapes, self.dtype, self.device)

    def _attention(self, decoding: Sequence[Piece[Any]], reading: Sequence[Piece[Any]]) -> Attention:
        if self._native is not None:
            return NativeAttention(self._native, [*decoding, *reading])
        return TorchAttention.of(decoding, reading, self.device)

    def _tell_adapters(self, pieces: Sequence[Piece[Any]], wanted: Sequence[int]) -> None:
        if all(piece.running.sequence.adapter == NONE for piece in pieces):
            self.adapters.begin((), ())
            return
        tokens = [name for piece in pieces for name in [piece.running.sequence.adapter] * piece.count]
        self.adapters.begin(tokens, [tokens[at] for at in wanted])

    def _compile(self, layers: Sequence[Linear | Embedding]) -> Compiled:
        forward = self._forward
        made = Compiled(lambda *parts: forward(Step(*parts)), layers, self.device)
        made.warm_up(self._probe_step(_Observer(), *sizes) for sizes in SIZES)
        return made

    def _off_with_graphs(self, alone: Sequence[torch.Tensor]) -> float:
        """As `_off`, with steps recorded, as they are from now on."""
        self._graphs = Graphs(self._forward, self.device)
        try:
            return self._off(alone)
        except RuntimeError as error:
            if hardware.is_out_of_memory(error):
                raise
            # What is not permitted while a graph is recorded is said first, and at its end that something was.
            cause = error.__context__ if isinstance(error.__context__, Exception) else error
            wrong = f"this model cannot be recorded: {first_line(cause)}"
            raise UserError(f"{self.spec}.cuda_graphs = True: {wrong}") from error

    def _probe_step(self, attention: Attention, tokens: int, wanted: int) -> Step:
        ids, positions = (torch.arange(tokens, device=self.device) for _ in range(2))
        return Step(ids, positions, attention, torch.arange(wanted, device=self.device))

    @torch.inference_mode()
    def _shapes(self) -> list[tuple[int, int, int]]:
        """KV heads and widths of each layer, from what it asks of its attention."""
        observer = _Observer()
        self.adapters.begin((), ())
        self._forward(self._probe_step(observer, 8, 1))
        if sorted(observer.shapes) != list(range(len(observer.shapes))):
            raise ValueError(f"its layers have the numbers {sorted(observer.shapes)}")
        self.windows = observer.windows
        return [observer.shapes[layer] for layer in sorted(observer.shapes)]

    def _off(self, alone: Sequence[torch.Tensor]) -> float:
        """How far off the logits are, relatively, where the probes are read together and decoded together."""
        cache = Cache(self.tables, budget=2**13, longest=64)  # slabs of four rows
        probes = [_Probe(list(ids)) for ids in PROBES]
        running = []
        for probe in probes:
            place = cache.place(len(probe.tokens))
            assert place is not None
            running.append(Running(probe, place))
        for left in (1, 0):  # all but the last token, then that
            pieces = [Piece(one, one.left - left) for one in running]
            logits, rows = self.run(pieces)
            for piece in pieces:
                piece.running.place.length += piece.count
        made = torch.stack([logits[part][0] for _, part in sorted(rows, key=lambda row: running.index(row[0].running))])
        wanted = torch.stack(list(alone))
        off: float = ((made.float() - wanted).norm() / wanted.norm()).item()
        return off


PROBES = ([1, 2, 3, 4, 5, 6, 7, 9], [7, 5, 3, 9], [8, 1, 8])


@dataclass
class _Probe:
    """A sequence for `_off`."""

    tokens: list[int]
    adapter: str = NONE
    scores_prompt: bool = False
    abandoned: bool = False


class _Observer(Attention):
    """Sees what is asked of an attention; its answers are zeros."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.windows: set[int | None] = set()

    def __call__(self, layer: int, query: Any, key: Any, value: Any, rule: Rule) -> Any:
        self.shapes[layer] = (key.shape[1], key.shape[2], value.shape[2])
        self.windows.add(rule.window)
        return value.new_zeros(*query.shape[:2], value.shape[2])


@torch.inference_mode()
def _alone(model: Any, ids: list[int]) -> torch.Tensor:
    """fp32 logits [vocab] after `ids` as the model itself computes them."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0, -1].float()


def _take_over(model: Any, turns: Turns, weights: Weights) -> tuple[Forward, dict[str, tuple[Linear | Embedding, int]]]:
    """transformers' own forward with our layers and our attention."""
    head = model.get_output_embeddings()
    picks = "logits_to_keep" in inspect.signature(model.forward).parameters  # else its head is given every token
    layers: dict[str, tuple[Linear | Embedding, int]] = {}
    for name, module in list(model.named_modules()):
        if type(module) in (torch.nn.Linear, Conv1D):
            layers[name] = (Linear([module], turns, weights=weights, of_wanted=picks and module is head), 0)
        elif type(module) is torch.nn.Embedding:
            layers[name] = (Embedding(module, turns), 0)
        else:
            continue
        model.set_submodule(name, layers[name][0])
    AttentionInterface.register(OURS, _attention)
    model.set_attn_implementation(OURS)

    def forward(step: Step) -> torch.Tensor:
        options = {"logits_to_keep": step.wanted} if picks else {}
        ids, positions = step.ids[None], step.positions[None]
        logits: torch.Tensor = model(
            input_ids=ids, position_ids=positions, use_cache=False, manta=step.attention, **options
        ).logits[0]
        return logits if picks else logits[step.wanted]

    return forward, layers


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    manta: Attention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Ours, as transformers calls it: query [1, heads, tokens, d] and so on -> [1, tokens, heads, e].

    What else a model tells its attention is passed over: where that mattered, its logits would be off.
    """
    if manta is None:
        raise ValueError("its attention has a form of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = value.dtype
    result = manta(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1).to(dtype),
        key[0].transpose(0, 1).to(dtype),
        value[0].transpose(0, 1),
        Rule(scale, sliding_window, softcap),
    )
    return result[None], None
