"""The model of a torch engine: it computes one step for many sequences at once, whose tokens stand end to end in one row.

Nothing is padded but the keys of sequences that decode side by side. transformers' own forward runs over that row, with an
attention that reads and writes our cache; for the usual architectures lean.py does the same in fewer operators.
"""

import inspect
import itertools
import math
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from plugins import hardware
from plugins.engines import lean
from plugins.engines.adapters import NONE, Adapters
from plugins.engines.cache import Cache, Place, Slab
from plugins.engines.compiled import SIZES, Compiled
from plugins.engines.layers import Embedding, Linear, Turns, Weights
from plugins.engines.scheduler import Piece, Running, is_scored
from plugins.pretrained import first_line
from plugins.spec import UserError

OURS = "manta_serve"  # what transformers calls our attention
SMALL = 256  # keys of all sequences: below it, one call costs less than several
QUERIES = 64  # of a prompt at a time: their scores stay in a core's cache


class Table(NamedTuple):
    """The keys and values of a slab."""

    wholes: list[
        torch.Tensor
    ]  # [tables, rows, KV heads, capacity, width]: for each KV heads and width, all that have them
    layers: list[
        tuple[torch.Tensor, torch.Tensor]
    ]  # each layer's keys and values, which are parts of those: [rows, ...]


