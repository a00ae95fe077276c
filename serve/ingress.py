"""The routing ingress: HTTP in, handles out. Server-sent events live here and only here."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.exceptions import HTTPException

from plugins.engines import Embeddings
from plugins.types import Delta, GenerateRequest, RequestError, UnavailableError
from serve.protocols import embeddings, openai
from serve.routing import UnknownModelError, find_route, model_routes

Generate = Callable[[GenerateRequest], AsyncIterator[Delta]]
Embed = Callable[[embeddings.Texts, int | None], Awaitable[Embeddings]]


class Ingress:
    """The deployment: it turns handles into callables and lets Serve run the app below with them."""

    def __init__(self, served: Mapping[str, Sequence[str]], handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        """`served`: base id -> the names of its runs. `handles`: base id -> its deployment; those not served embed."""
        # By gRPC: through Ray's object store a message costs twice as much.
        models = {base: _generate(handles[base].options(stream=True, _by_reference=False)) for base in served}
        embedders = {base: _embed(handle) for base, handle in handles.items() if base not in served}
        self.api = api(served, models, embedders)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.api


def _generate(handle: DeploymentHandle[Any]) -> Generate:
    async def generate(request: GenerateRequest) -> AsyncIterator[Delta]:
        response = cast(DeploymentResponseGenerator[Delta], handle.generate.remote(request))
        finished = False
        try:
            async for delta in response:
                yield delta
            finished = True
        finally:
            if not finished:
                response.cancel()  # the client went away, or another choice failed: the engine stops too

    return generate


def _embed(handle: DeploymentHandle[Any]) -> Embed:
    async def embed(texts: embeddings.Texts, dimensions: int | None) -> Embeddings:
        return cast(Embeddings, await handle.embed.remote(texts, dimensions))

    return embed


def api(
    served: Mapping[str, Sequence[str]], models: Mapping[str, Generate], embedders: Mapping[str, Embed] | None = None
) -> FastAPI:
    """The HTTP endpoints over `models`, base id -> what generates, and `embedders`, id -> what embeds. It needs no Ray."""
    app = FastAPI(title="Manta", docs_url="/docs", redoc_url=None)
    embedders = embedders or {}
    routes = model_routes(served, embedders)
    created = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(routes)}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return openai.model_list(routes, created)

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        find_route(model, routes)
        rows: list[dict[str, Any]] = openai.model_list([model], created)["data"]
        return rows[0]

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: openai.ChatBody) -> JSONResponse | StreamingResponse:
        return await respond(body)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: openai.CompletionBody) -> JSONResponse | StreamingResponse:
        return await respond(body)

    @app.post("/v1/embeddings", response_model=None)
    async def embed(body: embeddings.EmbeddingBody) -> Response:
        route = find_route(body.model, routes, "embeddings")
        texts = body.texts()
        made = await embedders[route.base](texts, body.dimensions)
        # In a thread: a million numbers as JSON would hold up everyone else's stream.
        return Response(await asyncio.to_thread(embeddings.answer, body, made), media_type="application/json")

    async def respond(body: openai.ChatBody | openai.CompletionBody) -> JSONResponse | StreamingResponse:
        route = find_route(body.model, routes, "text")
        body.refuse_unsupported()
        choices = [models[route.base](request) for request in body.generate_requests(route.adapter)]
        answer = body.answer()
        if not body.stream:
            return JSONResponse(answer.whole(await _all(choices)))
        deltas = merged(choices)
        # The first delta before the status: a request that the engine refuses gets an error, not a broken stream.
        first = await anext(deltas)
        events = _events(answer, first, deltas, body.stream_options is not None and body.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    _explain_errors(app)
    return app


async def _all(choices: Sequence[AsyncIterator[Delta]]) -> list[Delta]:
    """All that each choice says, made side by side. If one fails, the others end."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_whole(deltas)) for deltas in choices]
    return [task.result() for task in tasks]


async def _whole(deltas: AsyncIterator[Delta]) -> Delta:
    async with aclosing(deltas):  # type: ignore[type-var]  # every one of them is an async generator
        return Delta.joined(
            [delta async for delta in deltas]
        )  # one at least: an engine ends with a Delta that says why


