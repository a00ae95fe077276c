"""One thread that computes: sequences come in from the event loop, step together, and their text goes back."""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from plugins import hardware
from plugins.engines.answer import pause
from plugins.engines.sampling import choose
from plugins.engines.scheduler import Piece, Scheduler
from plugins.engines.sequence import Mailbox, Sequence
from plugins.types import Delta

logger = logging.getLogger(__name__)


class AdaptersInMemory(Protocol):
    """Those of a Computer. They come and go between two steps."""

    def load(self, key: str, adapter: Any) -> None:
        """Have `adapter`, whatever the engine makes of a run, under `key`; a key is never used twice. Raises UserError."""
        ...

    def remove(self, key: str) -> None: ...


class Computer(Protocol):
    """A model that computes the scheduler's steps."""

    @property
    def adapters(self) -> AdaptersInMemory: ...

    def run(self, pieces: Several[Piece[Sequence]]) -> tuple[torch.Tensor, list[tuple[Piece[Sequence], slice]]]:
        """Compute `pieces`: logits [n, vocab], and which rows of them are whose.

        A piece that ends has one row, for what comes next; one of a prompt that is scored has a row for each token.
        """
        ...


class Batcher:
    """The worker thread with its model and scheduler. Everything public is called from other threads, and never waits for a
    step.
    """

    def __init__(self, make: Callable[[], tuple[Computer, Scheduler[Sequence]]]) -> None:
        """`make` is called in the worker thread, and what it raises is raised here.

        Whatever computes does so in that one thread. OpenMP has a team of threads for each thread that ever did: with the
        model loaded in another, everything took one and a half times as long.
        """
        # Between the threads, under the lock of `_mail`.
        self._mail = threading.Condition()
        self._arrived: list[Sequence] = []
        self._jobs: list[tuple[Callable[[], None], Future[None]]] = []
        self._closing = False
        self._failure: BaseException | None = None
        # The worker thread's own.
        self._retired: set[str] = set()
        self._next_round = 0.0  # when everyone is sent what there is, on time.monotonic's clock
        made: Future[tuple[Computer, Scheduler[Sequence]]] = Future()
        self._thread = threading.Thread(target=self._work, args=(make, made), name="engine", daemon=True)
        self._thread.start()
        self._runner, self._scheduler = made.result()

    def submit(self, sequence: Sequence) -> None:
        with self._mail:
            self.check()
            self._arrived.append(sequence)
            self._mail.notify()

    def load_adapter(self, key: str, adapter: Any) -> Future[None]:
        return self._between_steps(lambda: self._runner.adapters.load(key, adapter))

    def retire_adapter(self, key: str) -> Future[None]:
        """Remove an adapter as soon as no sequence that has been submitted uses it."""
        return self._between_steps(lambda: self._retired.add(key))

    def check(self) -> None:
        if self._failure is not None:
            raise _stopped(self._failure)
        if self._closing:
            raise RuntimeError("the engine is closed")

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

    def _work(
        self,
        make: Callable[[], tuple[Computer, Scheduler[Sequence]]],
        made: Future[tuple[Computer, Scheduler[Sequence]]],
    ) -> None:
        try:
            self._runner, self._scheduler = make()
        except BaseException as error:  # noqa: BLE001 - it goes to the constructor, which waits for it
            made.set_exception(error)
            return
        made.set_result((self._runner, self._scheduler))
        del make, made
        try:
            while self._receive():
                self._step()
            self._end(RuntimeError("it was closed"))
        except BaseException as error:
            # Nothing is swallowed: every consumer gets it, and so does check().
            logger.exception("the engine stops")
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
        _post([(sequence, _stopped(cause)) for sequence in [*self._scheduler.sequences(), *arrived]])
        del self._runner, self._scheduler

    def _receive(self) -> bool:
        """Take in what has come, waiting for it where there is nothing else to do. False: the engine closes."""
        with self._mail:
            while not (self._closing or self._arrived or self._jobs or self._scheduler.is_busy):
                self._mail.wait()
            if self._closing:
                return False
            arrived, self._arrived = self._arrived, []
            jobs, self._jobs = self._jobs, []
        self._scheduler.waiting.extend(arrived)
        for job, done in jobs:
            if done.set_running_or_notify_cancel():
                try:
                    job()
                except Exception as error:  # noqa: BLE001 - it goes to the caller, who waits for it
                    done.set_exception(error)
                else:
                    done.set_result(None)
        if self._retired:
            self._drop_retired()
        return True

    def _drop_retired(self) -> None:
        unused = self._retired - {sequence.adapter for sequence in self._scheduler.sequences()}
        for key in unused:
            self._runner.adapters.remove(key)
            self._scheduler.cache.forget(key)
        self._retired -= unused

    def _step(self) -> None:
        """Compute what the scheduler plans, and give everyone the token that is next."""
        try:
            pieces = self._scheduler.plan()
        except MemoryError as error:
            self._fail(self._scheduler.waiting.popleft(), error)  # it would be the next, and had all the room
            return
        if not pieces:
            return
        try:
            logits, rows = self._runner.run(pieces)
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            last = self._scheduler.running[-1]  # to come; the others go on
            self._scheduler.drop(last)
            self._fail(last.sequence, error)
            return
        self._scheduler.computed(pieces)
        self._deliver(logits, rows)

    def _deliver(self, logits: torch.Tensor, rows: Several[tuple[Piece[Sequence], slice]]) -> None:
        """Choose the next tokens from `logits`, of which each piece has its rows; send the text."""
        for piece, part in rows:
            start = piece.running.place.length - piece.count
            if piece.running.sequence.scores_prompt and start < len(piece.running.sequence.prompt):
                piece.running.sequence.score_prompt(start, logits[part])
        ended = [(piece, part) for piece, part in rows if piece.running.left == 0]
        last = logits if len(ended) == len(logits) else logits[[part.stop - 1 for _, part in ended]]
        choices = choose(last, [piece.running.sequence.sampler for piece, _ in ended]) if ended else []
        for (piece, _), choice in zip(ended, choices, strict=True):
            piece.running.sequence.take(choice)
            if piece.running.sequence.finished:
                self._scheduler.finish(piece.running)
        self._send([piece.running.sequence for piece, _ in ended])

    def _send(self, sequences: Several[Sequence]) -> None:
        """Send the first text of an answer and its end at once; what is between, to all of them together now and then.

        Each message takes the cores' time, with many answers more than computing their tokens, and nobody reads faster.
        """
        now = time.monotonic()
        is_round = now >= self._next_round
        if is_round:
            self._next_round = now + pause(len(sequences))
        letters = [(sequence, sequence.news()) for sequence in sequences if is_round or sequence.is_urgent]
        _post([(sequence, delta) for sequence, delta in letters if delta is not None])

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        logger.warning("a request fails: %s", error)
        _post([(sequence, RuntimeError(f"there is not enough memory for this request: {error}"))])


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
    error = RuntimeError(f"the engine has stopped: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