class Tables:
    """A Store of keys and values, for layers of `shapes`: (KV heads, width of a key, width of a value)."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self.token_bytes = sum(heads * (key + value) for heads, key, value in shapes) * dtype.itemsize

    def make(self, rows: int, capacity: int) -> Table:
        """Of zeros, since a NaN that is hidden would still be one."""
        try:
            return self._made(rows, capacity)
        except (RuntimeError, OSError) as error:
            if hardware.is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise

    def _made(self, rows: int, capacity: int) -> Table:
        kinds = [(heads, width) for heads, *widths in self._shapes for width in widths]
        # Those of one shape lie in one tensor: a row is then copied by one operator, not by two for each layer.
        wholes = {
            (heads, width): self._zeros(count, rows, heads, capacity, width)
            for (heads, width), count in Counter(kinds).items()
        }
        unused = {kind: iter(whole) for kind, whole in wholes.items()}
        tables = [next(unused[kind]) for kind in kinds]
        return Table(list(wholes.values()), list(zip(tables[::2], tables[1::2], strict=True)))

    def release(self, tables: Table) -> None:
        """Nobody has them any more: torch frees them by itself."""

    def copy(self, source: Place, at: int, target: Place, to: int, tokens: int) -> None:
        for old, new in zip(source.slab.tables.wholes, target.slab.tables.wholes, strict=True):
            new[:, target.row, :, to : to + tokens] = old[:, source.row, :, at : at + tokens]

    def _zeros(self, *shape: int) -> torch.Tensor:
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # Memory that the kernel zeroes where it is first touched: all at once would hold up everyone for some steps.
        memory = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize, flags=mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # on Linux; without, each 4 KiB is a fault of its own
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=self._dtype).view(shape)


@dataclass(frozen=True)
class Decoding:
    """Sequences of one slab that compute one token each: tokens `first:last` of the step, in the order of their rows."""

    slab: Slab
    first: int
    last: int
    rows: torch.Tensor  # [sequences]
    positions: torch.Tensor  # [sequences]: where the token comes
    top: int  # rows of the slab that are read
    masks: dict[int | None, torch.Tensor | None]

    @property
    def is_dense(self) -> bool:
        return self.top == self.last - self.first

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """[rows, 1, 1, keys], to be added to the scores; None where every key is seen."""
        if window not in self.masks:
            keys, here = torch.arange(self.slab.capacity, device=self.rows.device), self.positions[:, None]
            hidden = keys > here
            if window is not None:
                hidden |= keys <= here - window
            mask = None
            if bool(hidden.any()):
                mask = torch.zeros(self.top, self.slab.capacity, dtype=dtype, device=hidden.device)
                mask[self.rows] = mask[self.rows].masked_fill_(hidden, torch.finfo(dtype).min)
                mask = mask[:, None, None]
            self.masks[window] = mask
        return self.masks[window]


@dataclass(frozen=True)
class Reading:
    """A piece of a prompt: tokens `first:last` of the step, the sequence's from `start` on."""

    place: Place
    first: int
    last: int
    start: int
    masks: dict[tuple[int, int | None], torch.Tensor]

    def keys(self, at: int, till: int, window: int | None) -> slice:
        """The keys that tokens `at:till` of the piece may see."""
        return slice(0 if window is None else max(0, self.start + at - window + 1), self.start + till)

    def mask(self, at: int, till: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[tokens, keys] for tokens `at:till`, to be added to the scores; the same in every layer, so made once."""
        if (at, window) not in self.masks:
            seen = self.keys(at, till, window)
            here = torch.arange(self.start + at, self.start + till, device=like.device)[:, None]
            there = torch.arange(seen.start, seen.stop, device=like.device)
            hidden = there > here
            if window is not None:
                hidden |= there <= here - window
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(like.dtype).min)
            self.masks[at, window] = mask
        return self.masks[at, window]


class Rule(NamedTuple):
    """How a layer attends: the scale of its scores, how many tokens it sees, and what softly bounds the scores."""

    scale: float
    window: int | None
    softcap: float | None


class Attention:
    """The attention of one step: it writes the step's keys and values into the cache, and reads what each token may see."""

    def __init__(self, decoding: Sequence[Decoding], reading: Sequence[Reading]) -> None:
        self._decoding, self._reading = decoding, reading

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """query [tokens, heads, d], key [tokens, KV heads, d], value [tokens, KV heads, e] -> [tokens, heads, e]."""
        rule = Rule(scale, window, softcap)
        query = query.unflatten(1, (key.shape[1], -1))
        results = [self._decode(part, layer, query, key, value, rule) for part in self._decoding]
        results += [self._read(part, layer, query, key, value, rule) for part in self._reading]
        result = torch.cat(results) if len(results) > 1 else results[0]
        return result.flatten(1, 2)

    def _decode(
        self, part: Decoding, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        keys, values = part.slab.tables.layers[layer]
        mine = slice(part.first, part.last)
        keys[part.rows, :, part.positions] = key[mine]
        values[part.rows, :, part.positions] = value[mine]
        queries = query[mine]
        if not part.is_dense:  # rows between, whose prompts are being read
            spread = queries.new_zeros(part.top, *queries.shape[1:])
            spread[part.rows] = queries
            queries = spread
        # Whole rows: what has gaps, torch would copy before it multiplies.
        result = _attend(queries, keys[: part.top], values[: part.top], part.mask(rule.window, query.dtype), rule)
        return result if part.is_dense else result[part.rows]

    def _read(
        self, part: Reading, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        keys, values = (table[part.place.row] for table in part.place.slab.tables.layers[layer])
        mine, count = slice(part.first, part.last), part.last - part.first
        keys[:, part.start : part.start + count] = key[mine].transpose(0, 1)
        values[:, part.start : part.start + count] = value[mine].transpose(0, 1)
        queries = query[mine].permute(1, 2, 0, 3)  # [KV heads, group, tokens, d]
        group = queries.shape[1]
        result = value.new_empty(count, *query.shape[1:3], value.shape[-1])
        for at in range(0, count, QUERIES):
            till = min(at + QUERIES, count)
            seen, mask = part.keys(at, till, rule.window), part.mask(at, till, rule.window, query)
            block = queries[:, :, at:till].flatten(1, 2)[None]
            made = _attend(block, keys[None, :, seen], values[None, :, seen], mask.repeat(group, 1), rule)
            result[at:till] = made[0].unflatten(1, (group, till - at)).permute(2, 0, 1, 3)
        return result


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, rule: Rule
) -> torch.Tensor:
    """[sequences, KV heads, queries, e] of queries [.., queries, d], keys [.., keys, d] and values [.., keys, e]."""
    small = query.shape[0] * key.shape[2] <= SMALL and query.shape[2] < QUERIES
    if rule.softcap is None and (small or query.device.type != "cpu"):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scale)
    # On a CPU torch's own takes twice as long as the products that it is made of.
    shape = query.shape[:2]
    scores = torch.bmm((query * rule.scale).flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, shape)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores += mask
    result: torch.Tensor = torch.bmm(scores.softmax(-1).flatten(0, 1), value.flatten(0, 1)).unflatten(0, shape)
    return result


@dataclass(frozen=True)
class Step:
    """What one forward is given."""

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    attention: Attention
    wanted: torch.Tensor  # [logits]: the tokens after which the next is to be known


Forward = Callable[[Step], torch.Tensor]  # -> logits [wanted, vocab]


class Runner:
    """A model and its `adapters`. `tables` makes the rows of keys and values that its steps read and write."""

    spec: ClassVar[str] = "Torch"
    tolerated = 0.1  # how far off its logits may be, relatively, where it rounds more than fp32 does

    def __init__(self, model: Any, *, weights: Weights = "same", compiled: bool = False) -> None:
        """Takes `model` over: its layers become ours. Raises UserError where that does not compute what the model does.

        `compiled`: what lies between them is compiled, which takes from some seconds to minutes.
        """
        self.device, self.dtype = model.device, model.dtype
        refusal = f"the {self.spec.lower()} engine cannot serve {type(model).__name__}"
        try:
            alone = [_alone(model, ids) for ids in PROBES]
            turns = Turns()
            self._forward, layers = lean.take_over(model, turns, weights, self._norm) or _take_over(
                model, turns, weights
            )
            self.adapters = Adapters(layers, turns, self.dtype)
            self.tables = self._tables(self._shapes())
            if compiled:
                self._forward = self._compile([layer for layer, _ in layers.values()])
            off = self._off(alone)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{refusal}: {type(error).__name__}: {first_line(error)}") from error
        if not off <= (self.tolerated if weights != "same" or self.dtype != torch.float32 else 1e-3):
            raise UserError(f"{refusal}: in a batch its logits are off by {off:.1%}")

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

    def _norm(self, layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lean.Norm(layer)

    def _tables(self, shapes: Sequence[tuple[int, int, int]]) -> Any:
        return Tables(shapes, self.dtype, self.device)

    def _attention(self, decoding: Sequence[Piece[Any]], reading: Sequence[Piece[Any]]) -> Attention:
        parts, first = [], 0
        for _, group in itertools.groupby(decoding, key=lambda piece: piece.running.place.slab):
            places = [piece.running.place for piece in group]
            parts.append(
                Decoding(
                    slab=places[0].slab,
                    first=first,
                    last=first + len(places),
                    rows=torch.tensor([place.row for place in places], device=self.device),
                    positions=torch.tensor([place.length for place in places], device=self.device),
                    top=places[-1].row + 1,
                    masks={},
                )
            )
            first += len(places)
        readings = []
        for piece in reading:
            place = piece.running.place
            readings.append(Reading(place, first, first + piece.count, place.length, {}))
            first += piece.count
        return Attention(parts, readings)

    def _tell_adapters(self, pieces: Sequence[Piece[Any]], wanted: Sequence[int]) -> None:
        if all(piece.running.sequence.adapter == NONE for piece in pieces):
            self.adapters.begin((), ())
            return
        tokens = [name for piece in pieces for name in [piece.running.sequence.adapter] * piece.count]
        self.adapters.begin(tokens, [tokens[at] for at in wanted])

    def _compile(self, layers: Sequence[Linear | Embedding]) -> Compiled:
        forward = self._forward
        made = Compiled(lambda *parts: forward(Step(*parts)), layers, self.device)
        made.warm_up(self._probe_step(_Recorder(), *sizes) for sizes in SIZES)
        return made

    def _probe_step(self, attention: Attention, tokens: int, wanted: int) -> Step:
        ids, positions = (torch.arange(tokens, device=self.device) for _ in range(2))
        return Step(ids, positions, attention, torch.arange(wanted, device=self.device))

    @torch.inference_mode()
    def _shapes(self) -> list[tuple[int, int, int]]:
        """KV heads and widths of each layer, from what it asks of its attention."""
        recorder = _Recorder()
        self.adapters.begin((), ())
        self._forward(self._probe_step(recorder, 8, 1))
        if sorted(recorder.shapes) != list(range(len(recorder.shapes))):
            raise ValueError(f"its layers have the numbers {sorted(recorder.shapes)}")
        self.windows = recorder.windows
        return [recorder.shapes[layer] for layer in sorted(recorder.shapes)]

    def _off(self, alone: Sequence[torch.Tensor]) -> float:
        """How far off the logits are, relatively, where the probes are read together and decoded together."""
        cache = Cache(self.tables, budget=1024, longest=64)
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


PROBES = ([1, 2, 3, 4, 5, 6, 7, 9], [7, 5, 3, 9])


@dataclass
class _Probe:
    """A sequence for `_off`."""

    tokens: list[int]
    adapter: str = NONE
    scores_prompt: bool = False
    abandoned: bool = False


class _Recorder(Attention):
    """Sees what is asked of an attention; its answers are zeros."""

    def __init__(self) -> None:
        super().__init__((), ())
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.windows: set[int | None] = set()

    def __call__(self, layer: int, query: Any, key: Any, value: Any, *, window: int | None = None, **_: Any) -> Any:
        self.shapes[layer] = (key.shape[1], key.shape[2], value.shape[2])
        self.windows.add(window)
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
        scale=scale,
        window=sliding_window,
        softcap=softcap,
    )
    return result[None], None
