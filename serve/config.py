"""What is served: a ServeConfig and its parts, and every rule about them."""

import re
from typing import Annotated, Any

from plugins.engines import EmbedderSpec, EngineSpec, KnowsGpus, Torch, Upstream
from plugins.spec import NOT_EMPTY, UserError, above, at_least, between, spec
from plugins.types import ModelSource


@spec
class Replicas:
    """Copies of a model; Ray Serve adds and removes some between `min` and `max` as requests queue up."""

    min: Annotated[int, at_least(1)] = 1
    max: Annotated[int, at_least(1)] = 1

    def __post_init__(self) -> None:
        if self.max < self.min:
            raise UserError(f"Replicas.max = {self.max}: must be at least min = {self.min}")


@spec
class ServedModel:
    """A base model, known to clients as `id`, and the finetuned runs beside it, known as `id:run`.

    `engine`: what computes it; Embedder() for a model that makes embeddings instead of text; Upstream(...) for one on
    another server, where `source` is no files but the model's name there.
    `adapters`: run directories such as "outputs/demo_lora"; a pattern such as "outputs/*" takes every finished LoRA run
    that was made from this base. `cpus` and `gpus` are of one replica. `runtime_env`: Ray's; with "pip", "uv" or
    "py_executable" in it, an engine that needs an environment of its own runs in that one.
    """

    id: str
    source: ModelSource
    engine: EngineSpec | EmbedderSpec = Torch()
    adapters: tuple[str, ...] = ()
    replicas: Replicas = Replicas()
    cpus: Annotated[float, above(0)] = 1.0
    gpus: Annotated[float, at_least(0)] = 0.0
    runtime_env: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # A colon separates base and run.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", self.id):
            raise UserError(
                f"ServedModel.id = {self.id!r}: letters, digits, '.', '_', '-' and '/' only, not beginning with a sign"
            )
        if self.makes_embeddings and self.adapters:
            raise UserError(f"ServedModel.adapters = {self.adapters!r}: a model that makes embeddings takes none")
        if self.is_elsewhere and self.adapters:
            raise UserError(
                f"ServedModel.adapters = {self.adapters!r}: the model is on another server and takes none; "
                "have them served there, and give each a ServedModel of its own"
            )
        if self.is_elsewhere and self.source != ModelSource(self.source.path):
            raise UserError("ServedModel.source: the model is on another server, and only its name there is heeded")
        if self.adapters and getattr(self.engine, "max_adapters", None) == 0:
            engine = type(self.engine).__name__
            raise UserError(
                f"ServedModel.adapters = {self.adapters!r}: say how many: engine={engine}(max_adapters=...)"
            )
        if isinstance(self.engine, KnowsGpus):
            self.engine.check_gpus(self.gpus)

    @property
    def is_elsewhere(self) -> bool:
        """Whether another server has the model: no files of it are looked for here."""
        return isinstance(self.engine, Upstream)

    @property
    def makes_embeddings(self) -> bool:
        return isinstance(self.engine, EmbedderSpec)


@spec
class ServeConfig:
    """Models behind one HTTP endpoint. `name` is the Serve application: deploying the same name again replaces it."""

    models: Annotated[tuple[ServedModel, ...], NOT_EMPTY]
    name: Annotated[str, NOT_EMPTY] = "manta"
    host: Annotated[str, NOT_EMPTY] = "127.0.0.1"
    port: Annotated[int, between(1, 65535)] = 8000

    def __post_init__(self) -> None:
        ids = [model.id for model in self.models]
        if twice := next((name for name in ids if ids.count(name) > 1), None):
            raise UserError(f"ServeConfig.models: two models have the id {twice!r}")
