"""Engines: what turns a GenerateRequest into Deltas, and what turns texts into embeddings.

An engine spec is light and picklable: it travels in a config to the replica, and imports its library there, in `start`.
To add an engine, write a spec with `start` and an object with the verbs of Engine; pass the spec in a ServedModel. For
embeddings it is a spec with `start_embedder`, and an EmbeddingEngine. Where its library contradicts ours, the spec has an
`environment`, and the replica runs there.
"""

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol, cast, runtime_checkable

from plugins.model_files import OPENVINO, WEIGHTS
from plugins.spec import NOT_EMPTY, UserError, above, at_least, spec
from plugins.types import Delta, GenerateRequest, ModelSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from plugins.engines.integers import Bits


class Engine(Protocol):
    """A loaded model that serves many requests at once. All of it is called from one event loop, which it never blocks."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Text as it is made; the last Delta has a finish_reason. Closing the iterator ends the generation.

        Raises RequestError, before the first Delta, for a request that it cannot serve; UnavailableError, at any time,
        where what it depends on fails.
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


@runtime_checkable
class KnowsGpus(Protocol):
    """A spec of an engine that does not compute on a GPU, or some of its options only there."""

    def check_gpus(self, gpus: float) -> None:
        """Raise UserError for what it cannot do on a replica's `gpus`."""
        ...


@runtime_checkable
class OwnEnvironment(Protocol):
    """A spec of an engine that lives in an environment of its own, one of pyproject.toml's [dependency-groups]."""

    environment: ClassVar[str]  # on GPUs it is NAME-gpu, where there is such a group


class Quantizer(EngineSpec, Protocol):
    """A spec of an engine that also serves models whose weights have been quantised beforehand, from their own directory."""

    quantized: ClassVar[tuple[str, ...]]  # what weights may be made

    def quantize(self, source: ModelSource, weights: str, directory: Path) -> None:
        """Write `source` into the empty `directory` with such weights: a whole model, which `start` takes as it is.

        On an error, part of it may be there. Raises UserError for a model that cannot be quantised.
        """
        ...


@spec
class Torch:
    """transformers' models with a KV cache, continuous batching and adapters of our own, on CPU or GPU.

    `max_batch`: sequences computed together; more wait. `max_length`: tokens of prompt and answer together; None is what
    the model was made for, at most 4096. `kv_memory`: what keys and values may take, as a share of the memory that is free
    once the model is loaded ("25%") or a size ("2GiB", "512MiB"). `weights`: "int8" halves what a bf16 model reads at each
    step, and changes its answers a little; a small model was quicker for one client, and slower for eight or more.
    `compile`: let torch.compile fuse what lies between the products, instead of operators of our own (native.py). Beside
    torch's, before there were those, on CPUs a step of Llama and its near relations was 1.03 to 1.10 times as fast, one of
    GPT-2 1.1 to 1.2 times. It needs a C++ compiler (g++) on each node, and a start takes half a minute longer, or more;
    later ones less, since what was compiled is kept.
    `cuda_graphs`: on a GPU, record the steps in which sequences only decode, and replay them, so that what it takes to
    launch a small model's operators is gone; with adapters, and while prompts are read, steps are computed as without. A
    graph's logits come on top of `kv_memory`. Nobody has run or measured it on a GPU yet.
    `max_adapters`: adapters in memory; the others are read again when asked for.
    """

    quantized: ClassVar[tuple[str, ...]] = ("int8",)

    max_batch: Annotated[int, at_least(1)] = 64
    max_length: Annotated[int | None, at_least(1)] = None
    kv_memory: str = "25%"
    weights: Literal["same", "int8"] = "same"
    compile: bool = False
    cuda_graphs: bool = False
    max_adapters: Annotated[int, at_least(1)] = 16

    def __post_init__(self) -> None:
        memory_size(self.kv_memory, free=1, field="Torch.kv_memory")

    def check_gpus(self, gpus: float) -> None:
        if self.weights == "int8" and gpus:
            raise UserError("Torch.weights = 'int8': on CPUs only; on a GPU leave it at 'same'")
        if self.cuda_graphs and not gpus:
            raise UserError("Torch.cuda_graphs = True: on GPUs only, and ServedModel.gpus is 0")

    def start(self, source: ModelSource, cpus: float, gpus: float = 0) -> Engine:
        from plugins.engines.torch import TorchEngine

        return TorchEngine(source, self, cpus=cpus, gpus=gpus)

    def quantize(self, source: ModelSource, weights: str, directory: Path) -> None:
        from plugins.engines.quantized_files import write

        write(source, "int8", directory)


