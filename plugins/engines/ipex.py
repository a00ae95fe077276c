"""The IPEX engine: the torch engine with kernels of Intel's extension for PyTorch 2.8, which is the last one.

Upstream is archived since March 2026, and says that security issues stay. OpenVino is kept up and faster on the same
processors; Torch has the same answers without an environment of its own.

Keys and values lie in pages, which IPEX's attention reads through a table: with the write into them it takes less than half
of the time of torch's operators. Products of weights in few bits are IPEX's too; others are the torch engine's: IPEX's own
(`ipex.optimize`, TPP) gained nothing over oneDNN's with packed bf16 weights, or a tenth at 8 rows.
`ipex.llm.optimize` is not used: it makes a model's forward one with a cache of its own, in which requests cannot come and
go, knows few architectures, and wants a transformers that reads newer models wrongly. In process, on two cores, this engine
made about 0.9, 1.2 and 1.1 times its `generate`'s tokens a second, with 1, 8 and 32 sequences.
"""

import itertools
from collections.abc import Sequence as Several
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer

from plugins.engines import Ipex, attention, quantized_files, runner
from plugins.engines.batched import BatchedEngine
from plugins.engines.batching import Computer
from plugins.engines.cache import BLOCK
from plugins.engines.integers import GROUP, Bits, in_integers, pack, scales_of
from plugins.engines.pages import Pages
from plugins.engines.scheduler import Piece, Scheduler
from plugins.engines.sequence import Sequence
from plugins.engines.torch import load_model
from plugins.model_files import check_model_files
from plugins.pretrained import load
from plugins.spec import UserError
from plugins.types import ModelSource

NEEDED = {"torch": "2.8", "intel-extension-for-pytorch": "2.8"}  # on another torch it ends the process
KINDS = {"int8": 1, "int4": 2}  # IPEX's numbers for them
PROBED = 1024 // BLOCK  # pages for the probes of a new runner


