"""The upstream engine: against our own server over a real model, and against servers that fail, written out byte by byte."""

import asyncio
import dataclasses
import json
import pickle
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest
import small_models
from ray.exceptions import RayTaskError
from real_server import running

from plugins.engines import Engine, Torch, Upstream
from plugins.engines.torch import TorchEngine
from plugins.engines.upstream import UpstreamEngine, _backoff, eagerly
from plugins.spec import UserError
from plugins.types import Constraint, Delta, GenerateRequest, Message, ModelSource, RequestError, UnavailableError
from serve import ServeConfig, ServedModel
from serve.app import _deployment, find_adapters
from serve.ingress import api

LENGTH = 4000
CHAT = (Message("user", "hello world"),)
CITY = json.dumps({"type": "object", "properties": {"city": {"enum": ["東京", "Bern"]}}, "required": ["city"]})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    folder = tmp_path_factory.mktemp("models")
    base = small_models.save_model(folder / "base", small_models.llama_config(max_position_embeddings=LENGTH))
    spec = Torch(max_batch=4, max_length=LENGTH, kv_memory="64MiB")
    made = TorchEngine(ModelSource(str(base), dtype="fp32"), spec, cpus=1)
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def url(engine: TorchEngine) -> Iterator[str]:
    with running(api({"tiny": []}, {"tiny": engine.generate})) as address:
        yield f"{address}/v1"


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 60))


@asynccontextmanager
async def upstream(url: str, **options: Any) -> AsyncIterator[UpstreamEngine]:
    engine = UpstreamEngine("tiny", Upstream(url=url, **options))
    yield engine
    await engine.close()


def request(prompt: Any = "hello", **changes: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **({"temperature": 0.0, "max_tokens": 12} | changes))


async def deltas_of(engine: Engine, asked: GenerateRequest) -> list[Delta]:
    found = [delta async for delta in engine.generate(asked)]
    assert all(delta.finish_reason is None for delta in found[:-1])
    return found


async def answer(engine: Engine, asked: GenerateRequest) -> Delta:
    return Delta.joined(await deltas_of(engine, asked))


def both(engine: TorchEngine, url: str, asked: GenerateRequest) -> tuple[Delta, Delta]:
    """The model's own answer, and the one that comes from its server."""

    async def main() -> tuple[Delta, Delta]:
        async with upstream(url) as remote:
            return await answer(engine, asked), await answer(remote, asked)

    return run(main)  # type: ignore[no-any-return]


# A real server


@pytest.mark.parametrize("prompt", ["the quick brown fox", (20, 30, 40), CHAT, "東京 and 🙂"])
def test_answers_counts_and_reasons_are_those_of_the_model(engine: TorchEngine, url: str, prompt: Any) -> None:
    own, remote = both(engine, url, request(prompt, max_tokens=24))
    assert len(own.text) > 5
    assert remote == own


