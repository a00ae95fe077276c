"""vLLM's asynchronous engine, in an environment of its own: its scheduler, its kernels, and adapters by request.

A request is read into tokens here (text.py), vLLM chooses the tokens of the answer, and what its reader gets is made of
them here again (answer.py): so prompts, stops and text are those of every other engine.
"""

import asyncio
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import ModelConfig, StructuredOutputsConfig, VllmConfig
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from plugins import hardware
from plugins.engines import Vllm, memory_size
from plugins.engines.answer import Answer, Choice, pause
from plugins.engines.grammar import ANY_OBJECT, lark
from plugins.engines.limits import MOST_LOGPROBS, answer_length, check_numbers, longest, own_defaults
from plugins.engines.sampling import COLDEST, Sampling
from plugins.engines.text import Voice
from plugins.model_files import adapter_directory, check_model_files
from plugins.pretrained import first_line, load
from plugins.spec import UserError, choices
from plugins.types import Constraint, Delta, GenerateRequest, ModelSource, RequestError

WARM = 0.01  # vLLM draws at no lower temperature

OWN = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


@dataclass(eq=False)
class _Adapter:
    lora: LoRARequest | None  # None: the base itself
    voice: Voice
    answering: int = 0  # answers under way

    def __post_init__(self) -> None:
        self.idle = asyncio.Event()  # whether there are none
        self.idle.set()

    @contextmanager
    def used(self) -> Iterator[None]:
        """For as long as an answer is under way."""
        self.answering += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.answering -= 1
            if not self.answering:
                self.idle.set()