class IpexEngine(BatchedEngine[Ipex]):
    """An Engine, see plugins.engines: the torch engine but for what computes."""

    def __init__(self, source: ModelSource, options: Ipex, *, cpus: float, gpus: float = 0) -> None:
        options.check_gpus(gpus)
        check_versions()
        super().__init__(source, options, cpus=cpus)

    def _load(self, cpus: float, gpus: float) -> tuple[Computer, Scheduler[Sequence]]:
        check_model_files(self._source, "source.path")
        stored = quantized_files.stored(self._source, "ipex", ("int8", "int4"))
        weights = self._options.weights
        if stored and weights not in ("same", stored):
            raise UserError(
                f"Ipex.weights = {weights!r}: {self._source.path!r} is in {stored} already; leave it at 'same'"
            )
        tokenizer, model = load(AutoTokenizer, self._source), load_model(self._source, gpus, stored is not None)
        self._know(tokenizer, model.generation_config, model.get_input_embeddings().num_embeddings)
        wanted = self._longest(model.config)
        runner = Runner(model, stored or weights)
        runner.check_length(model.config.get_text_config(), wanted)
        cache = self._cache(wanted, lambda tokens: runner.make_pages(tokens // BLOCK), runner.tables.token_bytes)
        return runner, Scheduler(cache, self._options.max_batch)


def check_versions() -> None:
    """Raise UserError where IPEX is not what this module was written for, or would end the process when imported."""
    for name, wanted in NEEDED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        if found is None or found.split(".")[:2] != wanted.split("."):
            here = f"{name} {found}" if found else f"no {name}"
            raise UserError(
                f"Ipex needs {name} {wanted}, and here is {here}: scripts/engine-env ipex makes an environment that has it"
            )


def kernels() -> Any:
    """IPEX's own operators."""
    check_versions()
    import intel_extension_for_pytorch  # noqa: F401  # adds them to torch

    return torch.ops.torch_ipex


class Tables(Pages):
    """Pages of keys and values as tensors: for each layer two, [pages, KV heads, BLOCK, width]."""

    def __init__(self, shapes: Several[tuple[int, int, int]], dtype: torch.dtype, count: int) -> None:
        kinds = [(heads, width) for heads, *widths in shapes for width in widths]
        super().__init__([heads * BLOCK * width * dtype.itemsize for heads, width in kinds], count)
        self.token_bytes = sum(heads * width for heads, width in kinds) * dtype.itemsize
        made = [
            torch.from_numpy(table).view(dtype).view(count, heads, BLOCK, width)
            for table, (heads, width) in zip(self.memory, kinds, strict=True)
        ]
        self.layers = list(itertools.pairwise(made))[::2]


class Runner(runner.Runner):
    """The torch engine's runner with other kernels. It is given its pages before it serves."""

    spec = "Ipex"

    def __init__(self, model: Any, weights: Literal["same"] | Bits) -> None:
        self._kernels = kernels()
        if weights == "int4":
            self.tolerated = 0.5
        super().__init__(model, weights=weights if weights == "same" else partial(FewBits, bits=weights))

    def make_pages(self, count: int) -> Tables:
        """Room for keys and values, from which its attention reads from now on."""
        self.tables = tables = Tables(self._kinds, self.dtype, count)
        return tables

    def _tables(self, shapes: Several[tuple[int, int, int]]) -> Tables:
        if odd := next((shape for shape in shapes if shape[1] != shape[2]), None):
            raise ValueError(f"its keys have {odd[1]} numbers and its values {odd[2]}")
        self._kinds = shapes
        return self.make_pages(PROBED)

    def _attention(self, decoding: Several[Piece[Any]], reading: Several[Piece[Any]]) -> "Attention":
        return Attention(self._kernels, self.tables, decoding, reading)


@dataclass(frozen=True)
class Seen:
    """What some pieces of a step see: the pages of each, [pieces, pages], and how many tokens that are, [pieces]."""

    pages: torch.Tensor
    lengths: torch.Tensor
    longest: int

    @classmethod
    def by(cls, pieces: Several[Piece[Any]]) -> "Seen":
        lengths = [piece.running.place.length + piece.count for piece in pieces]
        longest = max(lengths, default=0)
        table = np.zeros((len(pieces), -(-longest // BLOCK)), np.int32)
        for row, piece, length in zip(table, pieces, lengths, strict=True):
            place, count = piece.running.place, -(-length // BLOCK)
            row[:count] = place.slab.tables[place.row, :count]
        return cls(torch.from_numpy(table), torch.tensor(lengths, dtype=torch.int32), longest)


class Attention(attention.Attention):
    """The attention of one step, by IPEX."""

    def __init__(
        self, kernels: Any, tables: Tables, decoding: Several[Piece[Any]], reading: Several[Piece[Any]]
    ) -> None:
        self._kernels, self._layers, self._ends = kernels, tables.layers, len(decoding)
        slots: list[int] = []
        for piece in [*decoding, *reading]:
            place = piece.running.place
            pages = place.slab.tables[place.row]
            slots += [
                int(pages[at // BLOCK]) * BLOCK + at % BLOCK for at in range(place.length, place.length + piece.count)
            ]
        self._slots = torch.tensor(slots, dtype=torch.int32)
        self._by_decoding, self._by_reading = Seen.by(decoding), Seen.by(reading)
        counts = [piece.count for piece in reading]
        self._begins, self._seen_begins = (
            torch.tensor([0, *itertools.accumulate(each)], dtype=torch.int32)
            for each in (counts, self._by_reading.lengths.tolist())
        )
        self._most = max(counts, default=0)
        self._heads: dict[tuple[int, int], torch.Tensor] = {}

    def _kv_heads(self, heads: int, kv_heads: int) -> torch.Tensor:
        """[heads]: the KV head of each; hardly ever different in another layer."""
        if (heads, kv_heads) not in self._heads:
            every = torch.arange(kv_heads, dtype=torch.int32)
            self._heads[heads, kv_heads] = every.repeat_interleave(heads // kv_heads)
        return self._heads[heads, kv_heads]

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: attention.Rule
    ) -> torch.Tensor:
        """As its parent."""
        keys, values = self._layers[layer]
        self._kernels.reshape_and_cache(key, value, keys, values, self._slots, "auto", 1.0, 1.0)
        result = torch.empty_like(query, memory_format=torch.contiguous_format)
        ends, cap = self._ends, rule.softcap or -1.0
        if ends:
            seen, heads = self._by_decoding, self._kv_heads(query.shape[1], key.shape[1])
            self._kernels.single_query_cached_kv_attention(
                result[:ends], query[:ends], keys, values, heads, rule.scale, seen.pages, seen.lengths, BLOCK,
                seen.longest, None, rule.window or -1, 1.0, 1.0, cap,
            )  # fmt: skip
        if ends < len(query):
            seen, before = self._by_reading, (rule.window or 0) - 1  # this many tokens before each; -1: all
            self._kernels.flash_attn_varlen_func(
                result[ends:], query[ends:], keys, values, self._begins, self._seen_begins, self._most,
                seen.longest, rule.scale, True, seen.pages, None, before, -1, "auto", 1.0, 1.0, cap,
            )  # fmt: skip
        return result


class FewBits:
    """A Product of weights in few bits, which IPEX makes whole again as it multiplies."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None, *, bits: Bits
    ) -> None:
        scales = scales_of(weight, bits) if scales is None else scales
        integers = in_integers(weight, scales, bits)
        if bits == "int4":
            integers = pack(integers)[:, : -(-weight.shape[1] // 2)]
        self._packed = torch.ops.ipex_prepack.weight_only_qlinear_prepack(
            W=integers.contiguous(),
            W_dtype=KINDS[bits],
            W_shape=weight.shape,
            scales=scales if bits == "int4" else scales.flatten(),
            zero_points=None,  # with them it takes two to three times as long
            B=bias,
            g_idx=None,
            batch_size=None,
            group_size=GROUP if bits == "int4" else -1,  # -1: a row has one scale
            lowp_mode=0,  # it multiplies in what it is given
            act_quant_mode=-1,
        )
        self._inputs = weight.shape[1]
        self._bias, self._dtype = bias, weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.torch_ipex.ipex_woq_linear(x, self._packed.get_data_handle())
        return result

    def added(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return to + self(x)

    def weight(self) -> torch.Tensor:
        """What it makes of each input by itself."""
        made = self(torch.eye(self._inputs, dtype=self._dtype))
        return (made if self._bias is None else made - self._bias).t()
