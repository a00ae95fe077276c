"""The endpoints over a real engine and a real HTTP server, asked by real clients. No cluster."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import small_models
from langchain_openai import ChatOpenAI
from real_server import running
from small_models import llama_config, save_lora_run, save_model

from plugins.engines import Engine, Torch
from plugins.types import Delta, GenerateRequest, ModelSource
from serve.ingress import api, merged
from serve.routing import UnknownModelError, find_route, model_routes

LENGTH = 20_000
QUESTION = [{"role": "user", "content": "hello world"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["東京", "Bern"]}, "people": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


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
    engine = Torch(max_batch=4, max_length=LENGTH).start(ModelSource(str(base), dtype="fp32"), cpus=1)
    asyncio.run(engine.load_adapter("run", run))
    app = api({"tiny": ["run"]}, {"tiny": engine.generate})
    with running(app) as address:
        yield Served(address, engine)
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


# Log-probabilities, echo, constraints: the wire


def test_chat_logprobs_have_openais_form_whole_and_streamed(served: Served) -> None:
    client = served.client()
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 1.2, "seed": 4, "max_tokens": 20, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    tokens = whole.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == whole.message.content
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in tokens)
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == tokens
    assert len(tokens) == 20
    plain = client.chat.completions.create(**asked).choices[0]
    assert plain.message.content == whole.message.content
    assert {len(token.top_logprobs) for token in plain.logprobs.content} == {0}
    assert client.chat.completions.create(**{**asked, "logprobs": False}).choices[0].logprobs is None


def test_completion_logprobs_and_echo_have_openais_form_whole_and_streamed(served: Served) -> None:
    client = served.client()
    prompt = "the 東京 fox"
    asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 6, "logprobs": 2, "echo": True}
    choice = client.completions.create(**asked).choices[0]
    found = choice.logprobs
    columns = {name: getattr(found, name) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert choice.text.startswith(prompt)
    assert {len(column) for column in columns.values()} == {client.completions.create(**asked).usage.total_tokens}
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for token, logprob, top, offset in list(zip(*columns.values(), strict=True))[1:]:
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
        assert token.startswith("bytes:\\x") or offset >= len(prompt) or choice.text.startswith(token, offset)
    assert any(token.startswith("bytes:\\x") for token in found.tokens)  # a character in several tokens
    text, streamed = "", {name: [] for name in columns}
    for chunk in client.completions.create(**asked, stream=True):
        text += chunk.choices[0].text
        for name, part in streamed.items():
            part.extend(getattr(chunk.choices[0].logprobs, name))
    assert text == choice.text
    assert streamed == columns


def test_lm_evaluation_harness_reads_what_it_asks_for(served: Served) -> None:
    """Its request (token-id prompts, echo, one token, logprobs of one), and how it reads the answer."""
    prompts = [[20, 30, 40, 50, 60], [70, 80, 90]]
    asked = {"model": "tiny", "prompt": prompts, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
    for max_tokens in (1, 0):
        choices = served.client().completions.create(**asked, max_tokens=max_tokens).choices
        for choice, prompt, begin in zip(choices, prompts, (2, 1), strict=True):
            end = len(choice.logprobs.tokens) - max_tokens
            assert end == len(prompt)
            scores, tops = choice.logprobs.token_logprobs[begin:end], choice.logprobs.top_logprobs[begin:end]
            assert sum(scores) < 0
            assert all(score <= max(top.values()) for score, top in zip(scores, tops, strict=True))
    # The likeliest continuation is known to be so: its logprob is the very number that is the best.
    best = served.client().completions.create(model="tiny", prompt=[20, 30], temperature=0, max_tokens=1, logprobs=1)
    name = best.choices[0].logprobs.tokens[0]
    assert best.choices[0].logprobs.top_logprobs[0] == {name: best.choices[0].logprobs.token_logprobs[0]}


def test_prompt_logprobs_have_vllms_form(served: Served) -> None:
    body = {"model": "tiny", "prompt": [20, 30, 40], "max_tokens": 2, "temperature": 0, "prompt_logprobs": 1}
    choice = httpx.post(f"{served.url}/v1/completions", json=body).json()["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert "30" in second
    assert "40" in third
    assert third["40"]["logprob"] <= max(entry["logprob"] for entry in third.values())
    assert choice["logprobs"] is None
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 2, "prompt_logprobs": 0}
    choice = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()["choices"][0]
    assert len(choice["prompt_logprobs"]) > 5


@pytest.mark.parametrize(
    "constraint",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}},
        {"extra_body": {"guided_json": CITY}},
        {"extra_body": {"structured_outputs": {"json": json.dumps(CITY)}}},
    ],
)
def test_a_schema_is_kept_whole_and_streamed(served: Served, constraint: dict[str, Any]) -> None:
    asked = {
        "model": "tiny",
        "messages": QUESTION,
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 200,
        "n": 3,
        **constraint,
    }
    whole = served.client().chat.completions.create(**asked)
    for choice in whole.choices:
        answer = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert answer["city"] in ("東京", "Bern")
        assert answer["people"] in range(10)
        assert len(answer) == 2
    streamed = dict.fromkeys(range(3), "")
    for chunk in served.client().chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == [choice.message.content for choice in whole.choices]


def test_vllms_other_constraints_and_parameters_are_heeded(served: Served) -> None:
    def ask(**extra: Any) -> Any:
        answer = served.client().completions.create(
            model="tiny", prompt="hello", temperature=0, max_tokens=20, extra_body=extra
        )
        return answer.choices[0]

    plain = ask()
    assert ask(guided_choice=["yes", "no"]).text in ("yes", "no")
    assert ask(structured_outputs={"choice": ["yes", "no"]}).text in ("yes", "no")
    assert re.fullmatch("[0-9]{3}", ask(guided_regex="[0-9]{3}").text)
    assert re.fullmatch("[a-c]{4}", ask(structured_outputs={"regex": "[a-c]{4}"}).text)
    stop = plain.text[3:5]
    kept = ask(stop=[stop], include_stop_str_in_output=True)
    assert kept.text == plain.text[: plain.text.index(stop) + len(stop)]
    assert kept.stop_reason == stop
    assert ask(repetition_penalty=1.9).text != plain.text
    assert ask(frequency_penalty=-2).text != plain.text
    assert ask(presence_penalty=-2).text != plain.text
    assert ask(logit_bias={"20": 100}).text == small_models.tokenizer().decode([20]) * 20
    assert ask(logit_bias={"0": 100}).text == ""
    assert ask(logit_bias={"0": 100}, ignore_eos=True, min_tokens=2).finish_reason == "length"
    assert ask(logit_bias={"20": 100}, stop_token_ids=[20]).stop_reason == 20
    assert ask(temperature=1.5, top_k=1).text == ask(temperature=1.5, min_p=1).text == plain.text


def test_messages_with_tool_calls_are_taken(served: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "sea"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0}
    answer = served.client().chat.completions.create(**asked, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.content
    call["function"]["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match="arguments of a tool call must be JSON"):
        served.client().chat.completions.create(**asked)


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
        ({"echo": True}, 400, "echo", "not supported"),
        ({"best_of": 3}, 400, "best_of", "not supported"),
        ({"tool_choice": "required", "tools": TOOLS}, 400, "tool_choice", "auto and none are"),
        ({"tools": TOOLS}, 400, "tools", "takes no tools"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0.function", "required"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "no content"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "logprobs", "from 0 to 20"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "0 to 383"),
        ({"min_tokens": 5}, 400, "min_tokens", "at most max_tokens"),
        ({"min_p": 2}, 400, "min_p", "less than or equal to 1"),
        ({"response_format": {"type": "xml"}}, 400, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema.json_schema", "required"),
        ({"guided_json": {"type": "nothing"}}, 400, "guided_json", "nothing"),
        ({"guided_regex": "a(b"}, 400, "guided_regex", "guided_regex"),
        ({"guided_choice": []}, 400, "guided_choice", "at least 1"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice", "combined with guided_regex"),
        ({"structured_outputs": {"xml": "a"}}, 400, "structured_outputs.xml", "not permitted"),
        ({"guided_choice": ["a"], "ignore_eos": True}, 400, "ignore_eos", "combined with guided_choice"),
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
        served.client().chat.completions.create(model="tiny", messages=QUESTION, modalities=["audio"])


def test_an_unknown_path_is_an_error_in_the_same_envelope(served: Served) -> None:
    response = httpx.get(f"{served.url}/v1/nothing")
    assert response.status_code == 404
    assert "/v1/nothing" in response.json()["error"]["message"]


def test_defaults_that_clients_send_along_are_taken(served: Served) -> None:
    answer = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        max_completion_tokens=2, frequency_penalty=0, presence_penalty=0, logprobs=False, user="me",
        response_format={"type": "text"}, top_p=None, stop=None, seed=None, n=1, tool_choice="auto", logit_bias={},
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


@pytest.mark.parametrize("busy", [0.0, 0.4])  # seconds that the reader takes: it fails after that, or meanwhile
def test_a_choice_that_fails_ends_the_stream_though_another_has_ended_and_a_third_is_silent(busy: float) -> None:
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
            async for _, delta in merged([short(request), failing(request), silent(request)]):
                await asyncio.sleep(busy if delta.text == "begun" else 0)

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(read())


def test_routes_are_bases_and_their_runs() -> None:
    routes = model_routes({"a": ["x", "y"], "org/b": []})
    assert list(routes) == ["a", "org/b", "a:x", "a:y"]
    assert find_route("a:y", routes).adapter == "y"
    with pytest.raises(UnknownModelError, match="a:x"):
        find_route("a:z", routes)