class VllmEngine:
    """An Engine, see plugins.engines. Counts of tokens are those of the torch engine."""

    def __init__(self, source: ModelSource, options: Vllm, *, cpus: float, gpus: float = 0) -> None:
        check_model_files(source, "source.path")
        tokenizer, self._config = load(AutoTokenizer, source), load(AutoConfig, source)
        self._max_length = longest(self._config.get_text_config(), options.max_length, "Vllm.max_length")
        self._source, self._options = source, options
        with ExitStack() as stack:
            os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
            if not gpus:
                os.environ |= _threads(cpus, stack)
            self._engine = _start(source, options, self._max_length, gpus)
            stack.callback(_watch().kill)
            self._claims = stack.pop_all()
        said = self._engine.model_config.try_get_generation_config()
        self._defaults = own_defaults(said)
        self._vocabulary: int = self._engine.model_config.get_vocab_size()
        self._tokens = max(self._vocabulary, len(tokenizer))
        self._base = _Adapter(None, Voice.of(tokenizer, said.get("eos_token_id")))
        self._adapters: dict[str, _Adapter] = {}
        self._loaded = 0  # adapters, ever
        self._loading = asyncio.Lock()
        self._closed = False
        self._reader = ThreadPoolExecutor(1, "vllm-reader")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.check()
        adapter = self._adapter(request.adapter)
        with adapter.used():
            # In a thread, because a long prompt takes a while to tokenise; in one, so that requests keep their order.
            reading = asyncio.get_running_loop().run_in_executor(self._reader, self._read, request, adapter)
            answer, params = await reading
            outputs = self._engine.generate(tokens_input(answer.prompt), params, uuid4().hex, lora_request=adapter.lora)
            due = 0.0  # when the next message is sent: the first text and the end go at once, each takes a core's time
            try:
                async with aclosing(outputs):  # vLLM lets go of an answer that nobody reads to its end
                    async for output in outputs:
                        _grow(answer, output, request)
                        if (answer.is_urgent or time.monotonic() >= due) and (delta := answer.news()):
                            due = time.monotonic() + pause(self._engine.get_num_unfinished_requests())
                            yield delta
                        if answer.finished:
                            return
            except VLLMClientError as error:
                raise _refused(error, request) from error
        if request.constraint is not None:
            raise RequestError(
                f"{request.constraint.field}: vLLM could not hold it to the end", request.constraint.field
            )
        raise RuntimeError("vLLM has broken off an answer; its log says why")

    async def load_adapter(self, name: str, run: Path) -> None:
        """As in Engine. A name in use gets the new adapter; returns when the answers with the old one have ended."""
        async with self._loading:
            directory = await asyncio.to_thread(self._check_adapter, run)
            voice = await asyncio.to_thread(self._base.voice.of_run, run, self._source, self._tokens)
            replaced, most = self._adapters.get(name), self._options.max_adapters
            if replaced is None and len(self._adapters) == most:
                raise UserError(f"run {run}: Vllm.max_adapters = {most}, and there are as many")
            self._loaded += 1
            lora = LoRARequest(f"{name}-{self._loaded}", self._loaded, str(directory))
            try:
                await self._engine.add_lora(lora)
            except Exception as error:  # vLLM passes on what its worker raised as a plain Exception
                raise UserError(f"adapter {directory} cannot be served by vLLM: {first_line(error)}") from error
            self._adapters[name] = _Adapter(lora, voice)
            if replaced:
                await self._remove(replaced)

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for `name`; returns when its answers under way have ended."""
        async with self._loading:
            if name not in self._adapters:
                raise UserError(f"there is no adapter {name!r}; {choices(name, self._adapters)}")
            await self._remove(self._adapters.pop(name))

    async def _remove(self, adapter: _Adapter) -> None:
        await adapter.idle.wait()
        assert adapter.lora is not None
        await self._engine.remove_lora(adapter.lora.lora_int_id)

    def check(self) -> None:
        if self._closed:
            raise RuntimeError("the vLLM engine is closed")
        if self._engine.errored:
            raise RuntimeError("the vLLM engine has stopped; its log says why")

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.output_processor.propagate_error(RuntimeError("the vLLM engine is closed"))
            await asyncio.to_thread(self._engine.shutdown)
            self._reader.shutdown(wait=False)
            self._claims.close()

    def _adapter(self, name: str | None) -> _Adapter:
        if name is None:
            return self._base
        if name not in self._adapters:
            raise RequestError(f"there is no adapter {name!r}; {choices(name, self._adapters)}", "model")
        return self._adapters[name]

    def _read(self, request: GenerateRequest, adapter: _Adapter) -> tuple[Answer, SamplingParams]:
        """`request` as what vLLM takes, and what its answer is made with. Raises RequestError."""
        check_numbers(request, self._vocabulary)
        prompt = adapter.voice.read(request, self._vocabulary)
        limit, min_tokens = answer_length(request, prompt, self._max_length, self._defaults)
        answer = Answer(request, prompt=prompt, limit=limit, min_tokens=min_tokens, voice=adapter.voice)
        if request.constraint is not None:
            adapter.voice.grammars.matcher(request.constraint)  # in our words, and within our limits: vLLM has none
        try:
            return answer, _sampling_params(Sampling.of(request, self._defaults), answer, request, self._vocabulary)
        except VLLMClientError as error:
            raise _refused(error, request) from error

    def _check_adapter(self, run: Path) -> Path:
        """Where the adapter of `run` lies. Raises UserError for one of another base: vLLM would serve a part of it."""
        directory = adapter_directory(run)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(self._config, trust_remote_code=self._source.trust_remote_code)
        shapes = {name: tuple(module.weight.shape) for name, module in base.named_modules() if _is_matrix(module)}
        targets, found = _read_adapter(directory)
        for name, (rank, inputs, outputs) in found.items():
            if name not in shapes:
                raise UserError(f"adapter {directory} does not fit the base: only the adapter has {name}")
            if (outputs, inputs) not in (shapes[name], shapes[name][::-1]):
                raise UserError(
                    f"adapter {directory} does not fit the base: size mismatch: {name} is {shapes[name]}, "
                    f"and in the adapter {(outputs, inputs)}"
                )
            if rank > self._options.max_rank:
                raise UserError(f"adapter {directory} is of rank {rank}: Vllm.max_rank = {self._options.max_rank}")
        for target in targets:
            mine = [name for name in shapes if name == target or name.endswith(f".{target}")]
            if absent := next((name for name in mine if name not in found), None if mine else target):
                raise UserError(f"adapter {directory} does not fit the base: it has nothing for {absent}")
        return directory


def _threads(cpus: float, stack: ExitStack) -> dict[str, str]:
    """The variables by which vLLM's worker computes on this replica's CPUs alone; they are its own until `stack` ends."""
    count = max(1, int(cpus))
    places, claim = hardware.claim_cpus(count) if sys.platform == "linux" and cpus == count else ([], ExitStack())
    stack.enter_context(claim)
    found = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, places)) or "nobind", "OMP_NUM_THREADS": str(count)}
    # Intel's OpenMP, which comes with vLLM: with it, threads wait for each other for less long.
    openmp = Path(sys.prefix) / "lib/libiomp5.so"
    return found | ({"LD_PRELOAD": str(openmp)} if openmp.is_file() else {})


def _start(source: ModelSource, options: Vllm, max_length: int, gpus: float) -> AsyncLLM:
    """vLLM with the model of `source`. Raises UserError where it cannot serve it."""
    # One more, which may replace another. And on CPUs one that stays empty: where rows of the base are beside those of an
    # adapter, vLLM takes theirs from the last.
    places = options.max_adapters + (1 if gpus else 2)
    adapters = {"enable_lora": True, "max_loras": places, "max_lora_rank": options.max_rank}
    try:
        config = AsyncEngineArgs(
            model=str(Path(source.path).expanduser()) if source.is_local else source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=_dtype(source, gpus),
            max_model_len=max_length,
            max_num_seqs=options.max_batch,
            quantization=options.quantization,
            tensor_parallel_size=max(1, int(gpus)),
            enforce_eager=not (bool(gpus) if options.compiled is None else options.compiled),
            max_logprobs=MOST_LOGPROBS,
            structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
            **(adapters if options.max_adapters else {}),
        ).create_engine_config()
        if not gpus:
            _check_heads(config.model_config)
        _set_memory(config, options, gpus)
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        # pydantic puts what is wrong into the middle of its message.
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise UserError(f"vLLM cannot serve {source.path!r}: {why}") from error


def _watch() -> subprocess.Popen[bytes]:
    """A shell that kills vLLM's processes should this one be killed: by themselves they would go on, with the model.

    It waits for the end of a pipe that this process alone has open.
    """
    processes = [str(child.pid) for child in multiprocessing.active_children()]
    command = ["sh", "-c", 'read -r _; kill -9 "$@"', "watch", *processes]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _dtype(source: ModelSource, gpus: float) -> str:
    if source.dtype != "auto" or not gpus:
        wanted = hardware.compute_dtype(source.dtype, torch.device("cpu"))
    else:  # asked of vLLM, because torch would take memory of the GPU for the question
        wanted = torch.bfloat16 if torch.bfloat16 in current_platform.supported_dtypes else torch.float32
    return str(wanted).removeprefix("torch.")


def _check_heads(model: ModelConfig) -> None:
    """Raise UserError for heads of a size that vLLM has no attention for on CPUs: it would end at the first request."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # only where vLLM was built for CPUs

    known = CPUAttentionBackend.get_supported_head_sizes()
    if not model.use_mla and model.get_head_size() not in known:
        sizes = ", ".join(map(str, known))
        raise UserError(f"this model's attention heads are of size {model.get_head_size()}: vLLM on CPUs takes {sizes}")


