"""The vLLM engine in its own environment, behind our endpoints, beside the torch engine on the same small model in fp32."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import small_models

from plugins.engines import Torch
from plugins.environments import Environment
from plugins.types import ModelSource
from serve.ingress import api

pytestmark = [pytest.mark.engine, pytest.mark.environment("vllm")]

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 20_000
FOX = "the quick brown fox"
PROMPTS = (FOX, "a", "hello world one two three four five six", "東京 and 🙂", "naïve café", "the weather, the sea")
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["東京", "Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    refused: dict[str, str | None]
    torch: Any = field(repr=False)  # the same endpoints over the torch engine

    def ask(self, path: str = "/v1/completions", **body: Any) -> Any:
        response = httpx.post(self.url + path, json=question(body), timeout=60)
        return response.json() if response.is_success else (response.status_code, response.json()["error"])

    def torch_says(self, path: str = "/v1/completions", **body: Any) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(app=self.torch)
            async with httpx.AsyncClient(transport=transport, base_url="http://torch", timeout=60) as client:
                response = await client.post(path, json=question(body))
            assert response.is_success, response.text
            return response.json()

        return asyncio.run(main())


def question(body: dict[str, Any]) -> dict[str, Any]:
    prompt = {} if "messages" in body else {"prompt": FOX}
    return prompt | {"model": "tiny", "temperature": 0, "max_tokens": 24} | body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and runs of it: `run`, and those that cannot be served."""
    folder = tmp_path_factory.mktemp("vllm")
    config = small_models.llama_config(hidden_size=128, max_position_embeddings=LENGTH)
    base = small_models.save_model(folder / "base", config)
    small_models.save_lora_run(folder / "run", base)
    small_models.save_lora_run(folder / "high", base, rank=16)
    small_models.save_lora_run(folder / "dora", base, use_dora=True)
    small_models.save_lora_run(folder / "head", base, modules_to_save=["lm_head"])
    for name, changes in (("wide", {"hidden_size": 256}), ("deep", {"num_hidden_layers": 3})):
        other = small_models.save_model(
            folder / f"{name}-base", small_models.llama_config(**{"hidden_size": 128} | changes)
        )
        small_models.save_lora_run(folder / name, other)
    half = shutil.copytree(folder / "run", folder / "half") / "adapter/adapter_config.json"
    half.write_text(json.dumps(json.loads(half.read_text()) | {"target_modules": ["q_proj", "input_layernorm"]}))
    (folder / "full/model").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("high", "dora", "head", "wide", "deep", "half", "full", "nowhere", "run")
    asked = {
        "model": str(folder / "base"),
        "port": port,
        "length": LENGTH,
        "runs": {"run": str(folder / "run"), "again": str(folder / "run")},
        "refused": {name: str(folder / name) for name in names},
    }
    engine = Torch(max_batch=4, max_length=LENGTH).start(ModelSource(str(folder / "base"), dtype="fp32"), cpus=1)
    asyncio.run(engine.load_adapter("run", folder / "run"))
    with side("serve", asked) as process:
        assert process.stdout is not None
        refused = next((json.loads(line) for line in process.stdout if line.startswith("{")), None)
        assert refused is not None, "the server has ended"
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: httpx.get(f"{url}/health").is_success)
        yield Served(process, url, refused, api({"tiny": ["run"]}, {"tiny": engine.generate}))
        process.send_signal(signal.SIGINT)
        process.wait(30)
    asyncio.run(engine.close())