CONSTRAINTS = [
    Constraint("json_schema", CITY, "response_format"),
    Constraint("json_object", "", "response_format"),
    Constraint("regex", "[0-9]{3}", "guided_regex"),
    Constraint("choice", ("yes", "no"), "guided_choice"),
]
CASES: list[dict[str, Any]] = [
    {"temperature": 1.4, "seed": 7},
    {"temperature": 1.4, "seed": 7, "top_p": 0.3},
    {"temperature": 1.4, "seed": 7, "top_k": 3},
    {"temperature": 1.4, "seed": 7, "top_k": 0},
    {"temperature": 1.4, "seed": 7, "min_p": 0.4},
    {"repetition_penalty": 1.9},
    {"frequency_penalty": -2.0},
    {"presence_penalty": -2.0},
    {"logit_bias": {20: 100.0}},
    {"logit_bias": {0: 100.0}},  # the end, at once
    {"logit_bias": {0: 100.0}, "min_tokens": 5},
    {"logit_bias": {0: 100.0}, "ignore_eos": True},
    {"logit_bias": {20: 100.0}, "stop_token_ids": (20,)},
    {"logit_bias": {20: 100.0}, "stop_token_ids": (20,), "include_stop": True},
    {"max_tokens": 3},
    {"echo": True},
    {"echo": True, "max_tokens": 0},
    *({"constraint": constraint, "max_tokens": 200, "temperature": 1.3, "seed": 3} for constraint in CONSTRAINTS),
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_every_parameter_is_heeded(engine: TorchEngine, url: str, changes: dict[str, Any]) -> None:
    own, remote = both(engine, url, request(**changes))
    assert remote == own


def test_a_stop_string_ends_the_answer_and_may_stay_in_it(engine: TorchEngine, url: str) -> None:
    whole, _ = both(engine, url, request())
    for include in (False, True):
        own, remote = both(engine, url, request(stop=(whole.text[3:5], "nowhere"), include_stop=include))
        assert remote.stop_reason == whole.text[3:5]
        assert remote == own


def test_logprobs_are_those_of_the_model(engine: TorchEngine, url: str) -> None:
    for prompt in ("the 東京 fox", CHAT):
        own, remote = both(engine, url, request(prompt, logprobs=3, temperature=1.3, seed=4))
        assert remote.text == own.text
        assert _scores(remote.logprobs) == _scores(own.logprobs)
        assert len(remote.logprobs) == 12
        if prompt != CHAT:  # which has no places on the wire
            assert [token.offset for token in remote.logprobs] == [token.offset for token in own.logprobs]
        assert {len(token.top) for token in both(engine, url, request(prompt, logprobs=0))[1].logprobs} == {0}


ECHOED = [
    (prompt, {"echo": True, **more}) for prompt in ("the 東京 fox", (20, 30, 40)) for more in ({}, {"logprobs": 1})
]


@pytest.mark.parametrize(("prompt", "changes"), [*ECHOED, ("hello", {}), (CHAT, {}), (CHAT, {"logprobs": 2})])
def test_a_prompt_is_scored_as_the_model_does(
    engine: TorchEngine, url: str, prompt: Any, changes: dict[str, Any]
) -> None:
    own, remote = both(engine, url, request(prompt, prompt_logprobs=2, **changes))
    assert (remote.text, remote.completion_tokens) == (own.text, own.completion_tokens)
    assert [token.token for token in remote.prompt_logprobs[1:]] == [token.token for token in own.prompt_logprobs[1:]]
    assert [[top.token for top in token.top] for token in remote.prompt_logprobs] == [
        [top.token for top in token.top] for token in own.prompt_logprobs
    ]
    assert [token.logprob for token in remote.prompt_logprobs] == [token.logprob for token in own.prompt_logprobs]
    assert len(remote.logprobs) == len(own.logprobs)
    if "logprobs" in changes and "echo" in changes:
        assert _places(remote.prompt_logprobs) == _places(own.prompt_logprobs)
        assert _places(remote.logprobs) == _places(own.logprobs)


def _scores(tokens: Any) -> list[Any]:
    return [(token.data, token.logprob, [(top.data, top.logprob) for top in token.top]) for token in tokens]


def _places(tokens: Any) -> list[Any]:
    return [(token.data, token.offset) for token in tokens]


def test_no_parameter_is_forgotten() -> None:
    """Every field of a request has its case above, or is refused below."""
    tried = {name for changes in CASES for name in changes}
    apart = {"prompt", "stop", "logprobs", "prompt_logprobs", "tools", "adapter"}
    assert tried | apart == {field.name for field in dataclasses.fields(GenerateRequest)}


def test_text_comes_as_it_is_made(engine: TorchEngine, url: str) -> None:
    async def main() -> None:
        async with upstream(url) as remote:
            found = await deltas_of(remote, request(CHAT, max_tokens=300))
            whole = await answer(engine, request(CHAT, max_tokens=300))
        assert 0 < len(found[0].text) < len(whole.text) / 2
        assert Delta.joined(found) == whole

    run(main)


def test_answers_side_by_side_are_those_alone(engine: TorchEngine, url: str) -> None:
    async def main() -> None:
        asked = [request(f"number {n}", max_tokens=10 + n) for n in range(12)]
        async with upstream(url) as remote:
            together = await asyncio.gather(*(answer(remote, one) for one in asked))
        assert together == [await answer(engine, one) for one in asked]

    run(main)


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"max_tokens": 2 * LENGTH}, "max_tokens", str(LENGTH)),
        ({"logit_bias": {99999: 1.0}}, "logit_bias", "0 to 383"),
        ({"min_tokens": 50}, "min_tokens", "at most max_tokens"),
        ({"constraint": Constraint("regex", "a(b", "guided_regex")}, "guided_regex", "regex"),
        ({"constraint": Constraint("json_schema", "{", "guided_json")}, "guided_json", "must be JSON"),
        ({"prompt": CHAT, "tools": ({"type": "function", "function": {"name": "f"}},)}, "tools", "takes no tools"),
        # What the protocol cannot say is refused here.
        ({"tools": ({"type": "function", "function": {"name": "f"}},)}, "tools", "messages"),
        ({"max_tokens": None}, "max_tokens", "needed"),
        ({"prompt": CHAT, "echo": True}, "echo", "messages"),
        ({"adapter": "run"}, "model", "'run'"),
    ],
)
def test_a_request_that_cannot_be_served_is_told_why(url: str, changes: dict[str, Any], param: str, said: str) -> None:
    async def main() -> None:
        async with upstream(url) as remote:
            with pytest.raises(RequestError, match=re.escape(said)) as caught:
                await answer(remote, request(**changes))
            assert caught.value.param == param

    run(main)