@spec
class Vllm:
    """vLLM's engine, on CPU or GPU; with several GPUs, the model is split over them.

    `max_batch`: sequences computed together; more wait. `max_length`: tokens of prompt and answer together; None is what
    the model was made for, at most 4096. `kv_memory`: what keys and values may take: a size ("2GiB", "512MiB"), or on CPUs
    a share of the memory that is free ("25%"), on GPUs a share of all of it, with the model in it; None is "25%" on CPUs
    and "90%" on GPUs. `quantization`: vLLM's name for it, such as "fp8"; None is what the model's files say.
    `max_adapters`: adapters beside the base. With room for any, the base is slower too, on CPUs much, and for each it
    takes the memory that `max_rank` needs, used or not.
    `compiled`: compile the model, so that a start takes minutes; None is yes on GPUs, no on CPUs, where a small model then
    made 1.1 times the tokens a second.
    """

    environment: ClassVar[str] = "vllm"

    max_batch: Annotated[int, at_least(1)] = 64
    max_length: Annotated[int | None, at_least(1)] = None
    kv_memory: str | None = None
    quantization: str | None = None
    max_adapters: Annotated[int, at_least(0)] = 0
    max_rank: Literal[8, 16, 32, 64, 128, 256] = 64
    compiled: bool | None = None

    def __post_init__(self) -> None:
        if self.kv_memory is not None:
            memory_size(self.kv_memory, free=1, field="Vllm.kv_memory")

    def start(self, source: ModelSource, cpus: float, gpus: float = 0) -> Engine:
        from plugins.engines.vllm import VllmEngine

        return VllmEngine(source, self, cpus=cpus, gpus=gpus)


@spec
class Upstream:
    """Another server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, a hosted one. `source`: the model's name there.

    `url`: its base, such as "http://gpu1:8001/v1". `api_key_env`: the environment variable of the replica that holds the
    key. `connect_timeout_s`: to get through to it; `read_timeout_s`: without a word from it, before an answer and in it.
    `retries`: of a request whose answer has not begun. After `breaker_failures` in a row requests fail at once, for
    `breaker_pause_s`; then one tries. It only passes text on: `cpus=0.1` in the ServedModel is enough.
    """

    url: str
    api_key_env: Annotated[str | None, NOT_EMPTY] = None
    connect_timeout_s: Annotated[float, above(0)] = 5.0
    read_timeout_s: Annotated[float, above(0)] = 60.0
    retries: Annotated[int, at_least(0)] = 3
    breaker_failures: Annotated[int, at_least(1)] = 5
    breaker_pause_s: Annotated[float, above(0)] = 10.0

    def __post_init__(self) -> None:
        host = r"(\[[0-9a-fA-F:.]+\]|[^\s/?#@:\[\]]+)(:\d{1,5})?"
        if not re.fullmatch(rf"https?://{host}(/[^\s?#]*)?", self.url):
            raise UserError(
                f'Upstream.url = {self.url!r}: the base of a server such as "http://host:8001/v1"; a key goes by api_key_env'
            )

    def start(self, source: ModelSource, cpus: float, gpus: float = 0) -> Engine:
        from plugins.engines.upstream import UpstreamEngine

        return UpstreamEngine(source.path, self)


@spec
class OpenVino:
    """OpenVINO on CPUs, with the torch engine's batching, parameters and constraints.

    The model is exported to OpenVINO's format when it is first served, which takes minutes where it is large, and is then
    kept in ~/.cache/manta/openvino. `weights`: what they are kept as, "same" as in the model; "int8" has a
    fourth of fp32's size, "int4" less than a fifth. `max_batch`, `max_length`, `kv_memory`: as of Torch.
    `max_adapters`: adapters in memory, each merged into a copy of the model and exported when it is first served; the
    others are read again when asked for.
    """

    files: ClassVar[tuple[str, ...]] = (*WEIGHTS, OPENVINO)
    exporter: ClassVar[str] = "openvino-export"  # the environment that exports
    quantized: ClassVar[tuple[str, ...]] = ("int8", "int4")

    weights: Literal["same", "fp32", "bf16", "fp16", "int8", "int4"] = "same"
    max_batch: Annotated[int, at_least(1)] = 64
    max_length: Annotated[int | None, at_least(1)] = None
    kv_memory: str = "25%"
    max_adapters: Annotated[int, at_least(1)] = 4

    def __post_init__(self) -> None:
        memory_size(self.kv_memory, free=1, field="OpenVino.kv_memory")

    def check_gpus(self, gpus: float) -> None:
        _on_cpus_only("OpenVino", gpus)

    def start(self, source: ModelSource, cpus: float, gpus: float = 0) -> Engine:
        from plugins.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(source, self, cpus=cpus, gpus=gpus)

    def check_export(self, source: ModelSource, field: str) -> None:
        """Raise UserError, naming `field`, where `source` has yet to be exported, and cannot be for want of the exporter."""
        from plugins.engines.openvino_files import check_export

        check_export(source, self.weights, field)

    def quantize(self, source: ModelSource, weights: str, directory: Path) -> None:
        from plugins.engines.openvino_files import write

        write(source, weights, directory)


