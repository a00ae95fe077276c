"""The torch engine: transformers' forward, a KV cache of our own, continuous batching, adapters beside the base.

A request is read into tokens here (text.py), waits for its turn and is decoded with the others in one thread
(batching.py), by a model that takes rows in and out at any step (decoding.py, kv_cache.py, adapters.py, sampling.py).
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from plugins import hardware
from plugins.engines.adapters import NONE
from plugins.engines.batching import Batcher
from plugins.engines.decoding import Decoder
from plugins.engines.sequence import Sequence
from plugins.engines.text import Voice, prompt_field
from plugins.model_files import check_model_files, has_tokenizer
from plugins.pretrained import load
from plugins.spec import UserError, choices
from plugins.types import Delta, GenerateRequest, ModelSource, RequestError

LONGEST = 4096  # tokens of prompt and answer where the user sets no max_length: what a cache for a batch may cost


@dataclass(frozen=True)
class _Adapter:
    key: str  # the decoder's name for it
    voice: Voice


class TorchEngine:
    """An Engine, see plugins.engines.

    An answer's text has no special tokens in it. Its token count includes the end token, and the tokens of a stop
    string that the text leaves out, as vLLM's does.
    """

    def __init__(
        self, source: ModelSource, *, max_batch: int, max_length: int | None, cpus: float, gpus: float = 0
    ) -> None:
        hardware.use_cpus(cpus)
        check_model_files(source, "source.path")
        tokenizer, model = load(AutoTokenizer, source), _load_model(source, gpus)
        self._source = source
        self._eos: int | list[int] | None = model.generation_config.eos_token_id
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._tokens = max(self._vocabulary, len(tokenizer))
        self._max_length = _length(model.config.get_text_config(), max_length)
        self._base = _Adapter(NONE, Voice.of(tokenizer, self._eos))
        self._adapters: dict[str, _Adapter] = {}
        self._loaded = 0  # adapters, ever
        self._reader = ThreadPoolExecutor(1, "torch-engine-reader")
        decoder: Decoder[Sequence] = Decoder(model, max_rows=max_batch, max_length=self._max_length)
        decoder.prove()
        self._batcher = Batcher(decoder, max_batch)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.check()
        adapter = self._adapter(request.adapter)
        # In a thread, because a long prompt takes a while to tokenise; in one, so that requests keep their order.
        loop = asyncio.get_running_loop()
        sequence = await loop.run_in_executor(self._reader, self._sequence, request, adapter, loop)
        if self._adapter(request.adapter) is not adapter:
            raise RequestError(f"adapter {request.adapter!r} was replaced just now: ask again", "model")
        self._batcher.submit(sequence)
        try:
            finished = False
            while not finished:
                delta = await sequence.mailbox.take()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            sequence.abandoned = True

    async def load_adapter(self, name: str, run: Path) -> None:
        """As in Engine. A name in use gets the new adapter: answers under way end with the one they began with."""
        directory, voice = await asyncio.to_thread(self._open_run, run)
        # A key of our own: PEFT takes no name with a dot, and the old and the new one of a name are there together.
        self._loaded += 1
        adapter = _Adapter(f"adapter{self._loaded}", voice)
        await asyncio.wrap_future(self._batcher.load_adapter(adapter.key, directory))
        replaced = self._adapters.get(name)
        self._adapters[name] = adapter
        if replaced is not None:
            await asyncio.wrap_future(self._batcher.retire_adapter(replaced.key))

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for `name`; its weights go when its answers under way have ended."""
        if name not in self._adapters:
            raise UserError(f"there is no adapter {name!r}; {choices(name, self._adapters)}")
        await asyncio.wrap_future(self._batcher.retire_adapter(self._adapters.pop(name).key))

    def check(self) -> None:
        self._batcher.check()

    async def close(self) -> None:
        await asyncio.to_thread(self._batcher.close)
        self._reader.shutdown(wait=False)

    def _adapter(self, name: str | None) -> _Adapter:
        if name is None:
            return self._base
        if name not in self._adapters:
            raise RequestError(f"there is no adapter {name!r}; {choices(name, self._adapters)}", "model")
        return self._adapters[name]

    def _sequence(self, request: GenerateRequest, adapter: _Adapter, loop: asyncio.AbstractEventLoop) -> Sequence:
        """`request` as what the batcher takes. Raises RequestError."""
        _check_numbers(request)
        prompt = adapter.voice.read(request, self._vocabulary)
        room = self._max_length - len(prompt)
        size = f"{len(prompt)} tokens of prompt, and this model takes {self._max_length} of prompt and answer together"
        if room < 1:
            raise RequestError(f"{prompt_field(request)} is too long: {size}", prompt_field(request))
        if request.max_tokens is not None and request.max_tokens > room:
            raise RequestError(f"max_tokens = {request.max_tokens}: at most {room} ({size})", "max_tokens")
        limit = request.max_tokens or room
        return Sequence(request, prompt=prompt, limit=limit, adapter=adapter.key, voice=adapter.voice, loop=loop)

    def _open_run(self, run: Path) -> tuple[Path, Voice]:
        """Where the adapter of run directory `run` lies, and how it is spoken to. Raises UserError."""
        if not run.is_dir():
            raise UserError(f"run {run}: no such directory")
        if not (run / "adapter").is_dir():
            if (run / "model").is_dir():
                raise UserError(f"run {run} is a full finetune, not an adapter: serve {run / 'model'} as a model")
            raise UserError(f"run {run} has no adapter/: it is not a finished LoRA run")
        if not has_tokenizer(run):
            return run / "adapter", self._base.voice
        tokenizer = load(AutoTokenizer, dataclasses.replace(self._source, path=str(run.absolute()), revision=None))
        if len(tokenizer) > self._tokens:
            raise UserError(f"run {run} does not fit the base: it has {len(tokenizer)} tokens, the base {self._tokens}")
        return run / "adapter", Voice.of(tokenizer, self._eos)


def _load_model(source: ModelSource, gpus: float) -> Any:
    """The model of `source` on this process's device, in its compute dtype."""
    device = hardware.device(gpus)
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model = load(AutoModelForCausalLM, source, **{name: hardware.compute_dtype(source.dtype, device)})
    return model.to(device).eval().requires_grad_(False)


def _length(config: Any, wanted: int | None) -> int:
    """Tokens of prompt and answer together: `wanted`, or what the model was made for."""
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    if wanted is not None and made_for is not None and wanted > made_for:
        raise UserError(f"Torch.max_length = {wanted}: this model was made for at most {made_for} tokens")
    return wanted or min(made_for or LONGEST, LONGEST)


def _check_numbers(request: GenerateRequest) -> None:
    rules = (
        ("temperature", request.temperature >= 0, "at least 0"),
        ("top_p", 0 < request.top_p <= 1, "above 0 and at most 1"),
        ("top_k", request.top_k >= 0, "at least 0 (0: all tokens)"),
        ("max_tokens", request.max_tokens is None or request.max_tokens >= 1, "at least 1"),
        ("stop", all(request.stop), "without empty strings"),
    )
    for field, holds, words in rules:
        if not holds:
            raise RequestError(f"{field} = {getattr(request, field)!r}: must be {words}", field)
