"""Steps in which sequences only decode, as CUDA graphs: what is launched once is replayed, without Python and the driver.

A graph has fixed sizes and addresses. So there is one for each choice of slabs and rows in them, those rounded up to powers
of two, and it reads which tokens come, and where, from tensors of its own. Rows of a slab that nobody has are computed too:
what is written there, the next sequence that gets such a row overwrites. See Accelerating PyTorch with CUDA Graphs,
https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plugins.engines.attention import Decoding, Step, TorchAttention
from plugins.engines.cache import Slab
from plugins.engines.scheduler import Piece

HELD = 32  # graphs, each with logits of its own; the least recently used goes

# It reads and writes the same tensors each time, and asks nothing of what they hold.
Compute = Callable[[], torch.Tensor]


class Capture:
    """Records what a function launches. All graphs of one of these share the memory of what they compute in between."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> tuple[torch.Tensor, Callable[[], None]]:
        """The tensor that `compute` makes, and what computes it anew."""
        compute()  # what is made at a first call only is not to be recorded
        graph = torch.cuda.CUDAGraph()
        # Other threads, of this process and its libraries, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = compute()
        return made, graph.replay


@dataclass(frozen=True)
class _Graph:
    inputs: torch.Tensor  # [2, rows]: ids, and positions
    logits: torch.Tensor  # [rows, vocab]
    replay: Callable[[], None]


class Graphs:
    """`forward`, for steps that `fit`."""

    def __init__(self, forward: Callable[[Step], torch.Tensor], capture: Capture, device: torch.device) -> None:
        self._forward, self._capture, self._device = forward, capture, device
        # The least recently used first. A slab's memory is not held by its graphs: when it is gone, they are found no more.
        self._graphs: dict[tuple[tuple[weakref.ref[Slab], int], ...], _Graph] = {}

    @staticmethod
    def fit(pieces: Sequence[Piece[Any]]) -> bool:
        """Whether `pieces`, in the order in which they lie, are all who have rows in their slabs, with a token each."""
        return all(piece.count == 1 for piece in pieces) and all(
            [piece.running.place for piece in group] == slab.places for slab, group in _by_slab(pieces)
        )

    def __call__(self, pieces: Sequence[Piece[Any]]) -> torch.Tensor:
        """Logits [pieces, vocab], till the next call."""
        tokens: list[int] = []
        positions: list[int] = []
        spans, parts = [], []
        for slab, group in _by_slab(pieces):
            first, rows = len(tokens), min(slab.rows, 1 << (len(group) - 1).bit_length())
            unused = [0] * (rows - len(group))
            tokens += [piece.running.sequence.tokens[piece.running.place.length] for piece in group] + unused
            positions += [piece.running.place.length for piece in group] + unused
            spans.append(slice(first, first + len(group)))
            parts.append((slab, rows))
        inputs = torch.tensor([tokens, positions])
        key = tuple((weakref.ref(slab), rows) for slab, rows in parts)
        graph = self._graphs.pop(key, None) or self._record(inputs, parts)
        self._graphs[key] = graph
        if len(self._graphs) > HELD:
            del self._graphs[next(iter(self._graphs))]
        graph.inputs.copy_(inputs)
        graph.replay()
        made = [graph.logits[span] for span in spans]
        return torch.cat(made) if len(made) > 1 else made[0]

    def _record(self, inputs: torch.Tensor, parts: Sequence[tuple[Slab, int]]) -> _Graph:
        own = inputs.to(self._device, copy=True)
        ids, positions = own

        def compute() -> torch.Tensor:
            ends = itertools.accumulate(rows for _, rows in parts)
            attention = TorchAttention(
                [
                    Decoding(
                        slab=slab,
                        first=end - rows,
                        last=end,
                        rows=torch.arange(rows, device=self._device),
                        positions=positions[end - rows : end],
                        top=rows,
                        masks={},
                    )
                    for end, (slab, rows) in zip(ends, parts, strict=True)
                ]
            )
            return self._forward(Step(ids, positions, attention, torch.arange(len(ids), device=self._device)))

        return _Graph(own, *self._capture(compute))


def _by_slab(pieces: Sequence[Piece[Any]]) -> list[tuple[Slab, list[Piece[Any]]]]:
    groups = itertools.groupby(pieces, key=lambda piece: piece.running.place.slab)
    return [(slab, list(group)) for slab, group in groups]
