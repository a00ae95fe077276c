"""The OpenVINO engine: OpenVINO computes the steps, with its paged attention; all else is as in the torch engine.

OpenVINO GenAI has a pipeline that batches, but its step keeps Python's lock, so that a replica hears nothing meanwhile;
one request whose schema it does not know ends all that run beside it; and it knows neither logit_bias, nor the tokens that
were likely in a token's place, nor adapters by request.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Several
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13
from openvino._offline_transformations import paged_attention_transformation
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from plugins import hardware
from plugins.engines import OpenVino, pages
from plugins.engines.adapters import NONE
from plugins.engines.batched import BatchedEngine
from plugins.engines.batching import Computer
from plugins.engines.cache import BLOCK
from plugins.engines.openvino_files import exported
from plugins.engines.scheduler import Piece, Scheduler, is_scored
from plugins.engines.sequence import Sequence
from plugins.engines.text import Voice
from plugins.model_files import OPENVINO, check_model_files
from plugins.pretrained import first_line, load
from plugins.spec import UserError
from plugins.types import ModelSource

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "f32"}
WANTED = "wanted"  # an input of ours: the tokens after which the next is to be known


class OpenVinoEngine(BatchedEngine[OpenVino]):
    """An Engine, see plugins.engines: the torch engine but for what computes.

    The weights of an exported model are what they are: each adapter in memory is a whole model, merged before the export.
    """

    def __init__(self, source: ModelSource, options: OpenVino, *, cpus: float, gpus: float = 0) -> None:
        options.check_gpus(gpus)
        super().__init__(source, options, cpus=cpus)

    def _open(self, cpus: float, gpus: float) -> tuple[Computer, Scheduler[Sequence]]:
        check_model_files(self._source, "source.path", self._options.files)
        if self._source.dtype == "bf16" and not hardware.has_bf16(hardware.device(0)):
            raise UserError(
                "source.dtype = 'bf16': this CPU has no bf16, which OpenVino needs for it; leave it at 'auto'"
            )
        self._config = load(AutoConfig, self._source)
        self._wanted = self._longest(self._config)
        self._folder = exported(self._source, self._options.weights)  # on all CPUs: none is claimed yet
        return super()._open(cpus, gpus)

    def _placed(self, cpus: float, gpus: float) -> AbstractContextManager[ExitStack]:
        hardware.use_cpus(1)  # of torch, which only chooses tokens here: more threads would be in the way of OpenVINO's
        return hardware.confined_threads(cpus)

    def _load(self, cpus: float, gpus: float) -> tuple[Computer, Scheduler[Sequence]]:
        tokenizer = load(AutoTokenizer, self._source)
        dtype = hardware.compute_dtype(self._source.dtype, self._device)
        self._compile = partial(Model, dtype=dtype, threads=max(1, int(cpus)))
        base = self._compile(self._folder)
        self._know(tokenizer, _generation_config(self._source, self._config), base.vocabulary)
        cache = self._cache(self._wanted, lambda tokens: self._make_pages(base, tokens), base.token_bytes)
        return Runner(base.reading(self._pages)), Scheduler(cache, self._options.max_batch)

    def _make_pages(self, base: "Model", tokens: int) -> "Pages":
        self._pages = Pages(base.pages, tokens // BLOCK)
        return self._pages

    def _open_run(self, run: Path) -> tuple["Model", Voice]:
        """As the torch engine's, with base and adapter as one model; meanwhile others are served."""
        adapter, voice = super()._open_run(run)
        folder = exported(self._source, self._options.weights, adapter)
        return self._compile(folder).reading(self._pages), voice


class Pages(pages.Pages):
    """Pages as OpenVINO's tensors."""

    def __init__(self, shapes: Mapping[str, tuple[Any, tuple[int, ...]]], count: int) -> None:
        """`shapes`: for each table of keys or values, by its name, the type of its numbers and the shape of a page."""
        super().__init__([number.size * math.prod(shape) for number, shape in shapes.values()], count)
        self.tensors = {
            name: openvino.Tensor(table.reshape(-1), openvino.Shape([count, *shape]), number)
            for (name, (number, shape)), table in zip(shapes.items(), self.memory, strict=True)
        }


class Models:
    """AdaptersInMemory, each a model, and the base's."""

    def __init__(self, base: "Model") -> None:
        self._models = {NONE: base}

    def __getitem__(self, key: str) -> "Model":
        return self._models[key]

    def load(self, key: str, adapter: "Model") -> None:
        self._models[key] = adapter

    def remove(self, key: str) -> None:
        del self._models[key]


