"""Many clients at once, and what they see: which prompts they send, when text comes back, the figures made of it.

A client is light, since it shares the cores with what it measures: it keeps the bytes and the moment at which they came,
and all reading is done afterwards, when nothing is timed any more.
"""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, TypeVar

import h11

from scripts.bench import words

T = TypeVar("T")
PROMPT_TOKENS, NEW_TOKENS = 64, 64
MIXED_CLIENTS, SHORTEST, LONGEST = 64, 16, 1500  # of --mixed; prompts in tokens
PATIENCE_S = 1200.0  # for a whole load: who takes longer hangs


@dataclass(frozen=True)
class Load:
    """`prompts[client]`: what each client sends, one after another. `warm_up` comes before, the same way, untimed."""

    name: str
    warm_up: Sequence[Sequence[str]]
    prompts: Sequence[Sequence[str]]


class Chunk(NamedTuple):
    """Text that came at `time`, in seconds of time.perf_counter, and the tokens in it."""

    time: float
    tokens: int


class Answer(NamedTuple):
    """`tokens`: of the whole answer, as its server counts them."""

    sent: float
    chunks: Sequence[Chunk]
    tokens: int


def plan(clients: Sequence[int], requests: int, *, mixed: bool, seed: int) -> list[Load]:
    """A load for each number of clients, each of which sends `requests` prompts (a lonely one four times as many).

    No prompt comes twice, so no cache of prompts has a part in it. `mixed` adds MIXED_CLIENTS with prompts of all lengths
    between SHORTEST and LONGEST, the short ones more often, two of them for each client.
    """
    rng = Random(seed)

    def prompts(lengths: Sequence[int]) -> list[str]:
        return [words.prompt(rng, length) for length in lengths]

    loads = []
    for count in clients:
        each = requests * 4 if count == 1 else requests
        loads.append(
            Load(
                str(count),
                [prompts([PROMPT_TOKENS]) for _ in range(count)],
                [prompts([PROMPT_TOKENS] * each) for _ in range(count)],
            )
        )
    if mixed:
        steps = 2 * MIXED_CLIENTS - 1
        lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** (step / steps)) for step in range(steps + 1)]
        rng.shuffle(lengths)
        pairs = [prompts(lengths[2 * client : 2 * client + 2]) for client in range(MIXED_CLIENTS)]
        loads.append(Load("mixed", [prompts([LONGEST])], pairs))
    return loads


async def send_all(prompts: Sequence[Sequence[str]], send: Callable[[str], Awaitable[T]]) -> list[T]:
    """All clients at once, each with its prompts one after another; what `send` returned for each."""

    async def client(own: Sequence[str]) -> list[T]:
        return [await send(prompt) for prompt in own]

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(client(own)) for own in prompts]
    return [result for task in tasks for result in task.result()]


@dataclass(frozen=True)
class Recording:
    """An HTTP answer as it came: the moment of sending, and all bytes, each with the moment they came."""

    sent: float
    pieces: Sequence[tuple[float, bytes]]


@dataclass(frozen=True)
class Client:
    """Sends prompts to /v1/completions. `fields`: what this server wants in a body besides the usual."""

    port: int
    model: str
    fields: Mapping[str, Any]

    async def send(self, prompt: str) -> Recording:
        usual = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = _request(json.dumps({**usual, **self.fields}).encode())
        pieces = []
        sent = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            while data := await reader.read(65536):
                pieces.append((time.perf_counter(), data))
        finally:
            writer.close()
        return Recording(sent, pieces)


def _request(body: bytes) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",  # so the end of the answer is the end of the stream
    )
    return "\r\n".join((*lines, "", "")).encode() + body


def read(recording: Recording) -> Answer:
    """What a recording says. Raises ValueError for an answer that is an error or has no end."""
    try:
        status, events = _events(recording)
    except h11.RemoteProtocolError as error:
        raise ValueError(f"the connection broke off: {error}") from error
    if status != 200:
        raise ValueError(f"HTTP {status}: {b''.join(event for _, event in events).decode()[:500]}")
    chunks, tokens = [], None
    for moment, event in events:
        line = event.removeprefix(b"data:").strip()
        if not line or line == b"[DONE]":
            continue
        body = json.loads(line)
        if "error" in body:
            raise ValueError(f"the answer broke off: {body['error']}")
        if text := "".join(choice["text"] for choice in body["choices"]):
            chunks.append(Chunk(moment, words.count(text)))
        if usage := body.get("usage"):
            tokens = usage["completion_tokens"]
    if tokens is None or not chunks:
        raise ValueError(f"the answer ended early, after {len(chunks)} chunks")
    return Answer(recording.sent, chunks, tokens)


def _events(recording: Recording) -> tuple[int, list[tuple[float, bytes]]]:
    """The status, and the server-sent events, each with the moment at which it was complete."""
    status, held, events = 0, b"", []
    for moment, part in _http(recording):
        if isinstance(part, h11.Response):
            status = part.status_code
        elif isinstance(part, h11.Data):
            *whole, held = (held + bytes(part.data)).split(b"\n\n")
            events += [(moment, event) for event in whole]
    return status, [*events, (math.inf, held)]


def _http(recording: Recording) -> Iterator[tuple[float, Any]]:
    """The parts of the HTTP answer, each with the moment at which it came."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/v1/completions", headers=[("Host", "127.0.0.1")]))
    connection.send(h11.EndOfMessage())
    for moment, data in [*recording.pieces, (math.inf, b"")]:
        connection.receive_data(data)
        while (part := connection.next_event()) is not h11.NEED_DATA:
            yield moment, part
            if isinstance(part, h11.EndOfMessage):
                return


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """The figures of one load: its tokens/s over all clients; times in ms.

    A gap is the time between two chunks of an answer. `token_gap`: a gap divided by the tokens that came at its end.
    """
    began, ended = min(answer.sent for answer in answers), max(answer.chunks[-1].time for answer in answers)
    first = [1000 * (answer.chunks[0].time - answer.sent) for answer in answers]
    pairs = [pair for answer in answers for pair in itertools.pairwise(answer.chunks)]
    gaps = [1000 * (after.time - before.time) for before, after in pairs]
    token_gaps = [gap / max(1, after.tokens) for gap, (_, after) in zip(gaps, pairs, strict=True)]
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / (ended - began),
        "first_p50_ms": percentile(first, 50),
        "first_p99_ms": percentile(first, 99),
        "gap_p50_ms": percentile(gaps, 50),
        "gap_p99_ms": percentile(gaps, 99),
        "token_gap_p50_ms": percentile(token_gaps, 50),
        "token_gap_longest_ms": max(token_gaps, default=math.nan),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else math.nan