def test_closing_the_iterator_ends_the_answer_on_the_server(url: str) -> None:
    """All 4 places of its batch are taken by endless answers; another is served once they are let go."""

    async def main() -> None:
        async with upstream(url) as remote:
            endless = request(CHAT, max_tokens=LENGTH - 100, ignore_eos=True)
            streams = [remote.generate(endless) for _ in range(4)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            waiting = asyncio.ensure_future(answer(remote, request(CHAT, max_tokens=2)))
            assert not (await asyncio.wait([waiting], timeout=0.5))[0]
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]
            assert (await asyncio.wait_for(waiting, 10)).completion_tokens == 2

    run(main)


def test_behind_our_ingress_it_answers_as_the_model_does(engine: TorchEngine, url: str) -> None:
    """What a benchmark of language models asks for, whole: token-id prompts, echo, logprobs, no answer."""
    remote = UpstreamEngine("tiny", Upstream(url=url))
    asked = {"prompt": [[20, 30, 40], [70, 80]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    with running(api({"tiny": [], "far": []}, {"tiny": engine.generate, "far": remote.generate})) as address:
        front = f"{address}/v1"

        def ask(model: str) -> Any:
            found = httpx.post(f"{front}/completions", json={"model": model, **asked}, timeout=30).json()
            return [found["usage"], *((choice["text"], choice["logprobs"]) for choice in found["choices"])]

        far, tiny = ask("far"), ask("tiny")
        assert far[0] == tiny[0]
        for (said, scores), (own, wanted) in zip(far[1:], tiny[1:], strict=True):
            assert (said, scores["tokens"], scores["text_offset"]) == (own, wanted["tokens"], wanted["text_offset"])
            assert scores["token_logprobs"] == pytest.approx(wanted["token_logprobs"], abs=1e-4)
            for top, best in zip(scores["top_logprobs"][1:], wanted["top_logprobs"][1:], strict=True):
                assert top == pytest.approx(best, abs=1e-4)
        mistake = httpx.post(f"{front}/completions", json={"model": "far", **asked, "max_tokens": 2 * LENGTH})
        assert (mistake.status_code, mistake.json()["error"]["param"]) == (400, "max_tokens")


# Servers that are slow, odd, or fail

Turn = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Scripted:
    """A server that gives each request the next of `turns`, and the last of them to all that follow."""

    def __init__(self, turns: tuple[Turn, ...]) -> None:
        self.turns, self.heads, self.bodies = list(turns), [], []  # type: ignore[var-annotated]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        assert length
        self.heads.append(head)
        self.bodies.append(json.loads(await reader.readexactly(int(length[1]))))
        turn = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        await turn(reader, writer)
        writer.close()


@asynccontextmanager
async def scripted(*turns: Turn, **options: Any) -> AsyncIterator[tuple[UpstreamEngine, Scripted]]:
    script = Scripted(turns)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, upstream(f"http://{host}:{port}/v1", **options) as engine:
        yield engine, script


def reply(status: int, body: Any, **headers: str) -> Turn:
    async def turn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)

    return turn


def stream(*pieces: bytes | asyncio.Event, whole: bool = True) -> Turn:
    """Pieces of a stream as they are; where an event stands, it is waited for. Not `whole`: then the connection breaks."""

    async def turn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
            else:
                await piece.wait()
        if whole:
            writer.write(b"0\r\n\r\n")

    return turn


async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def text(said: str, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "text": said, **more}])


USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8})
END = text("", finish_reason="stop") + USAGE + b"data: [DONE]\n\n"
GOOD = stream(text("all is well"), END)
ERROR = {"error": {"message": "out of\nmemory", "type": "server_error", "param": None, "code": 500}}


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.engines.upstream.FIRST_WAIT_S", 0.01)


def test_only_what_was_given_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_KEY", " sk-1234\n")
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"place": "sea"}}}
    tool = {"type": "function", "function": {"name": "weather"}}
    messages = (*CHAT, Message("assistant", "", {"tool_calls": [call]}), Message("tool", "sun", {"tool_call_id": "1"}))

    async def main() -> None:
        async with scripted(GOOD, api_key_env="THEIR_KEY") as (engine, script):
            await answer(engine, GenerateRequest(prompt=CHAT))
            await answer(engine, GenerateRequest(prompt=messages, tools=(tool,), logprobs=2))
        always = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
        assert script.bodies[0] == always | {"messages": [{"role": "user", "content": "hello world"}]}
        assert script.heads[0].startswith("POST /v1/chat/completions ")
        assert "authorization: bearer sk-1234\r\n" in script.heads[0].lower()
        sent = script.bodies[1]
        assert sent["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"place": "sea"}'}
        assert sent["messages"][2] == {"role": "tool", "content": "sun", "tool_call_id": "1"}
        assert (sent["tools"], sent["logprobs"], sent["top_logprobs"]) == ([tool], True, 2)

    run(main)


def test_text_is_whole_however_its_bytes_come() -> None:
    said = ["東京 ", "\u2028 and \x85", " 🙂", "\n\ndata: [DONE]"]
    raw = b": ping\r\n\r\n" + b"".join(map(text, said)) + END.replace(b"\n\n", b"\r\n\r\n").replace(b"data: ", b"data:")

    async def main() -> None:
        for size in (1, 7, len(raw)):
            pieces = [raw[start : start + size] for start in range(0, len(raw), size)]
            async with scripted(stream(*pieces)) as (engine, _):
                found = await answer(engine, request())
            assert found == Delta("".join(said), 3, 5, "stop")

    run(main)


def test_the_first_text_comes_at_once() -> None:
    async def main() -> None:
        go_on = asyncio.Event()
        async with scripted(stream(text("first"), go_on, text(" second"), END)) as (engine, _):
            deltas = engine.generate(request())
            assert (await anext(deltas)).text == "first"
            go_on.set()
            assert "".join([delta.text async for delta in deltas]) == " second"

    run(main)


def test_a_slow_consumer_gets_longer_pieces() -> None:
    go_on, read = asyncio.Event(), asyncio.Event()

    async def words() -> Any:
        yield Delta("first", 1, 1)
        await go_on.wait()
        for count in range(2, 50):
            yield Delta(" more", 1, count)
        read.set()

    async def main() -> None:
        pieces = eagerly(words())
        assert (await anext(pieces)).text == "first"
        go_on.set()
        await read.wait()
        assert await anext(pieces) == Delta(" more" * 48, 1, 49)

    run(main)


@pytest.mark.parametrize(
    "failure",
    [
        reply(500, ERROR),
        reply(503, "<html>busy</html>"),
        reply(429, ERROR),
        break_off,
        stream(whole=False),
        stream(event(**ERROR)),
    ],
)
def test_what_may_go_better_is_tried_again(failure: Turn) -> None:
    async def main() -> None:
        async with scripted(failure, failure, GOOD) as (engine, script):
            assert (await answer(engine, request())).text == "all is well"
        assert len(script.bodies) == 3
        assert script.bodies[0] == script.bodies[2]
        async with scripted(failure, retries=1) as (engine, script):
            with pytest.raises(UnavailableError, match=r"http://127.0.0.1:\d+/v1 ") as caught:
                await answer(engine, request())
        assert caught.value.retry_after_s is not None
        assert len(script.bodies) == 2

    run(main)


@pytest.mark.slow
def test_a_server_says_when_to_come_back() -> None:
    async def main() -> None:
        for date in (False, True):
            begun = time.monotonic()
            wanted = formatdate(time.time() + 2, usegmt=True) if date else "1"  # a date has whole seconds
            async with scripted(reply(429, ERROR, Retry_After=wanted), GOOD) as (engine, _):
                assert (await answer(engine, request())).text == "all is well"
            assert 0.9 < time.monotonic() - begun < 5
        async with scripted(reply(503, ERROR, Retry_After="3600"), GOOD) as (engine, script):
            with pytest.raises(UnavailableError) as caught:
                await answer(engine, request())
        assert (caught.value.retry_after_s, len(script.bodies)) == (3600, 1)

    run(main)


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.engines.upstream.FIRST_WAIT_S", 0.5)
    for tries, most in ((1, 0.5), (2, 1.0), (3, 2.0), (9, 8.0), (100, 8.0)):
        waits = [_backoff(tries) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most


@pytest.mark.parametrize("end", [stream(text("once"), whole=False), stream(text("once"), event(**ERROR))])
def test_what_has_been_said_is_not_asked_for_again(end: Turn) -> None:
    async def main() -> None:
        async with scripted(end, GOOD) as (engine, script):
            deltas = engine.generate(request())
            assert (await anext(deltas)).text == "once"
            with pytest.raises(UnavailableError, match=r"broke off|out of memory"):
                await anext(deltas)
        assert len(script.bodies) == 1

    run(main)


def chat(**delta: Any) -> Turn:
    return stream(event(choices=[{"index": 0, "delta": delta}]), END)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (reply(401, {"error": {"message": "wrong key sk-1234"}}), r"/v1 refuses requests without a key \(401\)$"),
        (reply(404, {"error": {"message": "no such model"}}), "answered 404 for model 'tiny': no such model"),
        (reply(405, {"detail": "Method Not Allowed"}), "answered 405 for model 'tiny': Method Not Allowed"),
        (reply(200, "<html>welcome</html>"), "not JSON: b'<html>welcome"),
        (reply(200, [1]), "no answer of OpenAI's"),
        (reply(200, {"choices": [{"index": 0, "message": {"content": [1]}}]}), "no answer of OpenAI's"),
        (stream(b"data: {half\n\n"), "not JSON: b'{half'"),
        (stream(event(choices=[{"text": "a", "logprobs": {"tokens": []}}])), "no answer of OpenAI's"),
        (stream(text("a")), "ended an answer without a reason"),
        (stream(text("a", finish_reason="stop")), "stream_options.include_usage"),
        (stream(text("a", finish_reason="content_filter"), USAGE), "because of 'content_filter'"),
        (chat(tool_calls=[{"function": {"name": "weather"}}]), "sends tool_calls beside the text"),
        (chat(reasoning_content="hm"), "sends reasoning_content beside the text"),
    ],
)
def test_what_no_try_can_mend_is_said_at_once(turn: Turn, said: str) -> None:
    async def main() -> None:
        async with scripted(turn) as (engine, script):
            with pytest.raises(UnavailableError, match=said) as caught:
                await answer(engine, request())
        assert (caught.value.retry_after_s, len(script.bodies)) == (None, 1)

    run(main)