def side(what: str, asked: Any) -> subprocess.Popen[str]:
    command = [Environment.find("vllm").python, "-m", "tests.vllm_side", what, json.dumps(asked)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(holds: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(httpx.TransportError):
            if holds():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


ASKED: dict[str, dict[str, Any]] = {
    **{f"prompt {index}": {"prompt": prompt} for index, prompt in enumerate(PROMPTS)},
    "token ids": {"prompt": [358, 287, 315]},
    "an adapter": {"model": "tiny:run"},
    "stop strings": {"stop": ["never", "ou"]},
    "a stop string that stays": {"stop": ["ou"], "include_stop_str_in_output": True},
    "stop after min_tokens": {"stop": ["A", "af"], "min_tokens": 10},
    "a stop token": {"stop_token_ids": [35, 260]},
    "a stop token after min_tokens": {"stop_token_ids": [35], "min_tokens": 10},
    "an end": {"logit_bias": {"2": 100}},
    "an end after min_tokens": {"logit_bias": {"2": 100}, "min_tokens": 5},
    "no end": {"logit_bias": {"2": 100}, "ignore_eos": True},
    "one token": {"max_tokens": 1},
    "repetition": {"repetition_penalty": 1.5, "max_tokens": 60},
    "frequency and presence": {"frequency_penalty": 1.5, "presence_penalty": -0.5, "max_tokens": 60},
    "the likeliest of one": {"temperature": 0.7, "top_k": 1},
    "the narrowest share": {"temperature": 0.7, "top_p": 1e-6},
    "the narrowest of all": {"temperature": 0.7, "min_p": 1.0},
    "the prompt and the answer": {"echo": True},
}


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_that_of_the_torch_engine(served: Served, name: str) -> None:
    ours, theirs = served.ask(**ASKED[name]), served.torch_says(**ASKED[name])
    assert (ours["choices"], ours["usage"]) == (theirs["choices"], theirs["usage"])


def test_a_chat_has_the_template_and_its_end(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "logit_bias": {"2": 30}, "max_tokens": 50}
    ours, theirs = (say("/v1/chat/completions", **body) for say in (served.ask, served.torch_says))
    assert (ours["choices"], ours["usage"]) == (theirs["choices"], theirs["usage"])


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_logprobs_are_those_of_the_torch_engine(served: Served, max_tokens: int) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "logit_bias": {"9": 3.5}}
    ours, theirs = served.ask(**body), served.torch_says(**body)
    assert ours["usage"] == theirs["usage"]
    mine, other = ours["choices"][0].pop("logprobs"), theirs["choices"][0].pop("logprobs")
    assert ours["choices"] == theirs["choices"]
    assert (mine["tokens"], mine["text_offset"]) == (other["tokens"], other["text_offset"])
    assert mine["token_logprobs"][1:] == pytest.approx(other["token_logprobs"][1:], abs=1e-3)
    assert [row and list(row) for row in mine["top_logprobs"]] == [row and list(row) for row in other["top_logprobs"]]


@pytest.mark.parametrize(
    "constraint",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
        {"structured_outputs": {"regex": r"[a-f]{3}-\d{4}"}},
        {"structured_outputs": {"choice": ["yes", "no", "東京"]}},
    ],
    ids=["schema", "regex", "choice"],
)
def test_a_constraint_holds(served: Served, constraint: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 60} | constraint
    ours, theirs = (say("/v1/chat/completions", **body)["choices"][0] for say in (served.ask, served.torch_says))
    assert ours["finish_reason"] == theirs["finish_reason"] == "stop"
    if "response_format" in constraint:  # blanks between the parts of JSON are not the same
        assert json.loads(ours["message"]["content"]).keys() == {"city"}
    else:
        assert ours["message"] == theirs["message"]


def test_company_changes_no_answer(served: Served) -> None:
    async def main() -> list[Any]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            bodies = [question({"prompt": prompt, "model": model}) for prompt in PROMPTS for model in MODELS]
            found = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [response.json()["choices"] for response in found]

    wanted = [served.torch_says(prompt=prompt, model=model)["choices"] for prompt in PROMPTS for model in MODELS]
    assert asyncio.run(main()) == wanted


MODELS = ("tiny", "tiny:run")


def chunks(served: Served, **body: Any) -> list[dict[str, Any]]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=question(body) | options, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_says_what_a_whole_answer_says(served: Served) -> None:
    body = {"prompt": "東京 and 🙂", "max_tokens": 400, "ignore_eos": True, "stop": ["zzzz"]}
    *said, usage = chunks(served, **body)
    whole = served.ask(**body)
    texts = [chunk["choices"][0]["text"] for chunk in said]
    assert "".join(texts) == whole["choices"][0]["text"]
    assert len(texts) > 2
    assert len(texts[0]) < 20  # at once, not with the next ones
    assert len(texts) < 200  # and these together
    assert usage["usage"] == whole["usage"]


def test_a_seed_gives_the_same_text_alone_and_in_company(served: Served) -> None:
    body = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 11}
    alone = served.ask(**body)["choices"]
    beside = [question({"seed": n, "temperature": 1.0, "prompt": PROMPTS[n]}) for n in range(3)]

    async def main() -> Any:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            asked = [question(body), *beside]
            return (await asyncio.gather(*(client.post("/v1/completions", json=one) for one in asked)))[0].json()

    assert asyncio.run(main())["choices"] == alone
    assert served.ask(**body | {"seed": 12})["choices"] != alone
    assert served.ask(**body | {"seed": -1})["choices"] == served.ask(**body | {"seed": -1})["choices"]


