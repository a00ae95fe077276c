"""The upstream engine: another server that speaks OpenAI's protocol, behind our own ingress.

What goes over the wire is openai_wire.py's business; here a server may be slow, full, gone for a while, or break off.
"""

import asyncio
import itertools
import json
import logging
import os
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from plugins.engines import Upstream
from plugins.engines.openai_wire import CONSTRAINTS, Answer, question
from plugins.spec import UserError
from plugins.types import Delta, GenerateRequest, RequestError, UnavailableError

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = (
    0.5,
    8.0,
)  # before the second try, and at most: longer than that is for the client to decide


class UpstreamEngine:
    """An Engine, see plugins.engines, whose model is on another server, and is called `model` there.

    Text and counts are the server's. Before the last Delta the counts are 0, unless the server says them earlier.
    """

    def __init__(self, model: str, options: Upstream) -> None:
        self._model, self._options, self._url = model, options, options.url.rstrip("/")
        self._breaker = Breaker(self._url, options.breaker_failures, options.breaker_pause_s)
        self._client = httpx.AsyncClient(
            base_url=self._url,
            headers=_key(options.api_key_env),
            timeout=httpx.Timeout(options.read_timeout_s, connect=options.connect_timeout_s),
            limits=httpx.Limits(),  # none: how many requests there are at once is not decided here
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.adapter is not None:
            raise RequestError(f"there is no adapter {request.adapter!r}: {self._url} has the model", "model")
        path, body = question(request, self._model)
        async with aclosing(eagerly(self._answer(request, path, body))) as deltas:
            async for delta in deltas:
                yield delta

    async def load_adapter(self, name: str, run: Path) -> None:
        raise UserError(f"run {run}: {self._url} has the model, and takes no adapters from here")

    async def unload_adapter(self, name: str) -> None:
        raise UserError(f"there is no adapter {name!r}: {self._url} has the model")

    def check(self) -> None:
        """Nothing: where the server is gone, a new replica would not find it either."""

    async def close(self) -> None:
        await self._client.aclose()

    async def _answer(self, request: GenerateRequest, path: str, body: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        """Ask, and ask again where that may help and nothing has been said yet."""
        for tries in itertools.count(1):
            self._breaker.check()
            begun = False
            try:
                async with aclosing(self._ask(request, path, body)) as deltas:
                    async for delta in deltas:
                        if not begun:
                            self._breaker.worked()
                        begun = True
                        yield delta
                return
            except UnavailableError as error:
                if begun or tries > self._options.retries or error.retry_after_s is None:
                    raise
                wait = max(error.retry_after_s, _backoff(tries))
                if wait > LONGEST_WAIT_S:
                    raise
                log.warning("%s; asking again in %.1f s", error, wait)
            await asyncio.sleep(wait)

    async def _ask(self, request: GenerateRequest, path: str, body: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        """Ask once. Raises UnavailableError; its retry_after_s is 0 where another try may help at once."""
        answer = Answer(request, self._url)
        try:
            async with self._client.stream("POST", path, json=body) as response, aclosing(_events(response)) as events:
                if response.status_code != 200:
                    raise self._refusal(request, response.status_code, await response.aread(), response.headers)
                async for data in events:
                    chunk = self._decoded(data)
                    if chunk.get("error"):  # the status had been sent
                        raise self._refusal(request, _code(chunk["error"]), data, response.headers)
                    if delta := answer.take(chunk):
                        yield delta
        except httpx.RequestError as error:
            lost = self._lost(error)
            self._breaker.failed(lost.message)
            raise lost from error
        yield answer.end()

    def _decoded(self, data: bytes) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise UnavailableError(f"{self._url} sent what is not JSON: {data[:200]!r}") from error
        if not isinstance(chunk, dict):
            raise UnavailableError(f"{self._url} sent what is no answer of OpenAI's: {data[:200]!r}")
        return chunk

    def _refusal(
        self, request: GenerateRequest, status: int, data: bytes, headers: httpx.Headers
    ) -> RequestError | UnavailableError:
        """Why there is no answer, from an error's status and body."""
        message, param = _complaint(data)
        said = f"{self._url} answered {status} for model {self._model!r}: {message}"
        if status >= 500:
            self._breaker.failed(said)
            return UnavailableError(said, _retry_after(headers))
        self._breaker.worked()
        if status == 429:
            return UnavailableError(said, _retry_after(headers))
        if status in (400, 413, 422):
            if request.constraint and param in CONSTRAINTS:
                param = request.constraint.field
            return RequestError(message, param)
        if status in (401, 403):  # in our own words: a server's may quote the key
            key = f"the key in {self._options.api_key_env}" if self._options.api_key_env else "requests without a key"
            return UnavailableError(f"{self._url} refuses {key} ({status})")
        return UnavailableError(said)

    def _lost(self, error: httpx.RequestError) -> UnavailableError:
        """Why the connection is of no use any more."""
        why = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return UnavailableError(f"{self._url} cannot be reached ({why})", 0)
        if isinstance(error, httpx.TimeoutException):
            # Not at once again: what takes so long would be asked of it twice.
            return UnavailableError(f"{self._url} has been silent for {self._options.read_timeout_s:g} s")
        return UnavailableError(f"{self._url} broke off ({why})", 0)


class Breaker:
    """After `most` failures in a row, `server` is left alone for `pause_s`; then one request finds out how it is."""

    def __init__(self, server: str, most: int, pause_s: float) -> None:
        self._server, self._most, self._pause_s = server, most, pause_s
        self._failures, self._why = 0, ""
        self._until = 0.0  # no request before that, where there were too many failures; in seconds of time.monotonic

    def check(self) -> None:
        """Raise UnavailableError while requests are not to be sent."""
        if self._failures < self._most:
            return
        left = self._until - time.monotonic()
        if left > 0:
            raise UnavailableError(f"{self._server} failed {self._failures} times in a row, lastly: {self._why}", left)
        self._until = time.monotonic() + self._pause_s  # this one goes; the others wait for what becomes of it

    def worked(self) -> None:
        self._failures = 0

    def failed(self, why: str) -> None:
        self._failures, self._why = self._failures + 1, why
        self._until = time.monotonic() + self._pause_s


async def eagerly(deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """The same, read as they come: what has come since the last time is one Delta, so a slow consumer gets longer ones."""
    inbox: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def read() -> None:
        async with aclosing(deltas):
            async for delta in deltas:
                inbox.put_nowait(delta)

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: inbox.put_nowait(None))
    try:
        open_ = True
        while open_:
            arrived = [await inbox.get()]
            while not inbox.empty():
                arrived.append(inbox.get_nowait())
            open_ = arrived[-1] is not None
            if news := [delta for delta in arrived if delta is not None]:
                yield Delta.joined(news)
        await reader  # for its error
    finally:
        reader.cancel()
        # Unlike gather, wait hands on no second cancellation, which would keep the reader from closing its connection.
        await asyncio.wait([reader])


def _key(variable: str | None) -> dict[str, str]:
    """The header with the key that is in the environment under `variable`."""
    if variable is None:
        return {}
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(
            f"Upstream.api_key_env = {variable!r}: no key in that environment variable, where the replica runs"
        )
    return {"Authorization": f"Bearer {key}"}


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event; the whole body where there are none."""
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        yield await response.aread()
        return
    rest = b""
    async for piece in response.aiter_bytes():
        # Not httpx's lines, which end at U+2028 too: JSON may have it in a text.
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield data


def _complaint(data: bytes) -> tuple[str, str | None]:
    """What the body of an error says, and the field at fault."""
    try:
        found = json.loads(data)
    except ValueError:
        return _line(data.decode(errors="replace")[:300]), None
    error = found.get("error", found) if isinstance(found, dict) else found
    if not isinstance(error, dict):
        return _line(error), None
    param = error.get("param")
    said = error.get("message") or error.get("detail") or error
    return _line(said), param if isinstance(param, str) else None


def _line(said: object) -> str:
    return " ".join(str(said).split())


def _code(error: Any) -> int:
    """The status that an error in a stream would have had."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds that the server asks us to wait, which it may write as a date; 0 where it does not say."""
    wanted = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", wanted):
        return float(wanted)
    try:
        return max(0.0, parsedate_to_datetime(wanted).timestamp() - time.time())
    except ValueError:
        return 0.0


def _backoff(tries: int) -> float:
    """Seconds to wait after so many tries: twice as long each time, and not all clients at once."""
    return float(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.5, 1))