@spec
class Ipex:
    """Intel's extension for PyTorch on CPUs (IPEX), with the torch engine's batching, parameters, constraints and adapters.

    Its authors have archived it, in March 2026, and say that it has security issues that stay: choose it where it was
    chosen before. For the same processors OpenVino is kept up and faster; Torch needs no environment of its own.
    `weights`: "int8" and "int4" take less memory, and without AMX their products take five to ten times as long as those
    of bf16. `max_batch`, `max_length`, `kv_memory`, `max_adapters`: as of Torch.
    """

    environment: ClassVar[str] = "ipex"
    quantized: ClassVar[tuple[str, ...]] = ("int8", "int4")

    weights: Literal["same", "int8", "int4"] = "same"
    max_batch: Annotated[int, at_least(1)] = 64
    max_length: Annotated[int | None, at_least(1)] = None
    kv_memory: str = "25%"
    max_adapters: Annotated[int, at_least(1)] = 16

    def __post_init__(self) -> None:
        memory_size(self.kv_memory, free=1, field="Ipex.kv_memory")

    def check_gpus(self, gpus: float) -> None:
        _on_cpus_only("Ipex", gpus)

    def start(self, source: ModelSource, cpus: float, gpus: float = 0) -> Engine:
        from plugins.engines.ipex import IpexEngine

        return IpexEngine(source, self, cpus=cpus, gpus=gpus)

    def quantize(self, source: ModelSource, weights: str, directory: Path) -> None:
        from plugins.engines.quantized_files import write

        write(source, cast("Bits", weights), directory)


def _on_cpus_only(engine: str, gpus: float) -> None:
    if gpus:
        raise UserError(f"ServedModel.gpus = {gpus:g}: {engine} computes on CPUs only")


def memory_size(written: str, *, free: int, field: str) -> int:
    """Bytes of "25%" (of `free`), "2GiB" or "512MiB". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|GiB|MiB)", written)
    if not match or float(match[1]) == 0 or (match[2] == "%" and float(match[1]) > 100):
        raise UserError(f'{field} = {written!r}: a share of the free memory such as "25%", or a size such as "2GiB"')
    return int(float(match[1]) * {"%": free / 100, "GiB": 2**30, "MiB": 2**20}[match[2]])


@dataclass(frozen=True)
class Embeddings:
    """`vectors` [texts, dimensions], in the order of the texts; `tokens` of all texts together, special ones included."""

    vectors: "NDArray[np.float32]"
    tokens: int


class EmbeddingEngine(Protocol):
    """A loaded encoder that serves many requests at once. All of it is called from one event loop, which it never blocks."""

    async def embed(self, texts: Sequence[str | Sequence[int]], dimensions: int | None = None) -> Embeddings:
        """A vector for each text, or list of token ids; with `dimensions`, their first so many, at length 1 again.

        Raises RequestError for a request that it cannot serve. What a text's vector is does not depend on other texts.
        """
        ...

    def check(self) -> None:
        """Raise RuntimeError when the engine can no longer serve; its replica is then replaced."""
        ...

    async def close(self) -> None:
        """End what runs and free the model."""
        ...


@runtime_checkable
class EmbedderSpec(Protocol):
    def start_embedder(self, source: ModelSource, cpus: float, gpus: float) -> EmbeddingEngine:
        """Load `source` (blocking) on what the replica was given. Raises UserError for what is not an encoder."""
        ...


@spec
class Embedder:
    """Embeddings from an encoder in sentence-transformers' format, by transformers alone, on CPU or GPU.

    The pooling, dense layers and normalisation are the model's; a plain encoder's tokens are averaged and normalised.
    `max_batch`: texts computed together. `max_length`: tokens of a text, longer ones are refused; None is the model's
    own limit (max_seq_length).
    """

    max_batch: Annotated[int, at_least(1)] = 32
    max_length: Annotated[int | None, at_least(1)] = None

    def start_embedder(self, source: ModelSource, cpus: float, gpus: float = 0) -> EmbeddingEngine:
        from plugins.engines.embeddings import EncoderEngine

        return EncoderEngine(source, max_batch=self.max_batch, max_length=self.max_length, cpus=cpus, gpus=gpus)


# What a config can name; a spec from elsewhere needs no entry.
SPECS = (Torch, OpenVino, Ipex, Vllm, Upstream, Embedder)
