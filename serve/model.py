"""The deployments: ModelDeployment, one engine, its adapters, its health; EmbeddingDeployment, the same for an encoder."""

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from plugins.engines import EmbedderSpec, Embeddings, EngineSpec
from plugins.types import Delta, GenerateRequest
from serve.config import ServedModel


class ModelDeployment:
    """A replica that holds one base model. Ray Serve makes it from a class, so that it also runs without Ray."""

    async def __init__(self, model: ServedModel, runs: Mapping[str, str]) -> None:  # type: ignore[misc]  # Serve awaits it
        """`runs`: adapter name -> run directory, absolute."""
        assert isinstance(model.engine, EngineSpec)
        self.engine = model.engine.start(model.source, model.cpus, model.gpus)
        for name, run in runs.items():
            await self.engine.load_adapter(name, Path(run))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        deltas = self.engine.generate(request)
        async for delta in deltas:
            yield delta

    async def check_health(self) -> None:
        """Ray Serve calls this now and then, and replaces the replica if it raises."""
        self.engine.check()

    async def __del__(self) -> None:
        await self.engine.close()


class EmbeddingDeployment:
    """A replica that holds one encoder."""

    def __init__(self, model: ServedModel) -> None:
        assert isinstance(model.engine, EmbedderSpec)
        self.engine = model.engine.start_embedder(model.source, model.cpus, model.gpus)

    async def embed(self, texts: Sequence[str | Sequence[int]], dimensions: int | None) -> Embeddings:
        return await self.engine.embed(texts, dimensions)

    async def check_health(self) -> None:
        self.engine.check()

    async def __del__(self) -> None:
        await self.engine.close()