async def merged(choices: Sequence[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """(choice, Delta) in the order in which they come."""
    inbox: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()

    async def forward(index: int, deltas: AsyncIterator[Delta]) -> None:
        async with aclosing(deltas):  # type: ignore[type-var]
            async for delta in deltas:
                inbox.put_nowait((index, delta))

    if len(choices) == 1:  # the usual case needs no queue
        async with aclosing(choices[0]) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                yield 0, delta
        return
    tasks = [asyncio.create_task(forward(index, deltas)) for index, deltas in enumerate(choices)]
    try:
        unfinished = len(tasks)
        while unfinished:
            arrival = asyncio.create_task(inbox.get())
            while not arrival.done():
                for task in tasks:  # before waiting: what has failed already wakes nobody
                    if task.done():
                        task.result()  # a choice that failed ends the answer
                await asyncio.wait([arrival, *(t for t in tasks if not t.done())], return_when=asyncio.FIRST_COMPLETED)
            index, delta = arrival.result()
            unfinished -= delta.finish_reason is not None
            yield index, delta
    finally:
        arrival.cancel()
        for task in tasks:
            task.cancel()


async def _events(
    answer: openai.Answer, first: tuple[int, Delta], rest: AsyncIterator[tuple[int, Delta]], include_usage: bool
) -> AsyncIterator[str]:
    opened: set[int] = set()
    lasts: dict[int, Delta] = {}

    def chunks(index: int, delta: Delta) -> str:
        opening = None if index in opened else answer.opening(index)
        opened.add(index)
        lasts[index] = delta
        return (_event(opening) if opening else "") + _event(answer.chunk(index, delta))

    async with aclosing(rest):  # type: ignore[type-var]
        yield chunks(*first)
        try:
            async for index, delta in rest:
                yield chunks(index, delta)
        except Exception as error:
            # The status is sent; the client learns it from the stream, and the log keeps the traceback.
            why = error.message if isinstance(error, UnavailableError) else type(error).__name__
            yield _event(openai.error(f"the answer broke off: {why}", kind="server_error"))
            raise
    if include_usage:
        yield _event(answer.closing([lasts[index] for index in sorted(lasts)]))
    yield "data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _explain_errors(app: FastAPI) -> None:
    """Every error in OpenAI's envelope."""

    def reply(status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> JSONResponse:
        return JSONResponse(openai.error(message, kind=kind, param=param, code=code), status)

    def unknown_model(request: Request, error: UnknownModelError) -> JSONResponse:
        return reply(404, str(error), "invalid_request_error", "model", "model_not_found")

    def refused(request: Request, error: RequestError) -> JSONResponse:
        return reply(400, error.message, "invalid_request_error", error.param)

    def several(request: Request, error: ExceptionGroup[Exception]) -> JSONResponse | Coroutine[Any, Any, JSONResponse]:
        first = error.exceptions[0]
        if isinstance(first, RequestError):
            return refused(request, first)
        if isinstance(first, UnavailableError):
            return unavailable(request, first)
        raise first

    def unavailable(request: Request, error: UnavailableError) -> JSONResponse:
        if error.retry_after_s is None:
            return reply(502, error.message, "server_error", code="upstream_error")
        response = reply(503, error.message, "server_error", code="unavailable")
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        return response

    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"] if part != "body")
        return reply(
            400, f"{field}: {problem['msg']}" if field else problem["msg"], "invalid_request_error", field or None
        )

    def full(request: Request, error: BackPressureError) -> JSONResponse:
        return reply(429, "too many requests are waiting; try again soon", "rate_limit_error", code="overloaded")

    def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return reply(error.status_code, message, "invalid_request_error")

    def broken(request: Request, error: Exception) -> JSONResponse:
        return reply(500, f"the server failed: {type(error).__name__}", "server_error")

    handlers: dict[type[Exception], Callable[..., Any]] = {
        UnknownModelError: unknown_model,
        RequestError: refused,
        UnavailableError: unavailable,
        ExceptionGroup: several,
        RequestValidationError: malformed,
        BackPressureError: full,
        HTTPException: http,
        Exception: broken,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)
