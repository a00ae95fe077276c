"""Engines: what turns a GenerateRequest into Deltas.

An engine spec is light and picklable: it travels in a config to the replica, and imports its library there, in `start`.
To add an engine, write a spec with `start` and an object with the verbs of Engine; pass the spec in a ServedModel.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

from plugins.spec import at_least, spec
from plugins.types import Delta, GenerateRequest, ModelSource


class Engine(Protocol):
    """A loaded model that serves many requests at once. All of it is called from one event loop, which it never blocks."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Text as it is made; the last Delta has a finish_reason. Closing the iterator ends the generation.

        Raises RequestError, before the first Delta, for a request that it cannot serve.
        """
        ...

    async def load_adapter(self, name: str, run: Path) -> None:
        """Serve the adapter of run directory `run` under `name`, beside the base. Raises UserError if it does not fit."""
        ...

    async def unload_adapter(self, name: str) -> None: ...

    def check(self) -> None:
        """Raise RuntimeError when the engine can no longer serve; its replica is then replaced."""
        ...

    async def close(self) -> None:
        """End what runs and free the model."""
        ...


@runtime_checkable
class EngineSpec(Protocol):
    def start(self, source: ModelSource, cpus: float, gpus: float) -> Engine:
        """Load `source` (blocking) on what the replica was given. Raises UserError for what is not a model."""
        ...


@spec
class Torch:
    """transformers' own forward with a KV cache and continuous batching, on CPU or GPU.

    `max_batch`: sequences decoded together; more wait. `max_length`: tokens of prompt and answer together; None is what
    the model was made for, at most 4096.
    """

    max_batch: Annotated[int, at_least(1)] = 16
    max_length: Annotated[int | None, at_least(1)] = None

    def start(self, source: ModelSource, cpus: float, gpus: float = 0) -> Engine:
        from plugins.engines.torch import TorchEngine

        return TorchEngine(source, max_batch=self.max_batch, max_length=self.max_length, cpus=cpus, gpus=gpus)