def _set_memory(config: VllmConfig, options: Vllm, gpus: float) -> None:
    """Say how much keys and values may take: what is allowed, but no more than twice what the batch can use."""
    wanted, model, cache = options.kv_memory or ("90%" if gpus else "25%"), config.model_config, config.cache_config
    if gpus and wanted.endswith("%"):
        cache.gpu_memory_utilization = memory_size(wanted, free=1000, field="Vllm.kv_memory") / 1000
        return
    allowed = memory_size(wanted, free=hardware.free_memory(torch.device("cpu")), field="Vllm.kv_memory")
    if not (model.use_mla or model.is_hybrid):  # others keep less than keys and values of every layer
        heads, layers = model.get_num_kv_heads(config.parallel_config), model.get_num_layers(config.parallel_config)
        token = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
        blocks = -(-model.max_model_len // cache.block_size) + 1  # vLLM keeps one for itself
        if allowed < blocks * cache.block_size * token:
            needed = blocks * cache.block_size * token / 2**20
            raise UserError(
                f"Vllm.kv_memory = {wanted!r}: {allowed / 2**20:.0f} MiB, at least {needed:.0f} MiB for "
                f"max_length = {model.max_model_len}"
            )
        allowed = min(allowed, 2 * (options.max_batch * blocks) * cache.block_size * token)
    cache.kv_cache_memory_bytes = allowed


def _sampling_params(sampling: Sampling, answer: Answer, request: GenerateRequest, vocabulary: int) -> SamplingParams:
    if COLDEST <= sampling.temperature < WARM:
        wrong = f"temperature = {sampling.temperature}: vLLM draws from {WARM} on; 0 is for the likeliest"
        raise RequestError(wrong, "temperature")
    ends = sorted(token for token in answer.ends | answer.stops if token < vocabulary)
    return SamplingParams(
        temperature=sampling.temperature if sampling.temperature >= COLDEST else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=None if sampling.seed is None else sampling.seed % 2**63,  # -1 would be none
        logprobs=sampling.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        max_tokens=max(1, answer.limit),  # it cannot only read a prompt; the answer takes no notice of the token
        min_tokens=answer.min_tokens if ends else 0,
        stop_token_ids=ends,
        ignore_eos=True,  # all that end an answer have been named
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if request.constraint is None else _structured(request.constraint),
    )


def _structured(constraint: Constraint) -> StructuredOutputsParams:
    if constraint.kind in ("regex", "choice"):
        return StructuredOutputsParams(grammar=lark(constraint))
    return StructuredOutputsParams(json=constraint.value if constraint.kind == "json_schema" else ANY_OBJECT)


def _grow(answer: Answer, output: RequestOutput, request: GenerateRequest) -> None:
    """`answer` goes on with the tokens of `output`, up to its end."""
    if answer.scores_prompt and output.prompt_logprobs:
        scored = zip(answer.prompt[1:], output.prompt_logprobs[1:], strict=True)
        answer.scores[1:] = [_choice(token, found, request.prompt_logprobs) for token, found in scored]
    said = output.outputs[0]
    for token, found in zip(said.token_ids, said.logprobs or [None] * len(said.token_ids), strict=True):
        answer.accept(_choice(token, found, request.logprobs))
        if answer.finished:
            return


def _choice(token: int, found: Mapping[int, Logprob] | None, count: int | None) -> Choice:
    """`found`: the token and the `count` likeliest, by their ids."""
    if found is None:
        return Choice(token)
    best = sorted(found.items(), key=lambda pair: pair[1].rank or 0)[: count or 0]
    return Choice(token, found[token].logprob, tuple((other, logprob.logprob) for other, logprob in best))


def _refused(error: VLLMClientError, request: GenerateRequest) -> RequestError:
    """What vLLM says of a request, in the sender's words."""
    field = getattr(error, "parameter", None) or (request.constraint.field if request.constraint else None)
    return RequestError(first_line(Exception(error.args[0])), field)


def _read_adapter(directory: Path) -> tuple[list[str], dict[str, tuple[int, int, int]]]:
    """What the adapter in `directory` (PEFT's format) is for, as far as it says so; and of each layer that it changes the
    rank, inputs and outputs. Raises UserError.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        with safe_open(directory / "adapter_model.safetensors", "pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        if not (directory / "adapter_config.json").is_file():
            raise UserError(f"{directory} is not an adapter: it has no adapter_config.json") from error
        raise UserError(f"adapter {directory} cannot be read: {first_line(error)}") from error
    if foreign := next((name for name in shapes if not OWN.fullmatch(name)), None):
        raise UserError(f"adapter {directory} has {foreign}, which vLLM cannot serve beside the base; merge it")
    names = {match[1] for name in shapes if (match := OWN.fullmatch(name))}
    pairs = {name: [shapes[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB"] for name in names}
    targets = config["target_modules"]
    whole = isinstance(targets, list) and not (config.get("layers_to_transform") or config.get("exclude_modules"))
    return targets if whole else [], {name: (*down, up[0]) for name, (down, up) in pairs.items()}


def _is_matrix(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2
