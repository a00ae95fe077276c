"""An engine that batches by itself: a request becomes a sequence, and what it is made of is computed between others'.

A request is read into tokens here (text.py), and becomes a sequence (sequence.py). One thread (batching.py) computes what
the scheduler plans (scheduler.py, cache.py) with the engine's model, and chooses the next tokens (sampling.py).
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from plugins import hardware
from plugins.engines import memory_size
from plugins.engines.adapters import NONE
from plugins.engines.batching import Batcher, Computer
from plugins.engines.cache import BLOCK, SMALLEST, Cache, Store
from plugins.engines.limits import answer_length, check_numbers, longest, own_defaults
from plugins.engines.sampling import Sampling
from plugins.engines.scheduler import Scheduler
from plugins.engines.sequence import Sequence
from plugins.engines.text import Voice
from plugins.model_files import adapter_directory
from plugins.spec import UserError, choices
from plugins.types import Delta, GenerateRequest, ModelSource, RequestError

log = logging.getLogger(__name__)


class Limits(Protocol):
    """What the spec of every such engine says."""

    @property
    def max_batch(self) -> int: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def kv_memory(self) -> str: ...
    @property
    def max_adapters(self) -> int: ...


L = TypeVar("L", bound=Limits)


@dataclass(frozen=True)
class _Adapter:
    key: str  # the runner's name for it
    voice: Voice


class BatchedEngine(ABC, Generic[L]):
    """An Engine, see plugins.engines; a subclass loads the model, and its spec has `Limits`.

    An answer's text has no special tokens in it. Its token count includes the end token, and the tokens of a stop
    string that the text leaves out, as vLLM's does.
    """

    def __init__(self, source: ModelSource, options: L, *, cpus: float, gpus: float = 0) -> None:
        self._source, self._options = source, options
        self._batcher = Batcher(lambda: self._open(cpus, gpus))
        self._adapters: dict[str, _Adapter] = {}  # by name; those in memory, the least recently used first
        self._runs: dict[str, Path] = {}  # of every adapter that may be asked for
        self._loaded = 0  # adapters, ever
        self._loading = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, "engine-reader")

    def _open(self, cpus: float, gpus: float) -> tuple[Computer, Scheduler[Sequence]]:
        """Load the model; what requests are checked against is known then."""
        self._device = hardware.device(gpus)
        with self._placed(cpus, gpus) as claim:
            opened = self._load(cpus, gpus)
            self._cpus = claim.pop_all()
            return opened

    def _placed(self, cpus: float, gpus: float) -> AbstractContextManager[ExitStack]:
        """What this thread computes with from now on. Closing the stack gives the CPUs back."""
        hardware.use_cpus(cpus)
        return ExitStack() if gpus else hardware.pin_threads(cpus)

    @abstractmethod
    def _load(self, cpus: float, gpus: float) -> tuple[Computer, Scheduler[Sequence]]:
        """Load the model, and say what requests are checked against (`_know`, `_cache`). Raises UserError."""
        ...

    def _field(self, name: str) -> str:
        """As the user wrote it."""
        return f"{type(self._options).__name__}.{name}"

    def _longest(self, config: Any) -> int:
        """Tokens of prompt and answer together, of a model with this config. Raises UserError."""
        return longest(config.get_text_config(), self._options.max_length, self._field("max_length"))

    def _cache(self, wanted: int, store: Callable[[int], Store], token_bytes: int) -> Cache:
        """For sequences of `wanted` tokens, or as many as there is memory for, in a `store` made for so many in all."""
        tokens = _kv_tokens(
            self._options.kv_memory,
            token_bytes,
            free=hardware.free_memory(self._device),
            most=2 * self._options.max_batch * wanted,
            field=self._field("kv_memory"),
        )
        budget = tokens // BLOCK * BLOCK
        cache = Cache(store(budget), budget=budget, longest=-(-wanted // SMALLEST) * SMALLEST)
        self._max_length = min(wanted, cache.longest)
        if self._max_length < wanted:
            log.info("prompts and answers may have %d tokens together: more do not fit into kv_memory", cache.longest)
        return cache

    def _know(self, tokenizer: Any, generation_config: Any, vocabulary: int) -> None:
        """What requests are read with, and checked against. `vocabulary`: the tokens that the model knows."""
        self._defaults = own_defaults(generation_config.to_diff_dict())
        self._vocabulary = vocabulary
        self._tokens = max(vocabulary, len(tokenizer))
        self._base = _Adapter(NONE, Voice.of(tokenizer, generation_config.eos_token_id))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.check()
        loop = asyncio.get_running_loop()
        adapter = sequence = None
        while sequence is None or adapter is not self._present(request.adapter):  # it may have gone in the meantime
            adapter = await self._adapter(request.adapter)
            # In a thread, because a long prompt takes a while to tokenise; in one, so that requests keep their order.
            sequence = await loop.run_in_executor(self._reader, self._sequence, request, adapter, loop)
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
        async with self._loading:
            await self._load_run(name, run)

    async def _load_run(self, name: str, run: Path) -> None:
        opened, voice = await asyncio.to_thread(self._open_run, run)
        # A key of our own: the old and the new one of a name are there together.
        self._loaded += 1
        adapter = _Adapter(f"adapter{self._loaded}", voice)
        await asyncio.wrap_future(self._batcher.load_adapter(adapter.key, opened))
        replaced = self._adapters.pop(name, None)
        self._adapters[name], self._runs[name] = adapter, run
        if replaced is None and len(self._adapters) > self._options.max_adapters:
            replaced = self._adapters.pop(next(iter(self._adapters)))
        if replaced is not None:
            await asyncio.wrap_future(self._batcher.retire_adapter(replaced.key))

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for `name`; its weights go when its answers under way have ended."""
        async with self._loading:
            if name not in self._runs:
                raise UserError(f"there is no adapter {name!r}; {choices(name, self._runs)}")
            del self._runs[name]
            if adapter := self._adapters.pop(name, None):
                await asyncio.wrap_future(self._batcher.retire_adapter(adapter.key))

    def check(self) -> None:
        self._batcher.check()

    async def close(self) -> None:
        await asyncio.to_thread(self._batcher.close)
        self._reader.shutdown(wait=False)
        self._cpus.close()

    def _present(self, name: str | None) -> _Adapter | None:
        return self._base if name is None else self._adapters.get(name)

    async def _adapter(self, name: str | None) -> _Adapter:
        """In memory; raises RequestError for one that nobody has loaded."""
        if name is None:
            return self._base
        if name not in self._adapters:
            async with self._loading:
                if name not in self._runs:
                    raise RequestError(f"there is no adapter {name!r}; {choices(name, self._runs)}", "model")
                if name not in self._adapters:
                    try:
                        await self._load_run(name, self._runs[name])
                    except UserError as error:
                        raise RequestError(f"adapter {name!r} cannot be read again: {error}", "model") from error
        adapter = self._adapters.pop(name)
        self._adapters[name] = adapter  # the most recently used is last
        return adapter

    def _sequence(self, request: GenerateRequest, adapter: _Adapter, loop: asyncio.AbstractEventLoop) -> Sequence:
        """`request` as what the batcher takes. Raises RequestError."""
        check_numbers(request, self._vocabulary)
        prompt = adapter.voice.read(request, self._vocabulary)
        limit, min_tokens = answer_length(request, prompt, self._max_length, self._defaults)
        return Sequence(
            request,
            prompt=prompt,
            sampling=Sampling.of(request, self._defaults),
            limit=limit,
            min_tokens=min_tokens,
            adapter=adapter.key,
            voice=adapter.voice,
            loop=loop,
        )

    def _open_run(self, run: Path) -> tuple[Any, Voice]:
        """The adapter of run directory `run` as the runner loads it, here where it lies, and how it is spoken to.

        Raises UserError.
        """
        directory = adapter_directory(run)
        return directory, self._base.voice.of_run(run, self._source, self._tokens)


def _kv_tokens(written: str, token_bytes: int, *, free: int, most: int, field: str) -> int:
    """Tokens, at most `most`, whose keys and values may be in memory: as many as `written`, which is `field`'s, allows."""
    allowed = memory_size(written, free=free, field=field)
    tokens = min(allowed // token_bytes, most)
    if tokens < SMALLEST:
        needed = SMALLEST * token_bytes / 2**20
        raise UserError(f"{field} = {written!r}: {allowed / 2**20:.0f} MiB, at least {needed:.0f} MiB")
    return tokens