@pytest.mark.parametrize(
    ("turn", "said", "param"),
    [
        (reply(400, {"error": {"message": "too long", "param": "messages"}}), "too long", "messages"),
        (reply(400, {"object": "error", "message": "too long", "param": None}), "too long", None),
        (reply(400, {"error": "too long"}), "too long", None),
        (reply(422, {"detail": "too long"}), "too long", None),
        (reply(413, "too long"), "too long", None),
        (stream(event(error={"message": "too long", "param": "prompt", "code": 400})), "too long", "prompt"),
    ],
)
def test_a_refusal_is_passed_on(turn: Turn, said: str, param: str | None) -> None:
    async def main() -> None:
        async with scripted(turn) as (engine, _):
            with pytest.raises(RequestError) as caught:
                await answer(engine, request())
        assert (caught.value.message, caught.value.param) == (said, param)

    run(main)


def test_after_failures_in_a_row_it_is_left_alone_and_then_tried_once() -> None:
    async def main() -> None:
        bad, asked, gate = reply(500, ERROR), asyncio.Event(), asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.set()
            await stream(gate, text("back"), END)(reader, writer)

        async with scripted(bad, bad, bad, slow, GOOD, retries=1, breaker_failures=3, breaker_pause_s=0.3) as (
            engine,
            script,
        ):

            async def refused() -> UnavailableError:
                with pytest.raises(UnavailableError) as caught:
                    await answer(engine, request())
                return caught.value

            assert "answered 500" in (await refused()).message
            for _ in range(3):
                error = await refused()
                assert "failed 3 times in a row, lastly: http" in error.message
                assert 0 < (error.retry_after_s or 0) <= 0.3
            assert len(script.bodies) == 3
            engine.check()  # a new replica would not help
            await asyncio.sleep(error.retry_after_s or 0)
            probe = asyncio.ensure_future(answer(engine, request()))
            await asked.wait()
            await refused()  # one tries, the others do not
            gate.set()
            assert (await probe).text == "back"
            assert {(await answer(engine, request())).text for _ in range(5)} == {"all is well"}

    run(main)


