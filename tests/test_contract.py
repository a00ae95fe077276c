"""What every engine owes: each in its own environment, behind our endpoints, beside the torch engine on the same models."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import small_models

from plugins import hardware
from plugins.environments import Environment

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "scripts/demo_base"
LENGTH = 20_000  # tokens: an answer as long as that takes more than PATIENCE_S
PATIENCE_S = 60
FOX = "the quick brown fox"
PROMPTS = (FOX, "a", "hello world one two three four five six", "東京 and 🙂", "naïve café", "the weather, the sea")
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["東京", "Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ROOM = {"max_batch": 4, "max_length": LENGTH, "kv_memory": "64MiB"}
SHORTER = {"max_length": 1024}  # what the demo's base was made for


@dataclass(frozen=True)
class Contender:
    """`engine`: its spec, with `options`; `environment`: what it runs in, where that is not the main one."""

    engine: str
    options: dict[str, Any]
    environment: str | None = None
    has_adapters: bool = True


CONTENDERS = {
    "torch": Contender("Torch", ROOM),
    "openvino": Contender("OpenVino", ROOM),
    "ipex": Contender("Ipex", ROOM, "ipex"),
    "vllm": Contender("Vllm", ROOM | {"max_adapters": 2, "max_rank": 8}, "vllm"),
    "upstream": Contender("Upstream", {}, has_adapters=False),
}
# What a contender's tests need to be there before they run.
NEEDS = {"openvino": "openvino-export"} | {name: one.environment for name, one in CONTENDERS.items() if one.environment}


@dataclass(frozen=True)
class Server:
    """Our endpoints over one engine: `fp32` is a small random model, `fp32:run` its adapter, `bf16` the demo's base."""

    url: str
    contender: Contender
    refused: dict[str, str]

    def ask(self, path: str = "/v1/completions", **body: Any) -> Any:
        return self.ask_all([body], path)[0]

    def ask_all(self, bodies: list[dict[str, Any]], path: str = "/v1/completions") -> list[Any]:
        """All at once; of a refusal, its status and error."""

        async def main() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S) as client:
                return await asyncio.gather(*(client.post(path, json=question(body)) for body in bodies))

        answers = asyncio.run(main())
        return [one.json() if one.is_success else (one.status_code, one.json()["error"]) for one in answers]

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=question(body) | options, timeout=PATIENCE_S) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


