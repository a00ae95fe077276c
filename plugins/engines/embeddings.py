"""The embedding engine: texts of many requests become batches of like length, and each request gets its vectors back.

What a text's vector is, encoder.py says. Here is one thread that computes and a queue before it: what arrives during a
batch is in the next one.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from plugins import hardware
from plugins.engines import Embeddings
from plugins.engines.encoder import Encoder, Text
from plugins.model_files import check_model_files
from plugins.types import ModelSource, RequestError

logger = logging.getLogger(__name__)

BATCH_TOKENS = 16_384  # of a batch, padding included: what bounds its memory where texts are long


class Job:
    """One request under way: `rows` of token ids, `vectors` that fill, and who waits for them."""

    def __init__(self, rows: list[list[int]], dimensions: int) -> None:
        self.rows = rows
        self.vectors: NDArray[np.float32] = np.empty((len(rows), dimensions), np.float32)
        self.waiting = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # the longest is taken first
        self.unfinished = len(rows)
        self.done: Future[NDArray[np.float32]] = Future()

    def fill(self, row: int, vector: NDArray[np.float32]) -> None:
        self.vectors[row] = vector
        self.unfinished -= 1
        if not self.unfinished and self.done.set_running_or_notify_cancel():
            self.done.set_result(self.vectors)

    def fail(self, error: Exception) -> None:
        self.waiting.clear()
        if not self.done.done() and self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)


@dataclass(frozen=True)
class Place:
    """A text of a job."""

    job: Job
    row: int

    @property
    def tokens(self) -> list[int]:
        return self.job.rows[self.row]


class EncoderEngine:
    """An EmbeddingEngine, see plugins.engines."""

    def __init__(
        self, source: ModelSource, *, max_batch: int, max_length: int | None, cpus: float, gpus: float = 0
    ) -> None:
        hardware.use_cpus(cpus)
        check_model_files(source, "source.path")
        self._encoder = Encoder(source, max_length=max_length, gpus=gpus)
        self._max_batch = max_batch
        self._jobs: deque[Job] = deque()  # those with texts that wait; appended to here, the rest is the worker's
        self._failure: BaseException | None = None
        self._closing = False
        self._reader = ThreadPoolExecutor(1, "embedder-reader")
        self._worker = ThreadPoolExecutor(1, "embedder")

    async def embed(self, texts: Sequence[Text], dimensions: int | None = None) -> Embeddings:
        self.check()
        if dimensions is not None and not 1 <= dimensions <= self._encoder.dimensions:
            raise RequestError(
                f"dimensions = {dimensions}: this model has 1 to {self._encoder.dimensions}", "dimensions"
            )
        if not texts:
            raise RequestError("input is empty", "input")
        # In a thread, because many texts take a while to tokenise.
        rows = await asyncio.get_running_loop().run_in_executor(self._reader, self._encoder.read, texts)
        self.check()
        job = Job(rows, self._encoder.dimensions)
        self._jobs.append(job)
        self._worker.submit(self._work)
        vectors = await asyncio.wrap_future(job.done)
        return Embeddings(_shortened(vectors, dimensions), sum(map(len, rows)))

    def check(self) -> None:
        if stopped := self._stopped():
            raise stopped

    async def close(self) -> None:
        """End after the present round. Who still waits gets a RuntimeError."""
        self._closing = True
        await asyncio.to_thread(self._worker.shutdown)
        self._reader.shutdown(wait=False)

    def _stopped(self) -> RuntimeError | None:
        """Why nothing is computed any more."""
        if self._failure is not None:
            return RuntimeError(f"the embedder has stopped: {self._failure}")
        return RuntimeError("the embedder is closed") if self._closing else None

    # In the worker thread

    def _work(self) -> None:
        """Compute until nothing waits. It is called once after each job that has come, and mostly finds no work left."""
        taken: list[Place] = []
        try:
            while not self._stopped() and (taken := self._take()):
                for batch in batches(taken):
                    self._compute(batch)
        except BaseException as error:
            # Nothing is swallowed: everyone who waits gets it, and so does check().
            logger.exception("the embedder stops")
            self._failure = error
        if stopped := self._stopped():
            for job in [*(place.job for place in taken), *self._jobs]:
                job.fail(stopped)
            self._jobs.clear()

    def _take(self) -> list[Place]:
        """The texts of the next round, one of each request in turn: a short request never waits for all of a long one."""
        taken: list[Place] = []
        while self._jobs and len(taken) < self._max_batch:
            job = self._jobs.popleft()
            if job.waiting and not job.done.done():  # otherwise it has failed, or nobody waits for it any more
                taken.append(Place(job, job.waiting.pop()))
                self._jobs.append(job)
        return taken

    def _compute(self, batch: Sequence[Place]) -> None:
        try:
            vectors = self._encoder.vectors([place.tokens for place in batch]).cpu().numpy()
        except torch.OutOfMemoryError as error:  # of a GPU: other batches may fit
            for place in batch:
                place.job.fail(RuntimeError(f"out of memory: {error}"))
            return
        for place, vector in zip(batch, vectors, strict=True):
            place.job.fill(place.row, vector)


def batches(places: Sequence[Place]) -> list[list[Place]]:
    """`places` as batches in which a text is at most twice as long as another, so that less than half is padding."""
    parts: list[list[Place]] = []
    for place in sorted(places, key=lambda place: len(place.tokens), reverse=True):
        longest = len(parts[-1][0].tokens) if parts else 0
        if 2 * len(place.tokens) < longest or not parts or (len(parts[-1]) + 1) * longest > BATCH_TOKENS:
            parts.append([])
        parts[-1].append(place)
    return parts


def _shortened(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first `dimensions` of each vector, at length 1 again (Kusupati et al., Matryoshka, NeurIPS 2022)."""
    if dimensions is None:
        return vectors
    short = vectors[:, :dimensions]
    lengths = np.linalg.norm(short, axis=1, keepdims=True)
    return np.asarray(short / np.maximum(lengths, 1e-12), np.float32)