def test_a_try_that_fails_leaves_it_alone_again() -> None:
    async def main() -> None:
        options = {"retries": 0, "breaker_failures": 1, "breaker_pause_s": 0.1}
        async with scripted(reply(500, ERROR), **options) as (engine, script):
            for tried in (1, 2, 3):
                with pytest.raises(UnavailableError, match="answered 500"):
                    await answer(engine, request())
                with pytest.raises(UnavailableError, match="in a row") as caught:
                    await answer(engine, request())
                assert len(script.bodies) == tried
                await asyncio.sleep(caught.value.retry_after_s or 0)

    run(main)


def test_refusals_and_full_queues_are_no_failures() -> None:
    async def main() -> None:
        bad, alive = reply(500, ERROR), (reply(400, ERROR), reply(404, ERROR), reply(429, ERROR))
        turns = [turn for one in alive for turn in (bad, one)]
        async with scripted(*turns, bad, GOOD, retries=0, breaker_failures=2, breaker_pause_s=60) as (engine, script):
            for _ in range(7):
                with pytest.raises((UnavailableError, RequestError)):
                    await answer(engine, request())
            assert (await answer(engine, request())).text == "all is well"
        assert len(script.bodies) == 8

    run(main)


@pytest.mark.parametrize("before", [(), (text("so far"),)])
def test_silence_is_waited_for_only_so_long(before: tuple[bytes, ...]) -> None:
    async def main() -> None:
        never = asyncio.Event()
        async with scripted(stream(*before, never), read_timeout_s=0.2) as (engine, script):
            deltas = engine.generate(request())
            if before:
                assert (await anext(deltas)).text == "so far"
            with pytest.raises(UnavailableError, match=r"silent for 0\.2 s"):
                await anext(deltas)
            assert len(script.bodies) == 1
            never.set()

    run(main)


def test_a_server_that_is_not_there_is_named() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and not listened to
            async with upstream(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=2) as engine:
                with pytest.raises(UnavailableError, match=r"http://127.0.0.1:\d+/v1 cannot be reached"):
                    await answer(engine, request())
                engine.check()

    run(main)


@pytest.mark.parametrize("how", ["close", "cancel", "engine"])
@pytest.mark.parametrize("before", [(), (text("so far"),)])
def test_a_consumer_that_goes_away_is_noticed_by_the_server(before: tuple[bytes, ...], how: str) -> None:
    async def main() -> None:
        asked, gone = asyncio.Event(), asyncio.Event()

        async def turn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.set()
            forever = asyncio.ensure_future(stream(*before, asyncio.Event())(reader, writer))
            with suppress(ConnectionResetError):  # a reset is an end too
                assert await reader.read() == b""
            gone.set()
            forever.cancel()

        async with scripted(turn, retries=0) as (engine, _):
            deltas = engine.generate(request())
            if before:
                await anext(deltas)
            waiting = asyncio.ensure_future(anext(deltas))
            await asked.wait()
            if how == "engine":
                await engine.close()
                with pytest.raises(UnavailableError):
                    await waiting
            else:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                if how == "close":
                    await deltas.aclose()  # type: ignore[attr-defined]
            await asyncio.wait_for(gone.wait(), 5)

    run(main)


