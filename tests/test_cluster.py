"""The commands on a real Ray cluster: one that is started for them, one that runs, and as a submitted job."""

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from real_server import running
from small_models import llama_config, save_lora_run, save_model

from plugins.cluster import SERVING
from plugins.engines import Torch
from plugins.types import ModelSource
from serve.ingress import api

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LENGTH = 64_000  # tokens: an answer that takes many minutes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Shell:
    """Commands with an environment, as a user types them."""

    environment: Mapping[str, str]
    folder: Path = ROOT

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.folder, env=dict(self.environment), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *command: str, exit_code: int = 0, timeout: float = 600) -> str:
        process = self.start(*command)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            kill(process)
        assert process.returncode == exit_code, output
        return output


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home without a Ray token."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def alone(home: Path) -> Shell:
    """Where no cluster runs (one that someone else runs on this machine is none of ours)."""
    return Shell({**os.environ, "HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ADDRESS": "local"})


@pytest.fixture(scope="module")
def cluster(alone: Shell) -> Iterator[Shell]:
    """A cluster of two CPUs, as `ray start` makes it for who has a token: it asks for it."""
    alone.run("ray", "get-auth-token", "--generate")
    port, dashboard = free_port(), free_port()
    ports = (
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
    )
    process = Shell({**alone.environment, **SERVING}).start("ray", "start", "--head", "--num-cpus=2", "--block", *ports)
    shell = Shell(
        {**alone.environment, "RAY_ADDRESS": f"127.0.0.1:{port}", "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    )

    def answers() -> bool:
        assert process.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", dashboard)) == 0

    until(answers, seconds=60, what="the dashboard")
    yield shell
    kill(process)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, and a config that finetunes the one on the other with two workers."""
    folder = tmp_path_factory.mktemp("project")
    save_model(folder / "base", llama_config(max_position_embeddings=LENGTH))
    rows = [{"instruction": f"say {i}", "output": f"fox {i}"} for i in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "finetune.py").write_text(
        "from finetune import *\n"
        "class Loud:\n"
        "    '''A processor of the user's own, which the workers have never heard of.'''\n"
        "    def __call__(self, row, tokenizer):\n"
        "        return Instruct()({**row, 'output': row['output'].upper()}, tokenizer)\n"
        "config = FinetuneConfig(\n"
        f"    name='loud', model=ModelSource({str(folder / 'base')!r}, dtype='fp32'),\n"
        f"    data=Data(source=Jsonl({str(folder / 'rows.jsonl')!r}), processor=Loud(), validation=0.25),\n"
        "    train=Train(max_steps=12, batch_size=4, log_every=4), optim=Optim(lr=1e-2),\n"
        "    checkpoint=Checkpointing(every=4), scaling=Scaling(workers=2),\n"
        f"    output={str(folder / 'outputs')!r})\n"
    )
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_finished(run: Path, steps: list[int]) -> None:
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["steps"] == steps[-1]
    assert manifest["method"] == "lora"
    assert [line["step"] for line in metrics(run)] == steps
    assert metrics(run)[-1]["eval_loss"] < metrics(run)[0]["eval_loss"] == manifest["metrics"]["base_eval_loss"]
    for part in ("adapter/adapter_model.safetensors", "tokenizer.json", "config.py", "chat_template.jinja"):
        assert (run / part).is_file(), part


def test_without_a_cluster_a_killed_run_goes_on_when_it_is_started_again(alone: Shell, project: Path) -> None:
    command = (sys.executable, "-m", "finetune", str(project / "finetune.py"), "name=killed", "train.max_steps=60")
    run = project / "outputs" / "killed"
    first = alone.start(*command)
    until(lambda: len(metrics(run)) >= 4 or first.poll() is not None, seconds=120, what="three reports")
    kill(first)
    done = metrics(run)[-1]["step"]
    assert done < 60, "it was killed too late to show anything"
    assert not (run / "run.json").exists()
    output = alone.run(*command)
    assert "going on where run killed stopped" in output
    repeated = [int(step) for step in re.findall(r"step (\d+)/60", output)]
    assert repeated[0] > 4, "it began from the start"
    check_finished(run, list(range(0, 61, 4)))
    finished = alone.run(*command, exit_code=2)
    assert finished.count("\n") == 1
    assert "run 'killed' is finished" in finished


def test_more_workers_than_the_machine_has_is_one_line_at_once(alone: Shell, project: Path) -> None:
    output = alone.run(
        "manta", "finetune", str(project / "finetune.py"), "name=wide", "scaling.workers=99", exit_code=2, timeout=60
    )
    assert "scaling.workers = 99" in output
    assert "Traceback" not in output
    assert not (project / "outputs" / "wide").exists()


def test_a_running_cluster_is_used_and_a_submitted_job_is_followed_and_stopped(cluster: Shell, project: Path) -> None:
    config = str(project / "finetune.py")
    cluster.run("manta", "finetune", config, "name=attached")
    check_finished(project / "outputs" / "attached", [0, 4, 8, 12])
    assert "2 CPUs" in cluster.run("manta", "status")

    # What the README says for Ray's own command.
    token = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": cluster.environment["DASHBOARD"]}
    ray = Shell({**cluster.environment, **token})
    entry = ("python", "-m", "finetune", config, "name=submitted")
    output = ray.run("ray", "job", "submit", "--working-dir", ".", "--", *entry)
    assert "succeeded" in output
    assert "step 12/12" in output
    check_finished(project / "outputs" / "submitted", [0, 4, 8, 12])

    shown = cluster.run("manta", "finetune", config, "name=ours", "train.max_steps=100000", "--submit", "auto")
    job = re.search(r"submitted job (\S+):", shown)
    assert job is not None
    until(lambda: len(metrics(project / "outputs" / "ours")) > 0, seconds=90, what="the job's first report")
    assert f"job {job[1]}: running" in cluster.run("manta", "status")
    assert "step 4/100000" in cluster.run("manta", "logs", job[1])
    assert "stopped job" in cluster.run("manta", "stop", job[1])
    runs = cluster.run("manta", "runs", "--output", str(project / "outputs"))
    assert re.search(r"attached +finished, held-out loss \d", runs)
    assert re.search(r"ours +step \d+ of 100000", runs)
    assert "nothing here is called 'nope'" in cluster.run("manta", "stop", "nope", exit_code=2)


def test_a_stream_of_packs_on_two_workers_stops_early_and_its_best_weights_are_taken(
    cluster: Shell, project: Path
) -> None:
    # What is held out says otherwise than what is learned, so that learning soon makes it worse.
    others = [{"instruction": f"say {i}", "output": "naïve café, 東京"} for i in range(16)]
    (project / "others.jsonl").write_text("\n".join(map(json.dumps, others)))
    (project / "stream.py").write_text(
        "from dataclasses import replace\n"
        "from runpy import run_path\n"
        "from finetune import *\n"
        f"before = run_path({str(project / 'finetune.py')!r})['config']\n"
        f"rows = Jsonl({str(project / 'others.jsonl')!r})\n"
        "config = replace(before, name='stream', data=replace(before.data, streaming=True, packing=True, validation=rows),\n"
        "    train=Train(max_steps=40, batch_size=1, eval_every=2, patience=3), checkpoint=Checkpointing(export='best'),\n"
        "    scoring=Scoring(rows=6, max_tokens=6), track=Track(tensorboard=True),\n"
        "    optim=Optim(lr=0.03, warmup=0, schedule='constant'))\n"
    )
    output = cluster.run("manta", "finetune", str(project / "stream.py"))
    run = project / "outputs" / "stream"
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if line["step"] > 0}
    best = min(losses, key=lambda step: losses[step])
    assert list(losses) == list(range(2, best + 7, 2)), "three evaluations after the best one it ends"
    assert f"step {best} had the lowest held-out loss" in output
    manifest = json.loads((run / "run.json").read_text())
    assert (manifest["steps"], manifest["metrics"]["eval_loss"]) == (best, losses[best])
    assert {"eval_perplexity", "exact_match", "rougeL", "base_eval_loss"} <= manifest["metrics"].keys()
    assert list((run / "tensorboard").iterdir())


def test_pairs_are_learned_on_two_workers(cluster: Shell, project: Path) -> None:
    rows = [{"prompt": f"say {i}", "chosen": f"fox {i}", "rejected": "the lazy dog " * (1 + i % 3)} for i in range(32)]
    (project / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (project / "dpo.py").write_text(
        "from dataclasses import replace\n"
        "from runpy import run_path\n"
        "from finetune import *\n"
        f"before = run_path({str(project / 'finetune.py')!r})['config']\n"
        f"pairs = Data(source=Jsonl({str(project / 'pairs.jsonl')!r}), processor=Preference(), validation=0.25)\n"
        "config = replace(before, name='dpo', data=pairs, objective=Dpo(), train=replace(before.train, max_steps=16))\n"
    )
    cluster.run("manta", "finetune", str(project / "dpo.py"))
    lines = metrics(project / "outputs" / "dpo")
    assert lines[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["eval_loss"] < 0.3
    assert lines[-1]["eval_accuracy"] > 0.9
    assert "eval_perplexity" not in lines[-1]


@dataclass(frozen=True)
class Served:
    url: str
    shell: Shell

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def served(cluster: Shell, project: Path) -> Iterator[Served]:
    save_lora_run(project / "runs" / "swift", project / "base")
    manifest = {"name": "swift", "base": str(project / "base"), "revision": None, "method": "lora", "created": "",
                "seconds": 1, "steps": 1, "metrics": {"loss": 1.0}}  # fmt: skip
    (project / "runs" / "swift" / "run.json").write_text(json.dumps(manifest))
    port = free_port()
    (project / "serve.py").write_text(
        "from serve import *\n"
        "config = ServeConfig(models=(ServedModel(\n"
        f"    id='tiny', source=ModelSource({str(project / 'base')!r}, dtype='fp32'),\n"
        f"    engine=Torch(max_batch=4, max_length={LENGTH}), adapters=({str(project / 'runs/*')!r},)),),\n"
        f"    port={port})\n"
    )
    output = cluster.run("manta", "serve", str(project / "serve.py"))
    assert "serving tiny, tiny:swift" in output
    yield Served(f"http://127.0.0.1:{port}", cluster)
    assert "stopped manta" in cluster.run("manta", "stop", "--all")


def test_what_is_served_is_listed_and_answers_the_openai_client(served: Served) -> None:
    assert served.shell.run("manta", "models", "--url", served.url).split() == ["tiny", "tiny:swift"]
    client = served.client()
    asked = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}
    base = client.chat.completions.create(model="tiny", **asked)
    tuned = client.chat.completions.create(model="tiny:swift", **asked)
    assert base.choices[0].message.content != tuned.choices[0].message.content
    chunks = client.chat.completions.create(model="tiny:swift", stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == tuned.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="there are: tiny, tiny:swift"):
        client.chat.completions.create(model="tiny:nope", **asked)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="tiny", messages=asked["messages"], max_tokens=10**6)
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=3).usage.completion_tokens == 3


def test_chat_on_the_command_line(served: Served) -> None:
    answer = served.shell.run("manta", "chat", "tiny:swift", "hello", "--url", served.url)
    assert answer.strip()
    assert "there are: tiny, tiny:swift" in served.shell.run(
        "manta", "chat", "tiny:nope", "hello", "--url", served.url, exit_code=2
    )


@pytest.mark.parametrize("kind", ["a stream", "a whole answer", "a whole answer, over a slow line"])
def test_clients_that_go_away_free_the_engine_behind_the_proxy(served: Served, kind: str) -> None:
    """Four endless answers take the whole batch; four others begin as soon as their clients have hung up."""
    url = f"{served.url}/v1/chat/completions"
    endless = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": LENGTH - 100,
               "stream": kind == "a stream", "temperature": 0}  # fmt: skip

    def slowly() -> Iterator[bytes]:
        body = json.dumps(endless).encode()
        yield body[:50]
        time.sleep(0.1)
        yield body[50:]

    def hang_up_soon() -> None:
        if kind == "a stream":
            with httpx.stream("POST", url, json=endless, timeout=30) as response:
                assert next(response.iter_lines()).startswith("data: ")
        elif kind == "a whole answer":
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=endless, timeout=3)
        else:
            length = {"Content-Length": str(len(json.dumps(endless))), "Content-Type": "application/json"}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, content=slowly(), headers=length, timeout=3)

    clients = [threading.Thread(target=hang_up_soon) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    with ExitStack() as places:
        others = []  # each is in its place until the last one has begun
        for _ in range(4):
            # A minute, as a busy machine may pause: none of the endless ones would have ended by then.
            stream = httpx.stream("POST", url, json=endless | {"stream": True}, timeout=60)
            others.append(places.enter_context(stream).iter_lines())
            assert next(others[-1]).startswith("data: ")


def test_a_second_deployment_of_the_same_name_replaces_the_first(served: Served, project: Path) -> None:
    served.shell.run("manta", "serve", str(project / "serve.py"), "models.0.adapters=")
    assert served.shell.run("manta", "models", "--url", served.url).split() == ["tiny"]
    served.shell.run("manta", "serve", str(project / "serve.py"))
    assert served.shell.run("manta", "models", "--url", served.url).split() == ["tiny", "tiny:swift"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.0.source.path=/nowhere", "models.0.source.path = '/nowhere': no such directory"),
        ("models.0.adapters=/nowhere/run", "no finished run there"),
        ("models.0.cpus=64", "the cluster has room for 0 (2 CPUs"),
        ("name=another", "'manta' is served here already: manta stop manta, or replace it with name=manta"),
        ("port=1", "Serve listens on 127.0.0.1:"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_leaves_what_is_served_alone(
    served: Served, project: Path, override: str, said: str
) -> None:
    output = served.shell.run("manta", "serve", str(project / "serve.py"), override, exit_code=2)
    assert said in output
    assert "Traceback" not in output
    assert served.shell.run("manta", "models", "--url", served.url).split() == ["tiny", "tiny:swift"]


def test_a_model_that_its_engine_refuses_is_one_line(served: Served, project: Path) -> None:
    output = served.shell.run(
        "manta", "serve", str(project / "serve.py"), f"models.0.engine.max_length={LENGTH * 2}", exit_code=2
    )
    assert "manta could not be deployed" in output
    assert "this model was made for at most" in output
    assert "Traceback" not in output
    served.shell.run("manta", "serve", str(project / "serve.py"))
    assert served.shell.run("manta", "models", "--url", served.url).split() == ["tiny", "tiny:swift"]


@pytest.mark.environment("ipex")
@pytest.mark.environment("openvino-export")
def test_four_engines_behind_one_ingress_and_each_lives_and_dies_by_itself(served: Served, project: Path) -> None:
    """The same model under each: three compute it, in two environments, and one passes questions on to a server."""
    own = Torch(max_batch=4, max_length=256).start(ModelSource(str(project / "base"), dtype="fp32"), cpus=1)
    with running(api({"far": []}, {"far": own.generate})) as upstream:
        source = f"source=ModelSource({str(project / 'base')!r}, dtype='fp32'), cpus=0.4"
        engines = ("torch", "Torch"), ("ipex", "Ipex"), ("openvino", "OpenVino")
        models = [f"ServedModel(id='{name}', engine={engine}(max_length=256), {source})" for name, engine in engines]
        models.append(
            f"ServedModel(id='far', engine=Upstream(url='{upstream}/v1'), source=ModelSource('far'), cpus=0.1)"
        )
        port = served.url.rpartition(":")[2]
        (project / "four.py").write_text(
            f"from serve import *\nconfig = ServeConfig(models=({', '.join(models)}), port={port})\n"
        )
        served.shell.run("manta", "serve", str(project / "four.py"))
        names = [*(name for name, _ in engines), "far"]
        client = served.client()

        def says(name: str) -> str:
            asked = {"model": name, "prompt": "the quick brown fox", "temperature": 0, "max_tokens": 12}
            return client.completions.create(**asked).choices[0].text

        def is_back(name: str) -> bool:
            try:
                return says(name) == answer
            except openai.InternalServerError:
                return False

        answer = says("torch")
        assert answer
        assert {says(name) for name in names} == {answer}
        for name in names:
            replica(name).kill()
            assert {says(other) for other in names if other != name} == {answer}
            until(lambda name=name: is_back(name), seconds=90, what=f"another replica of {name}")
    asyncio.run(own.close())


def replica(model: str) -> psutil.Process:
    """The process that has the model."""
    title = f"ray::ServeReplica:manta:Model:{model}"
    (found,) = (one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[0].startswith(title))
    return found
