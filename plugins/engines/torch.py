"""The torch engine: transformers' forward, a KV cache of our own, continuous batching, adapters beside the base.

It is a BatchedEngine (batched.py), whose model is runner.py's, lean.py's, layers.py's and adapters.py's.
"""

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from plugins import hardware
from plugins.engines import Torch, quantized_files
from plugins.engines.batched import BatchedEngine
from plugins.engines.batching import Computer
from plugins.engines.runner import Runner
from plugins.engines.scheduler import Scheduler
from plugins.engines.sequence import Sequence
from plugins.model_files import check_model_files
from plugins.pretrained import load
from plugins.spec import UserError
from plugins.types import ModelSource


class TorchEngine(BatchedEngine[Torch]):
    """An Engine, see plugins.engines."""

    def _load(self, cpus: float, gpus: float) -> tuple[Computer, Scheduler[Sequence]]:
        options = self._options
        options.check_gpus(gpus)
        check_model_files(self._source, "source.path")
        stored = quantized_files.stored(self._source, "torch", ("int8",))
        if stored and gpus:
            raise UserError(f"{self._source.path!r} has weights in int8: the torch engine serves those on CPUs only")
        tokenizer, model = load(AutoTokenizer, self._source), load_model(self._source, gpus, stored is not None)
        self._know(tokenizer, model.generation_config, model.get_input_embeddings().num_embeddings)
        wanted = self._longest(model.config)
        runner = Runner(
            model,
            weights="int8" if stored else options.weights,
            compiled=options.compile,
            cuda_graphs=options.cuda_graphs,
        )
        runner.check_length(model.config.get_text_config(), wanted)
        tables = runner.tables
        cache = self._cache(wanted, lambda _: tables, tables.token_bytes)
        return runner, Scheduler(cache, options.max_batch, runner.balance)


def load_model(source: ModelSource, gpus: float, is_quantized: bool = False) -> Any:
    """The model of `source` on this process's device, in its compute dtype. `is_quantized`: its weights are integers."""
    device = hardware.device(gpus)
    dtype = hardware.compute_dtype(source.dtype, device)
    if is_quantized:
        model = quantized_files.read(source, dtype)
    else:
        name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        model = load(AutoModelForCausalLM, source, **{name: dtype})
    return model.to(device).eval().requires_grad_(False)
