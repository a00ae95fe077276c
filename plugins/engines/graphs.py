"""Steps in which sequences only decode, as CUDA graphs: what a step launches, one call launches once more.

A graph has fixed sizes and addresses: it computes so many rows of each of some slabs, and reads which tokens come, and
where, from a tensor of its own. It serves whatever it covers, if that is half of its rows or more. Rows that nobody has are
computed with the others: the sequence that gets one next overwrites what was written there. See Accelerating PyTorch with
CUDA Graphs, https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/.
"""

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plugins.engines.adapters import NONE
from plugins.engines.attention import Decoding, Forward, Step, TorchAttention, by_slab
from plugins.engines.cache import Slab
from plugins.engines.scheduler import Piece

HELD = 32  # graphs, each with logits of its own; the least recently used goes

Pieces = Sequence[Piece[Any]]
# It reads and writes the same tensors each time, and asks nothing of what they hold.
Compute = Callable[[], torch.Tensor]
Record = Callable[[Compute], tuple[torch.Tensor, Callable[[], None]]]  # -> the tensor that it makes; what does so anew


def recorder() -> Record:
    """For functions that share the memory of what they compute in between, and so are never replayed side by side."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Compute) -> tuple[torch.Tensor, Callable[[], None]]:
        compute()  # what is made at a first call only is not to be recorded
        graph = torch.cuda.CUDAGraph()
        # The outer one, because where recording fails, torch stays on the stream on which it recorded. Other threads may
        # use the GPU meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            made = compute()
        return made, graph.replay

    return record


@dataclass(frozen=True, eq=False)
class _Graph:
    """`slabs`: with their rows. They are not kept in memory; where one is gone, the graph is of no use any more."""

    slabs: Sequence[tuple[weakref.ref[Slab], int]]
    inputs: torch.Tensor  # [2, rows]: ids, and positions
    logits: torch.Tensor  # [rows, vocab]
    replay: Callable[[], None]

    def rows(self) -> dict[Slab, int]:
        """Of each slab; none where one is gone."""
        found = {slab: rows for there, rows in self.slabs if (slab := there()) is not None}
        return found if len(found) == len(self.slabs) else {}


class Graphs:
    """`forward`, for pieces that `fit`."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward, self._device, self._record = forward, device, recorder()
        self._graphs: list[_Graph] = []  # the least recently used first

    @staticmethod
    def fit(pieces: Pieces) -> bool:
        """Whether `pieces`, in the order in which they lie, are all who have rows in their slabs, without an adapter."""
        return all(piece.running.sequence.adapter == NONE for piece in pieces) and all(
            [piece.running.place for piece in group] == slab.places for slab, group in by_slab(pieces)
        )

    def __call__(self, pieces: Pieces) -> torch.Tensor:
        """Logits [pieces, vocab] after a token of each, till the next call."""
        groups = dict(by_slab(pieces))
        graph = self._known(groups)
        slabs = graph.rows() if graph else {slab: _rounded(len(group), slab) for slab, group in groups.items()}
        tokens: list[int] = []
        positions: list[int] = []
        firsts = {}
        for slab, rows in slabs.items():
            places = [(piece.running.sequence.tokens, piece.running.place.length) for piece in groups.get(slab, ())]
            places += [([0], 0)] * (rows - len(places))  # of nobody
            firsts[slab] = len(tokens)
            tokens += [known[length] for known, length in places]
            positions += [length for _, length in places]
        inputs = torch.tensor([tokens, positions])
        if graph is None:
            self._graphs = [one for one in self._graphs if one.rows()][1 - HELD :]
            graph = self._new(slabs, inputs)
        else:
            self._graphs.remove(graph)
        self._graphs.append(graph)
        graph.inputs.copy_(inputs)
        graph.replay()
        made = [graph.logits[firsts[slab] : firsts[slab] + len(group)] for slab, group in groups.items()]
        return torch.cat(made) if len(made) > 1 else made[0]

    def _known(self, groups: Mapping[Slab, Pieces]) -> _Graph | None:
        """The smallest graph that computes all of `groups`, and of other slabs only empty ones."""
        most = 2 * sum(len(group) for group in groups.values())
        found = None
        for graph in self._graphs:
            rows = graph.rows()
            covers = all(rows.get(slab, 0) >= len(group) for slab, group in groups.items())
            alone = all(slab in groups or not slab.places for slab in rows)
            if covers and alone and (count := sum(rows.values())) <= most:
                found, most = graph, count - 1
        return found

    def _new(self, slabs: Mapping[Slab, int], inputs: torch.Tensor) -> _Graph:
        """To record, it computes `inputs`, whose keys and values are then written as often as it does."""
        own = inputs.to(self._device, copy=True)
        ids, positions = own

        def compute() -> torch.Tensor:
            parts = []
            for (slab, rows), end in zip(slabs.items(), itertools.accumulate(slabs.values()), strict=True):
                mine = slice(end - rows, end)
                everyone = torch.arange(rows, device=self._device)
                parts.append(Decoding(slab, mine.start, mine.stop, everyone, positions[mine], top=rows, masks={}))
            wanted = torch.arange(len(ids), device=self._device)
            return self._forward(Step(ids, positions, TorchAttention(parts), wanted))

        return _Graph([(weakref.ref(slab), rows) for slab, rows in slabs.items()], own, *self._record(compute))


def _rounded(count: int, slab: Slab) -> int:
    """Up to a power of two."""
    return min(slab.rows, 1 << (count - 1).bit_length())
