"""The endpoints over a real engine and a real HTTP server, asked by real clients. No cluster."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import openai
import pytest
import uvicorn
from langchain_openai import ChatOpenAI
from small_models import llama_config, save_lora_run, save_model

from plugins.engines import Engine, Torch
from plugins.types import Delta, GenerateRequest, ModelSource
from serve.ingress import api, merged
from serve.routing import UnknownModelError, find_route, model_routes

LENGTH = 20_000
QUESTION = [{"role": "user", "content": "hello world"}]


@dataclass
class Served:
    url: str
    engine: Engine

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    base = save_model(folder / "base", llama_config(max_position_embeddings=LENGTH))
    run = save_lora_run(folder / "run", base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = Torch(max_batch=4, max_length=LENGTH).start(ModelSource(str(base), dtype="fp32"), cpus=1)
    asyncio.run(engine.load_adapter("run", run))
    app = api({"tiny": ["run"]}, {"tiny": engine.generate})
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    started = threading.Event()
    original = server.startup

    async def startup(**options: object) -> None:
        await original(**options)  # type: ignore[arg-type]
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(20)
    yield Served(f"http://127.0.0.1:{port}", engine)
    server.should_exit = True
    thread.join()
    asyncio.run(engine.close())


def test_models_lists_base_and_runs(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["tiny", "tiny:run"]
    assert served.client().models.retrieve("tiny:run").id == "tiny:run"
    assert httpx.get(f"{served.url}/health").json()["status"] == "ok"


def test_a_chat_answers_the_same_whole_and_streamed(served: Served) -> None:
    client = served.client()
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_only_when_asked_for_and_done_is_last(served: Served) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 3, "stream": True}
    lines = [line for line in httpx.post(f"{served.url}/v1/chat/completions", json=body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_base_and_adapter_answer_side_by_side_each_in_its_own_way(served: Served) -> None:
    client = served.client()

    def ask(model: str) -> str:
        answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=16)
        return answer.choices[0].message.content or ""

    alone = {model: ask(model) for model in ("tiny", "tiny:run")}
    assert alone["tiny"] != alone["tiny:run"]
    answers: dict[str, str] = {}
    threads = [threading.Thread(target=lambda m=m: answers.update({m: ask(m)})) for m in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone


def test_completions_take_texts_tokens_and_several_prompts(served: Served) -> None:
    client = served.client()
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    single = client.completions.create(prompt="hello", **asked)
    assert single.usage.completion_tokens == 5
    both = client.completions.create(prompt=["hello", "the quick"], **asked)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == single.choices[0].text
    assert client.completions.create(prompt=[5, 6, 7], **asked).usage.prompt_tokens == 3
    streamed: dict[int, str] = {0: "", 1: ""}
    for chunk in client.completions.create(prompt=["hello", "the quick"], stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in both.choices]


def test_n_choices_differ_and_a_seed_repeats_them(served: Served) -> None:
    def ask() -> openai.types.chat.ChatCompletion:
        return served.client().chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=12, n=2, seed=7, temperature=1
        )

    first, again = ask(), ask()
    texts = [choice.message.content for choice in first.choices]
    assert texts[0] != texts[1]
    assert [choice.message.content for choice in again.choices] == texts
    one = served.client().chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    assert first.usage.prompt_tokens == one.usage.prompt_tokens


def test_a_stop_string_ends_the_answer_before_itself(served: Served) -> None:
    client = served.client()
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stopped = client.chat.completions.create(**asked, stop=whole[3:5]).choices[0]
    assert stopped.message.content == whole[: whole.index(whole[3:5])]
    assert stopped.finish_reason == "stop"


def test_langchain_streams_and_asks(served: Served) -> None:
    model = ChatOpenAI(model="tiny:run", base_url=f"{served.url}/v1", api_key="none", temperature=0, max_tokens=8)
    answer = model.invoke("hello world").content
    assert answer
    assert "".join(str(chunk.content) for chunk in model.stream("hello world")) == answer


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"model": "nope"}, 404, "model", "there are: tiny, tiny:run"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": "hello"}, 400, "messages", "list"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 100_000}, 400, "max_tokens", "20000"),
        ({"messages": [{"role": "user", "content": "word " * LENGTH}]}, 400, "messages", "20000"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_get_openais_envelope_and_status(
    served: Served, body: dict[str, object], status: int, param: str, said: str, stream: bool
) -> None:
    whole = {"model": "tiny", "messages": QUESTION, "max_tokens": 4, "stream": stream, **body}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=whole)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_openai_client_sees_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="there are: tiny, tiny:run"):
        served.client().chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="not supported"):
        served.client().chat.completions.create(model="tiny", messages=QUESTION, logprobs=True)


def test_an_unknown_path_is_an_error_in_the_same_envelope(served: Served) -> None:
    response = httpx.get(f"{served.url}/v1/nothing")
    assert response.status_code == 404
    assert "/v1/nothing" in response.json()["error"]["message"]


def test_defaults_that_clients_send_along_are_taken(served: Served) -> None:
    answer = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        max_completion_tokens=2, frequency_penalty=0, presence_penalty=0, logprobs=False, user="me",
        response_format={"type": "text"},
    )  # fmt: skip
    assert answer.usage.completion_tokens <= 2


def test_a_client_that_goes_away_stops_its_own_generation(served: Served) -> None:
    """With all 4 places of the batch taken by answers of minutes, a fifth is served only once their clients hang up."""
    endless = {"model": "tiny", "messages": QUESTION, "max_tokens": LENGTH - 100, "stream": True, "temperature": 0}
    with httpx.Client(timeout=30) as client, ExitStack() as streams:
        answers = []  # an iterator that is let go closes its connection
        for _ in range(4):
            response = streams.enter_context(client.stream("POST", f"{served.url}/v1/chat/completions", json=endless))
            answers.append(response.iter_lines())
            assert next(answers[-1]).startswith("data: {")
        quick = {"model": "tiny", "messages": QUESTION, "max_tokens": 2}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/chat/completions", json=quick, timeout=1)
        answers.clear()
        streams.close()
        assert httpx.post(f"{served.url}/v1/chat/completions", json=quick, timeout=10).status_code == 200


def test_a_choice_that_fails_ends_the_stream_though_another_has_ended_and_a_third_is_silent() -> None:
    async def short(request: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta("done", 1, 1, "stop")

    async def failing(request: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta("begun", 1, 1)
        await asyncio.sleep(0.2)
        raise RuntimeError("out of memory")

    async def silent(request: GenerateRequest) -> AsyncIterator[Delta]:
        await asyncio.Event().wait()
        yield Delta("", 1, 1, "stop")

    async def read() -> None:
        request = GenerateRequest(prompt="")
        async with asyncio.timeout(5):
            async for _ in merged([short(request), failing(request), silent(request)]):
                pass

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(read())


def test_routes_are_bases_and_their_runs() -> None:
    routes = model_routes({"a": ["x", "y"], "org/b": []})
    assert list(routes) == ["a", "org/b", "a:x", "a:y"]
    assert find_route("a:y", routes).adapter == "y"
    with pytest.raises(UnknownModelError, match="a:x"):
        find_route("a:z", routes)
