"""One thread that decodes: sequences come in from the event loop, are read, step together, and their text goes back."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch

from plugins.engines.decoding import Decoder, Prompts
from plugins.engines.sampling import choose
from plugins.engines.sequence import Mailbox, Sequence
from plugins.types import Delta

logger = logging.getLogger(__name__)


class Batcher:
    """The worker thread and its decoder. Everything public is called from other threads, and never waits for a step."""

    def __init__(self, decoder: Decoder[Sequence], max_batch: int) -> None:
        # Between the threads, under the lock of `_mail`.
        self._mail = threading.Condition()
        self._arrived: list[Sequence] = []
        self._jobs: list[tuple[Callable[[], None], Future[None]]] = []
        self._closing = False
        self._failure: BaseException | None = None
        # The worker thread's own.
        self._decoder, self._max_batch = decoder, max_batch
        self._waiting: deque[Sequence] = deque()
        self._prompts: Prompts[Sequence] | None = None
        self._retired: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="torch-engine", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        with self._mail:
            self.check()
            self._arrived.append(sequence)
            self._mail.notify()

    def load_adapter(self, key: str, directory: Path) -> Future[None]:
        return self._between_steps(lambda: self._decoder.adapters.load(key, directory))

    def retire_adapter(self, key: str) -> Future[None]:
        """Remove an adapter as soon as no sequence that has been submitted uses it."""
        return self._between_steps(lambda: self._retired.add(key))

    def check(self) -> None:
        if self._failure is not None:
            raise _stopped(self._failure)
        if self._closing:
            raise RuntimeError("the torch engine is closed")

    def close(self) -> None:
        """End the thread after its present step (waits for it). Who still waits for text gets a RuntimeError."""
        with self._mail:
            self._closing = True
            self._mail.notify()
        self._thread.join()

    def _between_steps(self, job: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        with self._mail:
            self.check()
            self._jobs.append((job, done))
            self._mail.notify()
        return done

    # In the worker thread

    def _work(self) -> None:
        try:
            while self._receive():
                self._read_prompts()
                self._decode()
            self._end(RuntimeError("it was closed"))
        except BaseException as error:
            # Nothing is swallowed: every consumer gets it, and so does check().
            logger.exception("the torch engine stops")
            self._failure = error
            self._end(error)

    def _end(self, cause: BaseException) -> None:
        """Tell everyone who waits, and let go of the model."""
        with self._mail:
            self._closing = True
            arrived, jobs = self._arrived, self._jobs
        for _, done in jobs:
            if done.set_running_or_notify_cancel():
                done.set_exception(_stopped(cause))
        _post([(sequence, _stopped(cause)) for sequence in [*self._under_way(), *arrived]])
        self._waiting.clear()
        self._prompts = None
        del self._decoder

    def _receive(self) -> bool:
        """Take in what has come, waiting for it where there is nothing else to do. False: the engine closes."""
        with self._mail:
            while not (self._closing or self._arrived or self._jobs or self._under_way()):
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
                except Exception as error:  # noqa: BLE001 - it goes to the caller, who waits for it
                    done.set_exception(error)
                else:
                    done.set_result(None)
        self._drop_abandoned()
        self._drop_retired()
        return True

    def _under_way(self) -> list[Sequence]:
        return [*self._decoder.rows, *(self._prompts.rows if self._prompts else ()), *self._waiting]

    def _drop_abandoned(self) -> None:
        if any(sequence.abandoned for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.abandoned)
        if self._prompts and all(sequence.abandoned for sequence in self._prompts.rows):
            self._prompts = None
        for row in reversed(range(len(self._decoder.rows))):
            if self._decoder.rows[row].abandoned:
                self._decoder.leave(row)

    def _drop_retired(self) -> None:
        unused = self._retired - {sequence.adapter for sequence in self._under_way()} if self._retired else set()
        for key in unused:
            self._decoder.adapters.remove(key)
        self._retired -= unused

    def _read_prompts(self) -> None:
        """Read one piece of the prompts that wait; the batch has its turn between two pieces."""
        room = self._max_batch - len(self._decoder.rows)
        if self._prompts is None and self._waiting and room:
            count = Prompts.fitting([len(sequence.prompt) for sequence in self._waiting], room)
            self._prompts = Prompts([self._waiting.popleft() for _ in range(count)])
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

    def _deliver(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Choose the next tokens of `sequences`, the batch's last rows, from `logits` [sequences, vocab]; send the text."""
        choices = choose(logits, [sequence.sampler for sequence in sequences])
        news = [(sequence, sequence.accept(choice)) for sequence, choice in zip(sequences, choices, strict=True)]
        first = len(self._decoder.rows) - len(sequences)
        # From the end, since the last row moves into the place of one that leaves.
        for row, (_, delta) in reversed(list(enumerate(news, first))):
            if delta.finish_reason is not None:
                self._decoder.leave(row)
        _post([(sequence, delta) for sequence, delta in news if delta.text or delta.finish_reason])


def _post(letters: list[tuple[Sequence, Delta]] | list[tuple[Sequence, RuntimeError]]) -> None:
    """Put each letter into its sequence's mailbox, with one wake-up of an event loop for all of a step's."""
    for loop in {sequence.mailbox.loop for sequence, _ in letters}:
        mine = [(sequence.mailbox, news) for sequence, news in letters if sequence.mailbox.loop is loop]
        try:
            loop.call_soon_threadsafe(_put_all, mine)
        except RuntimeError:  # the event loop has been closed, and its consumers are gone with it
            for sequence, _ in letters:
                sequence.abandoned = sequence.abandoned or sequence.mailbox.loop is loop


def _put_all(letters: list[tuple[Mailbox, Delta | RuntimeError]]) -> None:
    for mailbox, news in letters:
        mailbox.put(news)


def _stopped(cause: BaseException) -> RuntimeError:
    error = RuntimeError(f"the torch engine has stopped: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