def question(body: dict[str, Any]) -> dict[str, Any]:
    prompt = {} if "messages" in body else {"prompt": FOX}
    return prompt | {"model": "fp32", "temperature": 0, "max_tokens": 24} | body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, a `run` of it, and `nothing`, which is no model."""
    folder = tmp_path_factory.mktemp("contract")
    config = small_models.llama_config(hidden_size=128, max_position_embeddings=LENGTH)
    base = small_models.save_model(folder / "base", config)
    small_models.save_lora_run(folder / "run", base)
    (folder / "nothing").mkdir()
    return folder


@contextmanager
def running(contender: Contender, folder: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    elsewhere = contender.engine == "Upstream"
    common: dict[str, Any] = {"engine": contender.engine, "options": contender.options, "runs": {}}
    runs = {"run": str(folder / "run")}
    if elsewhere:
        common["dtype"] = "auto"
        engines = {"fp32": common | {"model": "fp32", "runs": runs}, "bf16": common | {"model": "bf16"}}
    else:
        engines = {
            "fp32": common | {"model": str(folder / "base"), "dtype": "fp32", "runs": runs},
            "bf16": common | {"model": str(DEMO / "model"), "dtype": "bf16", "options": contender.options | SHORTER},
            "nothing": common | {"model": str(folder / "nothing"), "dtype": "fp32"},
        }
    python = Environment.find(contender.environment).python if contender.environment else sys.executable
    command = [python, "-m", "tests.engine_side", json.dumps({"port": port, "engines": engines})]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        refused = next((json.loads(line) for line in process.stdout if line.startswith("{")), None)
        assert refused is not None, "the server has ended"
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as client:
            assert client.get(f"{url}/health").is_success  # its port is open a moment later
        yield Server(url, contender, refused)
        process.stdin.close()
        process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def torch(folder: Path) -> Iterator[Server]:
    """The one that the others have to agree with. How it agrees with transformers: test_torch_engine.py."""
    with running(CONTENDERS["torch"], folder) as server:
        yield server


def over(*names: str) -> Any:
    """The test runs over these contenders, with one server each for all tests."""
    marked = [pytest.param(name, marks=pytest.mark.environment(NEEDS[name]) if name in NEEDS else ()) for name in names]
    return pytest.mark.parametrize("served", marked, indirect=True, scope="module")


every_engine = over(*CONTENDERS)
every_other_engine = over(*(name for name in CONTENDERS if name != "torch"))


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, folder: Path, torch: Server) -> Iterator[Server]:
    contender = CONTENDERS[request.param]
    if contender.engine == "Torch":
        yield torch
        return
    if contender.engine == "Upstream":
        contender = Contender("Upstream", {"url": f"{torch.url}/v1"}, has_adapters=False)
    with ExitStack() as stack:
        yield stack.enter_context(running(contender, folder))


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_tokens": 1},
    "a stop string": {"stop": ["ou"], "max_tokens": 400},
    "a stop string that stays": {"stop": ["ou"], "max_tokens": 400, "include_stop_str_in_output": True},
    "a stop token": {"logit_bias": {"20": 100}, "stop_token_ids": [20]},
    "an end": {"logit_bias": {"0": 100}},
    "an end after min_tokens": {"logit_bias": {"0": 100}, "min_tokens": 5},
    "no end": {"logit_bias": {"0": 100}, "ignore_eos": True},
    "repetition": {"repetition_penalty": 1.5, "max_tokens": 60},
    "frequency and presence": {"frequency_penalty": 1.5, "presence_penalty": -0.5, "max_tokens": 60},
    "the likeliest of one": {"temperature": 0.7, "top_k": 1},
    "the narrowest share": {"temperature": 0.7, "top_p": 1e-6},
    "the narrowest of all": {"temperature": 0.7, "min_p": 1.0},
    "the prompt and the answer": {"echo": True},
    "token ids": {"prompt": [40, 41, 42, 43]},
    "two choices": {"n": 2},
}


@every_other_engine
@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_that_of_the_torch_engine(served: Server, torch: Server, name: str) -> None:
    ours, theirs = served.ask(**ASKED[name]), torch.ask(**ASKED[name])
    assert (ours["choices"], ours["usage"]) == (theirs["choices"], theirs["usage"])


@every_engine
@pytest.mark.parametrize("name", [name for name in ASKED if name not in ("greedy", "the likeliest of one")])
def test_a_parameter_is_not_ignored(served: Server, name: str) -> None:
    """Beside the plain question, and the warm one: with it the answer is another."""
    changes = ASKED[name]
    without = {key: value for key, value in changes.items() if key in ("max_tokens", "logit_bias", "prompt")}
    if name in ("one token", "an end", "token ids"):
        without = {}
    if changes.get("temperature"):
        assert served.ask(**changes)["choices"] == served.ask()["choices"]  # it leaves nothing to chance
        without = {"temperature": 0.7, "seed": 1}
    assert served.ask(**changes)["choices"] != served.ask(**without)["choices"]


@every_other_engine
def test_a_chat_has_the_template_and_its_end(served: Server, torch: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "logit_bias": {"2": 30}, "max_tokens": 50}
    ours, theirs = (server.ask("/v1/chat/completions", **body) for server in (served, torch))
    assert (ours["choices"], ours["usage"]) == (theirs["choices"], theirs["usage"])


@every_other_engine
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_logprobs_are_those_of_the_torch_engine(served: Server, torch: Server, max_tokens: int) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "logit_bias": {"9": 3.5}}
    ours, theirs = served.ask(**body), torch.ask(**body)
    assert ours["usage"] == theirs["usage"]
    mine, other = ours["choices"][0].pop("logprobs"), theirs["choices"][0].pop("logprobs")
    assert ours["choices"] == theirs["choices"]
    assert (mine["tokens"], mine["text_offset"]) == (other["tokens"], other["text_offset"])
    assert mine["token_logprobs"][1:] == pytest.approx(other["token_logprobs"][1:], abs=1e-3)
    assert [row and list(row) for row in mine["top_logprobs"]] == [row and list(row) for row in other["top_logprobs"]]


@every_other_engine
def test_in_bf16_answers_begin_alike_and_what_is_likely_is_about_as_likely(served: Server, torch: Server) -> None:
    """On a model that has learned something: in a random one the likeliest tokens are all about as likely."""
    if served.contender.engine == "OpenVino" and not hardware.has_bf16(hardware.device(0)):
        assert "source.dtype = 'bf16': this CPU has no bf16" in served.refused["bf16"]
        return
    rows = [json.loads(line)["input"] for line in (DEMO / "heldout.jsonl").read_text().splitlines()[:60]]
    bodies = [{"model": "bf16", "prompt": row, "max_tokens": 16, "logprobs": 0} for row in rows]
    pairs = [
        (ours["choices"][0]["logprobs"], theirs["choices"][0]["logprobs"])
        for ours, theirs in zip(served.ask_all(bodies), torch.ask_all(bodies), strict=True)
    ]
    equal = [ours["tokens"] == theirs["tokens"] for ours, theirs in pairs]
    assert sum(equal) >= 0.95 * len(pairs)
    for ours, theirs in pairs:
        if ours["tokens"][0] == theirs["tokens"][0]:
            assert ours["token_logprobs"][0] == pytest.approx(theirs["token_logprobs"][0], abs=0.1)


@every_engine
@pytest.mark.parametrize(
    "constraint",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
        {"structured_outputs": {"regex": r"[a-f]{3}-\d{4}"}},
        {"structured_outputs": {"choice": ["yes", "no", "東京"]}},
    ],
    ids=["schema", "regex", "choice"],
)
def test_a_constraint_holds(served: Server, torch: Server, constraint: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 60} | constraint
    ours, theirs = (server.ask("/v1/chat/completions", **body)["choices"][0] for server in (served, torch))
    assert ours["finish_reason"] == theirs["finish_reason"] == "stop"
    if "response_format" in constraint:  # blanks between the parts of JSON are not the same
        assert json.loads(ours["message"]["content"])["city"] in ("東京", "Bern")
    else:
        assert ours["message"] == theirs["message"]


@every_engine
def test_company_changes_no_answer(served: Server, torch: Server) -> None:
    models = ("fp32", "fp32:run") if served.contender.has_adapters else ("fp32",)
    bodies = [{"prompt": prompt, "model": model} for prompt in PROMPTS for model in models]
    alone = [torch.ask(**body)["choices"] for body in bodies]
    assert [answer["choices"] for answer in served.ask_all(bodies)] == alone


@every_engine
def test_an_adapter_changes_its_own_answers_or_is_refused(served: Server, torch: Server) -> None:
    if served.contender.has_adapters:
        ours, theirs = (server.ask(model="fp32:run")["choices"] for server in (served, torch))
        assert ours == theirs
        assert ours != served.ask()["choices"]
    else:
        assert "adapter" in served.refused["fp32:run"]
        assert "\n" not in served.refused["fp32:run"]
    status, error = served.ask(model="fp32:gone")
    assert (status, error["param"]) == (404, "model")


@every_engine
def test_a_stream_says_what_a_whole_answer_says(served: Server) -> None:
    body = {"prompt": "東京 and 🙂", "max_tokens": 400, "ignore_eos": True, "stop": ["zzzz"]}
    *said, usage = served.stream(**body)
    whole = served.ask(**body)
    texts = [chunk["choices"][0]["text"] for chunk in said]
    assert "".join(texts) == whole["choices"][0]["text"]
    assert len(texts) > 2
    assert len(texts[0]) < 20  # at once, not with the next ones
    assert len(texts) < 200  # and these together
    assert usage["usage"] == whole["usage"]
    assert usage["usage"]["completion_tokens"] == 400


@every_engine
def test_a_seed_gives_the_same_text_alone_and_in_company(served: Server) -> None:
    body = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 11}
    alone = served.ask(**body)["choices"]
    beside = [{"seed": n, "temperature": 1.0, "prompt": PROMPTS[n]} for n in range(3)]
    assert served.ask_all([body, *beside])[0]["choices"] == alone
    assert served.ask(**body | {"seed": 12})["choices"] != alone


@every_engine
def test_who_goes_away_makes_room(served: Server) -> None:
    """As many as fit go away in the middle of an answer that takes longer than anyone waits here; others are served."""
    body = question({"max_tokens": LENGTH - 100, "ignore_eos": True, "stream": True})
    with ExitStack() as stack:
        for _ in range(ROOM["max_batch"]):
            sent = httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=PATIENCE_S)
            next(stack.enter_context(sent).iter_lines())
    assert [one["usage"]["completion_tokens"] for one in served.ask_all([{"max_tokens": 40}] * 4)] == [40] * 4


@every_engine
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "word " * LENGTH}, "prompt", "too long"),
        ({"max_tokens": LENGTH + 1}, "max_tokens", "at most"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "9999"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "(a"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs", "nothing"),
    ],
    ids=["prompt", "max_tokens", "logit_bias", "regex", "schema"],
)
def test_a_request_that_cannot_be_served_is_told_why_and_harms_nobody(
    served: Server, body: dict[str, Any], param: str, words: str
) -> None:
    (status, error), other = served.ask_all([body, {"max_tokens": 2}])
    assert (status, error["param"]) == (400, param)
    assert "\n" not in error["message"]
    assert words in error["message"]
    assert other["usage"]["completion_tokens"] == 2


@over(*(name for name in CONTENDERS if name != "upstream"))
def test_what_is_no_model_is_refused_in_one_line(served: Server, folder: Path) -> None:
    assert "\n" not in served.refused["nothing"]
    assert "no config.json" in served.refused["nothing"]
    assert str(folder / "nothing") in served.refused["nothing"]
