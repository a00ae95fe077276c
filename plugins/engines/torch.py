"""The torch engine: transformers' forward, a KV cache of our own, continuous batching, adapters beside the base.

A request comes in on the event loop as a Sequence, crosses to one worker thread, waits, is read, is decoded together with
the others, and its text comes back to the event loop through its Mailbox.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from plugins import hardware
from plugins.engines.adapters import NONE
from plugins.engines.decoding import Decoder, Prompts
from plugins.engines.sampling import Sampler, choose
from plugins.engines.text import TextStream, Voice, prompt_field
from plugins.spec import UserError, choices
from plugins.types import Delta, FinishReason, GenerateRequest, ModelSource, RequestError

logger = logging.getLogger(__name__)

LONGEST = 4096  # tokens of prompt and answer where the user sets no max_length: what a cache for a batch may cost


class TorchEngine:
    """An Engine (see plugins.engines). Text of an answer holds no special tokens; its token count includes the end token
    and the tokens of a stop string, as vLLM's does.
    """

    def __init__(self, source: ModelSource, *, max_batch: int, max_length: int | None, cpus: float) -> None:
        hardware.use_threads(cpus)
        model, tokenizer = load_model(source), load_tokenizer(source.path, source)
        self._source = source
        self._eos = model.generation_config.eos_token_id
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._max_batch, self._max_length = max_batch, _length(model.config.get_text_config(), max_length)
        self._decoder = Decoder(model, max_rows=max_batch, max_length=self._max_length)
        self._decoder.prove()
        self._base = Voice.of(tokenizer, self._eos)

        # The event loop's: which adapters may be asked for.
        self._adapters: dict[str, Adapter] = {}
        self._loaded = 0
        # Between the two, under the lock of `_mail`.
        self._mail = threading.Condition()
        self._arrived: list[Sequence] = []
        self._jobs: list[tuple[Callable[[], None], Future[None]]] = []
        self._closing = False
        self._ended: BaseException | None = None
        # The worker thread's.
        self._waiting: deque[Sequence] = deque()
        self._prompts: Prompts[Sequence] | None = None
        self._retired: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="torch-engine", daemon=True)
        self._thread.start()

    # On the event loop

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.check()
        adapter = self._adapter(request.adapter)
        # A thread, because a long prompt takes a while to tokenise.
        sequence = await asyncio.to_thread(self._sequence, request, adapter, Mailbox(asyncio.get_running_loop()))
        if request.adapter is not None and self._adapters.get(request.adapter) is not adapter:
            raise self._unknown(request.adapter)
        with self._mail:
            self.check()
            self._arrived.append(sequence)
            self._mail.notify()
        try:
            finished = False
            while not finished:
                delta = await sequence.mailbox.take()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            sequence.abandoned = True

    async def load_adapter(self, name: str, run: Path) -> None:
        """As in Engine. A name that is in use is replaced: its answers under way end with the adapter they began with."""
        directory, voice = await asyncio.to_thread(self._run_voice, run)
        # A key of our own: PEFT cannot take a name with a dot, and a reloaded name is a new adapter.
        self._loaded += 1
        adapter = Adapter(f"adapter{self._loaded}", voice)
        await self._in_worker(lambda: self._decoder.adapters.load(adapter.key, directory))
        replaced, self._adapters[name] = self._adapters.get(name), adapter
        if replaced is not None:
            await self._in_worker(lambda: self._retired.add(replaced.key))

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for `name`. Its weights go when its answers under way have ended."""
        if name not in self._adapters:
            raise UserError(f"adapter {name!r} is not loaded; {choices(name, self._adapters)}")
        adapter = self._adapters.pop(name)
        await self._in_worker(lambda: self._retired.add(adapter.key))

    def check(self) -> None:
        if self._ended is not None:
            raise _stopped(self._ended) from self._ended
        if self._closing:
            raise RuntimeError("the torch engine is closed")

    async def close(self) -> None:
        with self._mail:
            self._closing = True
            self._mail.notify()
        await asyncio.to_thread(self._thread.join)
        self.__dict__.pop("_decoder", None)  # the model's memory

    def _adapter(self, name: str | None) -> "Adapter":
        if name is None:
            return Adapter(NONE, self._base)
        if name not in self._adapters:
            raise self._unknown(name)
        return self._adapters[name]

    def _unknown(self, name: str) -> RequestError:
        return RequestError(f"there is no adapter {name!r}; {choices(name, self._adapters)}", "model")

    def _sequence(self, request: GenerateRequest, adapter: "Adapter", mailbox: "Mailbox") -> "Sequence":
        _check_sampling(request)
        prompt, field = adapter.voice.read(request, self._vocabulary), prompt_field(request)
        room = self._max_length - len(prompt)
        if room < 1:
            raise RequestError(
                f"{field} of {len(prompt)} tokens leaves no room for an answer: this model takes {self._max_length} tokens "
                "of prompt and answer together",
                field,
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise RequestError(
                f"max_tokens = {request.max_tokens} with a prompt of {len(prompt)} tokens is more than the "
                f"{self._max_length} tokens that this model takes: at most {room}",
                "max_tokens",
            )
        return Sequence(request, prompt, request.max_tokens or room, adapter, mailbox)

    def _run_voice(self, run: Path) -> tuple[Path, Voice]:
        """The directory of the adapter of run directory `run`, and how that adapter is spoken to."""
        if not run.is_dir():
            raise UserError(f"adapter run {run}: no such directory")
        if (run / "model").is_dir():
            raise UserError(f"{run} is a full finetune, not an adapter: serve {run / 'model'} as a model of its own")
        if not (run / "adapter").is_dir():
            raise UserError(f"{run} is not a finished run: it has no adapter/")
        if not _has_tokenizer(run):
            return run / "adapter", self._base
        return run / "adapter", Voice.of(load_tokenizer(str(run), self._source), self._eos)

    async def _in_worker(self, job: Callable[[], None]) -> None:
        """Run `job` in the worker thread between two steps."""
        done: Future[None] = Future()
        with self._mail:
            self.check()
            self._jobs.append((job, done))
            self._mail.notify()
        await asyncio.wrap_future(done)

    # In the worker thread

    def _work(self) -> None:
        ended: BaseException = RuntimeError("it was closed")
        try:
            while self._receive():
                self._read_prompts()
                self._decode()
        except BaseException as error:
            logger.exception("the torch engine stops")
            ended = error
        with self._mail:
            self._ended = ended if not self._closing else None
            arrived, jobs = self._arrived, self._jobs
        for _, done in jobs:
            done.set_exception(_stopped(ended))
        reading = self._prompts.rows if self._prompts else []
        orphans = [*self._decoder.rows, *reading, *self._waiting, *arrived]
        _post([(sequence, _stopped(ended)) for sequence in orphans])

    def _receive(self) -> bool:
        """Take in what has come, waiting for it where there is nothing else to do. False: the engine closes."""
        with self._mail:
            while not (self._closing or self._arrived or self._jobs or self._busy):
                self._mail.wait()
            if self._closing:
                return False
            arrived, self._arrived = self._arrived, []
            jobs, self._jobs = self._jobs, []
        self._waiting.extend(arrived)
        for job, done in jobs:
            if done.set_running_or_notify_cancel():
                try:
                    job()
                except Exception as error:
                    done.set_exception(error)
                else:
                    done.set_result(None)
        self._drop_abandoned()
        self._remove_retired()
        return True

    @property
    def _busy(self) -> bool:
        return bool(self._decoder.rows or self._prompts or self._waiting)

    def _drop_abandoned(self) -> None:
        if self._prompts and all(sequence.abandoned for sequence in self._prompts.rows):
            self._prompts = None
        for row in reversed(range(len(self._decoder.rows))):
            if self._decoder.rows[row].abandoned:
                self._decoder.leave(row)

    def _remove_retired(self) -> None:
        if self._retired:
            reading = self._prompts.rows if self._prompts else []
            used = {sequence.adapter for sequence in [*self._decoder.rows, *reading, *self._waiting]}
            for key in self._retired - used:
                self._decoder.adapters.remove(key)
            self._retired &= used

    def _read_prompts(self) -> None:
        """Read one piece of the prompts that wait; the batch gets its turn between two pieces."""
        room = self._max_batch - len(self._decoder.rows)
        if self._prompts is None and room and self._waiting:
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.abandoned)
            count = Prompts.fitting([len(sequence.prompt) for sequence in self._waiting], room)
            group = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
            self._prompts = Prompts(group) if group else None
        if self._prompts is not None:
            logits = self._decoder.read(self._prompts)
            if logits is not None:
                sequences, self._prompts = self._prompts.rows, None
                self._deliver(sequences, logits)

    def _decode(self) -> None:
        """One more token for every sequence in the batch."""
        if self._decoder.rows:
            logits = self._decoder.step()
            self._deliver(list(self._decoder.rows), logits)

    def _deliver(self, sequences: "list[Sequence]", logits: torch.Tensor) -> None:
        """Choose the next token of each of the batch's last `sequences` from `logits` [sequences, vocab] and send its text."""
        tokens = choose(logits, [sequence.sampler for sequence in sequences])
        deltas = [sequence.accept(token) for sequence, token in zip(sequences, tokens, strict=True)]
        first = len(self._decoder.rows) - len(sequences)
        for row in reversed(range(len(sequences))):
            if deltas[row].finish_reason is not None:
                self._decoder.leave(first + row)
        _post([(sequence, delta) for sequence, delta in zip(sequences, deltas, strict=True) if delta.text or delta.finish_reason])