def test_our_ingress_says_what_is_wrong_with_an_upstream() -> None:
    async def main() -> None:
        bad, lost = reply(503, ERROR, Retry_After="7"), reply(404, {"error": {"message": "no such model"}})
        async with scripted(bad, bad, bad, lost, stream(text("so far"), whole=False), retries=0) as (engine, _):
            app = api({"far": []}, {"far": engine.generate})
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here/v1") as client:

                async def ask(**more: Any) -> httpx.Response:
                    return await client.post("/completions", json={"model": "far", "prompt": "hello", **more})

                for more in ({}, {"n": 2}):
                    full = await ask(**more)
                    assert (full.status_code, full.headers["Retry-After"]) == (503, "7")
                    assert "answered 503" in full.json()["error"]["message"]
                missing = await ask(stream=True)
                assert (missing.status_code, missing.json()["error"]["code"]) == (502, "upstream_error")
                assert "no such model" in missing.json()["error"]["message"]
                events = (await ask(stream=True)).text.split("\n\n")
                assert json.loads(events[0][6:])["choices"][0]["text"] == "so far"
                assert re.search(r"the answer broke off: http://127.0.0.1:\d+/v1 broke off", events[1])

    run(main)


def test_the_error_keeps_its_words_on_the_way_through_ray() -> None:
    error = pickle.loads(pickle.dumps(UnavailableError("far away", 2.5)))
    assert (str(error), error.retry_after_s) == ("far away", 2.5)

    async def generate(request: GenerateRequest) -> AsyncIterator[Delta]:
        raise RayTaskError("generate", "Traceback ...", error).as_instanceof_cause()
        yield

    async def main() -> None:
        transport = httpx.ASGITransport(api({"far": []}, {"far": generate}))
        async with httpx.AsyncClient(transport=transport, base_url="http://here/v1") as client:
            found = await client.post("/completions", json={"model": "far", "prompt": "hello"})
        assert (found.status_code, found.headers["Retry-After"]) == (503, "3")
        assert found.json()["error"]["message"] == "far away"

    run(main)


# The config


@pytest.mark.parametrize(
    "wrong",
    ["", "host:8001/v1", "ftp://host/v1", "http://me:secret@host/v1", "http://host:port/v1", "http://host/v1?a=1"],
)
def test_a_url_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"Upstream\.url = .*http://host:8001/v1"):
        Upstream(url=wrong)


@pytest.mark.parametrize("right", ["http://host", "http://[::1]:8001/v1/", "https://api.example.com/openai/v1"])
def test_a_url_is_taken(right: str) -> None:
    asyncio.run(UpstreamEngine("tiny", Upstream(url=right)).close())


@pytest.mark.parametrize("key", [None, "", "two words", "schlüssel"])
def test_a_key_that_is_not_there_is_missed_at_the_start(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THEIR_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("THEIR_KEY", key)
    with pytest.raises(UserError, match="api_key_env = 'THEIR_KEY': no key"):
        Upstream(url="http://host/v1", api_key_env="THEIR_KEY").start(ModelSource("tiny"), cpus=1)


def test_a_served_model_needs_no_files_here(tmp_path: Path) -> None:
    engine = Upstream(url="http://host/v1")
    for name in ("org/model", "team/org/model", "/models/llama"):
        model = ServedModel(id="far", source=ModelSource(name), engine=engine)
        assert find_adapters(ServeConfig(models=(model,)), tmp_path) == {"far": {}}
        assert _deployment(model, {})._bound_deployment.init_args[0].source.path == name
    with pytest.raises(UserError, match=r"ServedModel\.adapters"):
        ServedModel(id="far", source=ModelSource("tiny"), engine=engine, adapters=("outputs/*",))
    with pytest.raises(UserError, match=r"ServedModel\.source"):
        ServedModel(id="far", source=ModelSource("tiny", dtype="fp32"), engine=engine)


def test_adapters_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with upstream("http://host/v1") as engine:
            with pytest.raises(UserError, match="http://host/v1 has the model"):
                await engine.load_adapter("run", tmp_path)
            with pytest.raises(UserError, match="no adapter 'run'"):
                await engine.unload_adapter("run")

    run(main)
