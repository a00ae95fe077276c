"""The OpenVINO engine: OpenVINO computes the steps, with its paged attention; all else is as in the torch engine.

OpenVINO GenAI has a pipeline that batches, but its step keeps Python's lock, so that a replica hears nothing meanwhile;
one request whose schema it does not know ends all that run beside it; and it knows neither logit_bias, nor the tokens that
were likely in a token's place, nor adapters by request.
"""

import logging
import math
from collections.abc import Mapping
from collections.abc import Sequence as Several
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13
from openvino._offline_transformations import paged_attention_transformation
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from plugins import hardware
from plugins.engines import OpenVino, Torch, pages
from plugins.engines.adapters import Adapters
from plugins.engines.cache import BLOCK, SMALLEST, Cache
from plugins.engines.layers import Turns
from plugins.engines.limits import longest
from plugins.engines.openvino_files import exported
from plugins.engines.scheduler import Piece, Scheduler, is_scored
from plugins.engines.sequence import Sequence
from plugins.engines.torch import TorchEngine, kv_tokens
from plugins.model_files import check_model_files
from plugins.pretrained import first_line, load
from plugins.spec import UserError
from plugins.types import ModelSource

log = logging.getLogger(__name__)

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "f32"}
WANTED = "wanted"  # an input of ours: the tokens after which the next is to be known


class OpenVinoEngine(TorchEngine):
    """An Engine, see plugins.engines: the torch engine but for what computes. It takes no adapters."""

    def __init__(self, source: ModelSource, options: OpenVino, *, cpus: float, gpus: float = 0) -> None:
        if gpus:
            raise UserError(f"ServedModel.gpus = {gpus:g}: OpenVino computes on CPUs only")
        check_model_files(source, "source.path")
        self._config = load(AutoConfig, source)
        self._longest = longest(self._config.get_text_config(), options.max_length, "OpenVino.max_length")
        self._folder = exported(source, options.weights)
        both = Torch(max_batch=options.max_batch, max_length=options.max_length, kv_memory=options.kv_memory)
        super().__init__(source, both, cpus=cpus)

    def _open(self, options: Torch, cpus: float, gpus: float) -> tuple["Runner", Scheduler[Sequence]]:
        hardware.use_cpus(1)  # of torch, which only chooses tokens here: more threads would be in the way of OpenVINO's
        self._cpus = ExitStack()
        device = hardware.device(0)
        tokenizer = load(AutoTokenizer, self._source)
        runner = Runner(self._folder, hardware.compute_dtype(self._source.dtype, device), threads=max(1, int(cpus)))
        self._know(tokenizer, _generation_config(self._source, self._config), runner.vocabulary)
        free, most = hardware.free_memory(device), 2 * options.max_batch * self._longest
        budget = kv_tokens(options.kv_memory, runner.token_bytes, free=free, most=most, field="OpenVino.kv_memory")
        cache = Cache(
            runner.make_pages(budget // BLOCK),
            budget=budget // BLOCK * BLOCK,
            longest=-(-self._longest // SMALLEST) * SMALLEST,
        )
        self._max_length = min(self._longest, cache.longest)
        if self._max_length < self._longest:
            log.info("prompts and answers may have %d tokens together: more do not fit into kv_memory", cache.longest)
        return runner, Scheduler(cache, options.max_batch)

    async def load_adapter(self, name: str, run: Path) -> None:
        """Raises UserError: the weights of an exported model are what they are."""
        raise UserError(f"OpenVino serves no adapters: serve {run} with Torch, or merge it and serve the merged model")


class Pages(pages.Pages):
    """Pages as OpenVINO's tensors."""

    def __init__(self, shapes: Mapping[str, tuple[Any, tuple[int, ...]]], count: int) -> None:
        """`shapes`: for each table of keys or values, by its name, the type of its numbers and the shape of a page."""
        super().__init__([number.size * math.prod(shape) for number, shape in shapes.values()], count)
        self.tensors = {
            name: openvino.Tensor(table.reshape(-1), openvino.Shape([count, *shape]), number)
            for (name, (number, shape)), table in zip(shapes.items(), self.memory, strict=True)
        }


class Runner:
    """A Computer: the exported model in `folder`, compiled. It is given its pages before it runs."""

    def __init__(self, folder: Path, dtype: torch.dtype, *, threads: int) -> None:
        """Raises UserError for a model whose attention cannot read from pages."""
        precision = PRECISIONS[dtype]
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # it would take the first CPUs, as would the next replica's
        }
        try:
            core = openvino.Core()
            model = core.read_model(folder / "openvino_model.xml")
            paged_attention_transformation(model)
            _pick_logits(model)
            compiled = core.compile_model(model, "CPU", settings)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the OpenVINO engine cannot serve this model: {first_line(error)}") from error
        self.adapters = Adapters({}, Turns(), dtype)
        inputs = {port.any_name: port for port in compiled.inputs}
        self._asked = inputs.keys()
        caches = {name: port for name, port in inputs.items() if name.startswith(("key_cache.", "value_cache."))}
        self._shapes = {
            name: (port.element_type, tuple(size.get_length() for size in list(port.partial_shape)[1:]))
            for name, port in caches.items()
        }
        if {shape[1] for _, shape in self._shapes.values()} != {BLOCK}:
            raise UserError("the OpenVINO engine cannot serve this model: its attention has pages of another size")
        self.token_bytes = sum(number.size * math.prod(shape) for number, shape in self._shapes.values()) // BLOCK
        self.vocabulary: int = compiled.outputs[0].partial_shape[2].get_length()
        self._request = compiled.create_infer_request()

    def make_pages(self, count: int) -> "Pages":
        """Room for keys and values, from which its attention reads from now on."""
        pages = Pages(self._shapes, count)
        for name, tensor in pages.tensors.items():
            self._request.set_tensor(name, tensor)
        return pages

    def run(self, pieces: Several[Piece[Any]]) -> tuple[torch.Tensor, list[tuple[Piece[Any], slice]]]:
        """As in Computer."""
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
