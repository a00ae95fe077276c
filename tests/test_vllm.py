"""What the vLLM engine refuses, how it ends, what becomes of its processes. What it owes as an engine: test_contract.py."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import small_models

from plugins.environments import Environment

pytestmark = [pytest.mark.engine, pytest.mark.environment("vllm")]

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 20_000


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    refused: dict[str, str | None]

    def ask(self, **body: Any) -> Any:
        asked = {"prompt": "the quick brown fox", "model": "tiny", "temperature": 0, "max_tokens": 24} | body
        response = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=60)
        return response.json() if response.is_success else (response.status_code, response.json()["error"])


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
    with side("serve", asked) as process:
        assert process.stdout is not None
        refused = next((json.loads(line) for line in process.stdout if line.startswith("{")), None)
        assert refused is not None, "the server has ended"
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: httpx.get(f"{url}/health").is_success)
        yield Served(process, url, refused)
        process.send_signal(signal.SIGINT)
        process.wait(30)


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