@dataclass(frozen=True)
class Adapter:
    key: str  # its name in the decoder
    voice: Voice


class Sequence:
    """One request under way. The worker thread owns it; the event loop only sets `abandoned`."""

    def __init__(
        self, request: GenerateRequest, prompt: list[int], limit: int, adapter: Adapter, mailbox: "Mailbox"
    ) -> None:
        self.prompt, self.adapter, self.mailbox = prompt, adapter.key, mailbox
        self.sampler = Sampler(request)
        self.token = -1  # the latest of the answer
        self.abandoned = False  # nobody waits for it any more
        self._limit, self._count = limit, 0
        self._ends = adapter.voice.ends
        self._text = TextStream(adapter.voice.tokenizer, request.stop)

    def accept(self, token: int) -> Delta:
        """The answer grows by `token`: what there is to say now."""
        self.token = token
        self._count += 1
        reason: FinishReason | None = None
        if token in self._ends:
            text, reason = self._text.end(), "stop"
        else:
            text = self._text.push(token)
            if self._text.stopped:
                reason = "stop"
            elif self._count == self._limit:
                text, reason = text + self._text.end(), "length"
        return Delta(text, len(self.prompt), self._count, reason)


class Mailbox:
    """What the worker thread has said to one consumer; touched on the consumer's event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, news: Delta | Exception) -> None:
        if isinstance(news, Delta):
            self._deltas.append(news)
        else:
            self._error = news
        self._filled.set()

    async def take(self) -> Delta:
        """All that has come since the last time, as one Delta: a slow consumer gets longer pieces, never a backlog."""
        await self._filled.wait()
        self._filled.clear()
        if self._error is not None:
            raise self._error
        deltas, self._deltas = self._deltas, []
        last = deltas[-1]
        return Delta("".join(d.text for d in deltas), last.prompt_tokens, last.completion_tokens, last.finish_reason)


def _post(letters: list[tuple[Sequence, Any]]) -> None:
    """Put each letter into its sequence's mailbox: one wake-up of an event loop for all of a step's."""
    for loop in {sequence.mailbox.loop for sequence, _ in letters}:
        mine = [(sequence.mailbox, news) for sequence, news in letters if sequence.mailbox.loop is loop]
        try:
            loop.call_soon_threadsafe(_put_all, mine)
        except RuntimeError:  # the event loop has been closed, and its consumers are gone with it
            for sequence, _ in letters:
                sequence.abandoned = sequence.abandoned or sequence.mailbox.loop is loop


def _put_all(letters: list[tuple[Mailbox, Any]]) -> None:
    for mailbox, news in letters:
        mailbox.put(news)


def _stopped(cause: BaseException) -> RuntimeError:
    error = RuntimeError(f"the torch engine has stopped: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _check_sampling(request: GenerateRequest) -> None:
    rules = (
        ("temperature", request.temperature >= 0, "at least 0"),
        ("top_p", 0 < request.top_p <= 1, "above 0 and at most 1"),
        ("top_k", request.top_k >= 0, "at least 0 (0: all tokens)"),
        ("max_tokens", request.max_tokens is None or request.max_tokens >= 1, "at least 1"),
        ("stop", all(request.stop), "without an empty string"),
    )
    for field, holds, words in rules:
        if not holds:
            raise RequestError(f"{field} = {getattr(request, field)!r}: must be {words}", field)


def _length(config: Any, wanted: int | None) -> int:
    """Tokens of prompt and answer together: `wanted`, or what the model was made for."""
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    if wanted is not None and made_for is not None and wanted > made_for:
        raise UserError(f"Torch.max_length = {wanted}: the model was made for at most {made_for} tokens")
    return wanted or min(made_for or LONGEST, LONGEST)


# Loading


def load_model(source: ModelSource) -> Any:
    """The model of `source`, ready to compute. Raises UserError for what is not one."""
    where = _local(source)
    if where is not None and not (where / "config.json").is_file():
        raise UserError(f"model directory {where} has no config.json: it is not a transformers model")
    device = hardware.device()
    dtype = hardware.compute_dtype(source.dtype, device)
    major = int(transformers.__version__.split(".")[0])
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            where or source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            **{"dtype" if major >= 5 else "torch_dtype": dtype},
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {source.path}: {_first_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path: str, source: ModelSource) -> Any:
    """The tokenizer at `path`: the model's own, or that of a run. Raises UserError where there is none."""
    where = _local(source) if path == source.path else Path(path)
    if where is not None and not _has_tokenizer(where):
        raise UserError(f"model directory {where} has no tokenizer: put tokenizer.json and tokenizer_config.json there")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            where or path,
            revision=source.revision if where is None else None,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {path}: {_first_line(error)}") from error


def _local(source: ModelSource) -> Path | None:
    """The directory of `source`; None for a hub id."""
    if not source.is_local:
        return None
    where = Path(source.path).expanduser()
    if not where.is_dir():
        raise UserError(f"ModelSource.path = {source.path!r}: no such directory")
    return where


def _has_tokenizer(directory: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    return any((directory / name).is_file() for name in names)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