class Runner:
    """A Computer: the base and its adapters, one after another, with their keys and values in the same pages."""

    def __init__(self, base: "Model") -> None:
        self.adapters = Models(base)

    def run(self, pieces: Several[Piece[Any]]) -> tuple[torch.Tensor, list[tuple[Piece[Any], slice]]]:
        """As in Computer."""
        made, rows = [], []
        known = 0
        for key in dict.fromkeys(piece.running.sequence.adapter for piece in pieces):
            mine = [piece for piece in pieces if piece.running.sequence.adapter == key]
            logits, parts = self.adapters[key].run(mine)
            rows += [(piece, slice(known + part.start, known + part.stop)) for piece, part in parts]
            known += len(logits)
            made.append(logits)
        return torch.cat(made) if len(made) > 1 else made[0], rows


class Model:
    """The exported model in `folder`, compiled. Before it runs it is told which pages it reads."""

    def __init__(self, folder: Path, dtype: torch.dtype, threads: int) -> None:
        """Raises UserError for a model whose attention cannot read from pages."""
        if dtype == torch.bfloat16 and threads == 1 and torch.cpu._is_amx_tile_supported():
            # With one thread OpenVINO 2026.4 divides by zero in AMX's products, and that ends the process.
            dtype = torch.float32
        precision = PRECISIONS[dtype]
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # it would take the first CPUs, as would the next replica's
        }
        try:
            core = openvino.Core()
            model = core.read_model(folder / OPENVINO)
            paged_attention_transformation(model)
            _pick_logits(model)
            compiled = core.compile_model(model, "CPU", settings)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the OpenVINO engine cannot serve this model: {first_line(error)}") from error
        inputs = {port.any_name: port for port in compiled.inputs}
        self._asked = inputs.keys()
        caches = {name: port for name, port in inputs.items() if name.startswith(("key_cache.", "value_cache."))}
        self.pages = {
            name: (port.element_type, tuple(size.get_length() for size in list(port.partial_shape)[1:]))
            for name, port in caches.items()
        }
        if {shape[1] for _, shape in self.pages.values()} != {BLOCK}:
            raise UserError("the OpenVINO engine cannot serve this model: its attention has pages of another size")
        self.token_bytes = sum(number.size * math.prod(shape) for number, shape in self.pages.values()) // BLOCK
        self.vocabulary: int = compiled.outputs[0].partial_shape[2].get_length()
        self._request = compiled.create_infer_request()

    def reading(self, pages: Pages) -> "Model":
        """Itself, whose attention reads from `pages` now."""
        for name, tensor in pages.tensors.items():
            self._request.set_tensor(name, tensor)
        return self

    def run(self, pieces: Several[Piece[Any]]) -> tuple[torch.Tensor, list[tuple[Piece[Any], slice]]]:
        """As in Computer, of sequences that are all of this model."""
        ids: list[int] = []
        positions: list[int] = []
        begins, past, table, table_begins, longest_seen = [0], [], [], [0], 0
        wanted: list[int] = []
        rows = []
        for piece in pieces:
            place, tokens = piece.running.place, piece.running.sequence.tokens
            first, known, start, end = len(ids), len(wanted), place.length, place.length + piece.count
            ids += tokens[start:end]
            positions += range(start, end)
            begins.append(len(ids))
            past.append(start)
            longest_seen = max(longest_seen, end)
            table += place.slab.tables[place.row, : -(-end // BLOCK)].tolist()
            table_begins.append(len(table))
            wanted += range(first if is_scored(piece) else len(ids) - piece.ends, len(ids))
            if len(wanted) > known:
                rows.append((piece, slice(known, len(wanted))))
        inputs = {
            "input_ids": np.array(ids, np.int64),
            "position_ids": np.array(positions, np.int64),
            "past_lens": np.array(past, np.int32),
            "subsequence_begins": np.array(begins, np.int32),
            "block_indices": np.array(table, np.int32),
            "block_indices_begins": np.array(table_begins, np.int32),
            "max_context_len": np.array(longest_seen, np.int32),
            WANTED: np.array(wanted or [0], np.int64),
        }
        for name, array in inputs.items():
            if name in self._asked:
                self._request.set_tensor(name, openvino.Tensor(array))
        self._request.infer()
        logits = torch.from_numpy(self._request.get_output_tensor(0).data)
        return logits[: len(wanted), 0], rows


def _pick_logits(model: openvino.Model) -> None:
    """Let the last product, of the whole vocabulary, be computed for the tokens that are WANTED only."""
    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    wanted = opset13.parameter([-1], np.int64, WANTED)
    wanted.output(0).get_tensor().set_names({WANTED})
    picked = opset13.gather(node.input_value(0), wanted, opset13.constant(np.int64(0)))
    node.input(0).replace_source_output(picked.output(0))
    model.add_parameters([wanted])
    model.validate_nodes_and_infer_types()


def _generation_config(source: ModelSource, config: Any) -> Any:
    """The model's own; where it has no such file, what its config says, as transformers does it."""
    path = str(Path(source.path).expanduser()) if source.is_local else source.path
    try:
        return GenerationConfig.from_pretrained(path, revision=source.revision)
    except OSError:
        return GenerationConfig.from_model_config(config)