def test_who_goes_away_ends_the_answer(served: Served) -> None:
    body = question({"max_tokens": LENGTH - 100, "ignore_eos": True, "stream": True})
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        assert httpx.get(f"{served.url}/answering").json() == 1
    wait_for(lambda: httpx.get(f"{served.url}/answering").json() == 0, 10)
    assert served.ask(max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_stop_string_ends_the_answer_in_vllm_too(served: Served) -> None:
    assert served.ask(stop=["ou"], max_tokens=LENGTH - 100, ignore_eos=True)["choices"][0]["finish_reason"] == "stop"
    wait_for(lambda: httpx.get(f"{served.url}/answering").json() == 0, 10)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "word " * LENGTH}, "prompt", r"too long: \d+ tokens of prompt, and this model takes 20000"),
        ({"max_tokens": LENGTH}, "max_tokens", "at most"),
        ({"temperature": 0.001}, "temperature", "vLLM draws from 0.01 on"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "tokens of this model"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "invalid regex"),
        ({"structured_outputs": {"regex": "(a{1000}){1000}{1000}"}}, "structured_outputs", "could not hold it"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs", "nothing"),
        ({"model": "tiny:gone"}, "model", r"no adapter 'gone'.*again, run"),
    ],
)
def test_a_request_that_cannot_be_served_is_told_why(
    served: Served, body: dict[str, Any], param: str, words: str
) -> None:
    status, error = served.ask(**body)
    assert (status, error["param"]) == (400, param)
    assert "\n" not in error["message"]
    assert re.search(words, error["message"])
    assert served.ask(max_tokens=1)["usage"]["completion_tokens"] == 1


def test_an_adapter_that_cannot_be_served_is_refused_in_one_line(served: Served) -> None:
    wanted = {
        "high": r"of rank 16: Vllm\.max_rank = 8",
        "dora": r"lora_magnitude_vector.*, which vLLM cannot serve beside the base",
        "head": r"lm_head.*, which vLLM cannot serve beside the base",
        "wide": "does not fit the base: size mismatch",
        "deep": r"does not fit the base: only the adapter has model\.layers\.2",
        "half": "does not fit the base: it has nothing for input_layernorm",
        "full": "full finetune, not an adapter",
        "nowhere": "no such directory",
        "run": r"Vllm\.max_adapters = 2, and there are as many",
    }
    for name, words in wanted.items():
        assert re.search(words, served.refused[name] or ""), (name, served.refused[name])
        assert "\n" not in str(served.refused[name])


def test_what_cannot_be_served_is_refused_in_one_line(folder: Path) -> None:
    narrow = small_models.save_model(folder / "narrow", small_models.llama_config())
    base = str(folder / "base")
    cases: list[tuple[Any, str]] = [
        ((str(folder / "nowhere"), {}), "no such directory"),
        ((str(folder / "full"), {}), "no config.json"),
        ((base, {"max_length": LENGTH + 1}), r"Vllm\.max_length = 20001: this model was made for at most 20000"),
        ((base, {"kv_memory": "1MiB", "max_length": 4096}), r"Vllm\.kv_memory = '1MiB': 1 MiB, at least \d+ MiB for"),
        ((str(narrow), {}), "attention heads are of size 16: vLLM on CPUs takes 32"),
        ((base, {"quantization": "tiny"}), "tiny"),
    ]
    with side("fail", [asked for asked, _ in cases]) as process:
        said = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
    for (asked, words), found in zip(cases, said, strict=True):
        assert re.search(words, found or ""), (asked, found)
        assert "\n" not in found


def test_an_engine_that_has_died_says_so(served: Served) -> None:  # the last to use `served`
    assert httpx.get(f"{served.url}/check").json() == "well"
    workers = psutil.Process(served.process.pid).children(recursive=True)
    core = next(child for child in workers if "EngineCore" in " ".join([child.name(), *child.cmdline()]))
    core.kill()
    wait_for(lambda: httpx.get(f"{served.url}/check").status_code == 500)
    assert served.ask()[0] == 500


def test_a_server_that_is_killed_leaves_nothing_behind(folder: Path) -> None:
    asked = {"model": str(folder / "base"), "port": 0, "length": 256, "runs": {}, "refused": {}}
    with side("serve", asked) as process:
        assert process.stdout is not None
        assert "{}\n" in process.stdout  # it is ready
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) > 2
    assert psutil.wait_procs(children, 20)[1] == []
