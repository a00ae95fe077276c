"""Platform: what a user can do with Manta, for the command line, the web page and scripts alike.

The only module of the faces that talks to Ray Jobs, Serve and the endpoints.
"""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from plugins import cluster
from plugins.new_directory import check_free, whole
from plugins.runs import Run, find_runs, finished, is_run
from plugins.spec import UserError, choices
from plugins.types import ModelSource

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.serve.schema import ApplicationStatusOverview

    from finetune.config import FinetuneConfig
    from finetune.evaluate import Evaluation
    from finetune.merge import Dtype
    from plugins.quantize import Comparison
    from serve.config import ServeConfig

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Job:
    """A Ray job. `state` is Ray's: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    id: str
    state: str
    command: str
    started: datetime | None


@dataclass(frozen=True)
class Application:
    """What Ray Serve runs under one name. `state` is Serve's: RUNNING, DEPLOYING, DEPLOY_FAILED, ..."""

    name: str
    state: str
    message: str


@dataclass(frozen=True)
class EngineStatus:
    """An engine, an environment that it may run in (None: the main one), what that has to hold, and why it cannot, if so."""

    name: str
    environment: str | None
    needs: str
    problem: str | None


@dataclass(frozen=True)
class Status:
    size: str
    free_cpus: float
    jobs: list[Job]
    applications: list[Application]


class Platform:
    """Manta on one Ray cluster (that of $RAY_ADDRESS or of this machine) with its HTTP endpoint at `url`.

    Relative outputs are under `cluster.output_root()`. Methods raise UserError for what the user can mend.
    """

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self.url = url.rstrip("/")
        # What Ray starts is killed when the thread that started it ends, and the web page calls from threads that come
        # and go: so all connect on one that stays.
        self._connecting = ThreadPoolExecutor(1, thread_name_prefix="ray")

    # finetuning

    def finetune(
        self, config: "FinetuneConfig", *, config_file: Path | None = None, overrides: Sequence[str] = ()
    ) -> Path:
        """Run `config` here, in the foreground; returns the run directory."""
        from finetune.run import finetune

        return finetune(config, config_file=config_file, overrides=overrides)

    def preview(self, config: "FinetuneConfig", *, rows: int = 3, color: bool = False) -> Iterator[str]:
        """Lines that say what the model will see of the config's rows; `rows` of them are shown in full."""
        from finetune.preview import preview

        return preview(config, rows=rows, color=color)

    def submit(self, config_file: Path, overrides: Sequence[str] = (), *, address: str | None = None) -> str:
        """Run a config as a Ray job, which goes on by itself; returns the job's id.

        `address` None is the cluster that runs here: relative paths mean there what they mean to the caller. A job server,
        http://host:8265, gets a copy of the project, and the config has to be in it.
        """
        command = ["-m", "finetune", str(config_file), *overrides]
        if address is None:
            # Left alone, Ray has the job look for a cluster, and it may find another one of this machine.
            ours = f"RAY_ADDRESS={_gcs_address()} " if self.is_connected() else ""
            entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && {ours}{shlex.join([sys.executable, *command])}"
            runtime_env = cluster.code()
        else:
            if not config_file.resolve().is_relative_to(cluster.PROJECT):
                raise UserError(f"{config_file} is not in {cluster.PROJECT}: only the project travels to {address}")
            command[2] = str(config_file.resolve().relative_to(cluster.PROJECT))
            entrypoint = shlex.join(["python", *command])
            runtime_env = {"working_dir": str(cluster.PROJECT)}
        try:
            job: str = self._jobs(address).submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            raise UserError(f"the cluster did not take the job: {str(error).splitlines()[0]}") from error
        return job

    def runs(self, output: str = "outputs") -> list[Run]:
        """The runs under `output`, finished or not."""
        return find_runs(cluster.output_root() / output)

    def find_run(self, name: str, output: str = "outputs") -> Path:
        """The directory of run `name`: a run directory, or the name of one under `output`. Raises UserError."""
        directory = cluster.output_root() / output
        path = next((path for path in (Path(name).expanduser(), directory / name) if is_run(path)), None)
        if path is None:
            raise UserError(
                f"no run {name!r} here or in {directory}; {choices(name, [run.name for run in find_runs(directory)])}"
            )
        return path.absolute()

    def evaluate(
        self,
        runs: Sequence[str],
        *,
        data: Path | None = None,
        rows: int | None = None,
        max_tokens: int | None = None,
        base: bool = False,
        output: str = "outputs",
    ) -> list["Evaluation"]:
        """Loss and scores of finished runs, given as for `find_run`, on the rows they held out or those of `data`.

        `rows`: how many are asked at most. `base` adds the models that the runs began with.
        """
        found = [self.find_run(name, output) for name in dict.fromkeys(runs)]
        from finetune.evaluate import evaluate_runs

        return evaluate_runs(found, data=data, rows=rows, max_tokens=max_tokens, base=base)

    def export(
        self,
        run: str,
        *,
        output: str = "outputs",
        merged: Path | None = None,
        dtype: "Dtype | None" = None,
        push: str | None = None,
        private: bool = False,
    ) -> str | None:
        """Hand out a finished run: a directory, or a name under `output`.

        `merged`: its whole model is written there, weights as `dtype` (None: as the base was saved). `push`: it goes to
        this repository of the Hugging Face hub, whose address is returned: the merged model, or where there is none of
        a LoRA run the adapter.
        """
        if merged is None and push is None:
            raise UserError("export: say what to make: --merged DIR, --push REPO or both")
        if private and push is None:
            raise UserError("export: --private is about the repository of --push")
        from finetune import merge
        from finetune import push as hub

        directory = self.find_run(run, output)
        manifest = finished(directory)
        adapter = manifest.method == "lora" and merged is None
        if dtype and adapter:
            raise UserError(
                f"export: --dtype {dtype} is for a whole model, and this pushes an adapter: add --merged DIR"
            )
        if merged is not None:
            merged = merged.expanduser().absolute()
            check_free(merged, "merged")
        repo = hub.create(push, private=private) if push else None
        with tempfile.TemporaryDirectory() as scratch:
            target = merged or Path(scratch) / "export"
            with whole(target) as partial:
                if adapter:
                    hub.write_adapter(directory, manifest, partial)
                else:
                    merge.write_model(directory, manifest, partial, dtype)
                if repo:
                    (partial / "README.md").write_text(hub.model_card(manifest, repo=repo, adapter=adapter))
            return hub.upload(repo, target, f"Run {manifest.name}") if repo else None

    def quantize(
        self,
        model: str,
        *,
        engine: str,
        weights: str,
        to: Path | None = None,
        text: Path | None = None,
        output: str = "outputs",
    ) -> tuple[Path, "Comparison"]:
        """Write a model with smaller weights for `engine`; returns its directory, and what it is worth beside the original.

        `model`: a directory, a hub id, or a finished run as in `find_run`, whose adapter is merged. `to`: a new directory;
        None: one that is called after all these, here. `text`: the file that perplexity is of.
        """
        from plugins.quantize import quantize, quantizer

        spec = quantizer(engine, weights)
        directory = (to or Path(f"{Path(model).name}-{engine}-{weights}")).expanduser().absolute()
        check_free(directory, "to")
        source = ModelSource(model)
        places = (Path(model).expanduser(), cluster.output_root() / output / model)
        with tempfile.TemporaryDirectory() as scratch:
            if any(is_run(path, or_model=True) for path in places):
                source = ModelSource(str(self._whole_model(self.find_run(model, output), Path(scratch))))
            return directory, quantize(source, spec, weights, directory, text)

    def _whole_model(self, run: Path, scratch: Path) -> Path:
        """The model directory of a finished run; where that has only an adapter, it is merged into `scratch`."""
        manifest = finished(run)
        if manifest.method == "full":
            return manifest.weights(run)
        from finetune.merge import write_model

        write_model(run, manifest, scratch)
        return scratch

    # serving

    def serve(self, config: "ServeConfig") -> list[str]:
        """Deploy `config` on the cluster that runs here; returns the model ids once they answer.

        Where there is no cluster, one is started, which lives as long as this process.
        """
        from serve.app import deploy

        self.connect()
        return deploy(config)

    def serve_until_interrupted(self, config: "ServeConfig") -> None:
        """The same for a shell: returns at once where a cluster ran, else stays until Ctrl-C."""
        from serve.app import serve_until_interrupted

        serve_until_interrupted(config)

    def engines(self) -> list[EngineStatus]:
        """The engines that a config can name, one row for each environment that they may run in."""
        from plugins.engines import SPECS
        from plugins.environments import Environment

        found = []
        for spec in SPECS:
            if (own := getattr(spec, "environment", None)) is None:
                found.append(EngineStatus(spec.__name__, None, "", None))
            others = [Environment.find(own, gpus=gpus) for gpus in (0, 1)] if own else []
            if exporter := getattr(spec, "exporter", None):
                others.append(Environment.find(exporter))
            for one in dict.fromkeys(others):
                needs = ", ".join(map(str, one.needs))
                found.append(EngineStatus(spec.__name__, one.name, needs, one.problem()))
        return found

    def models(self) -> list[str]:
        """The ids of the models that the endpoint serves."""
        return [model["id"] for model in self._get("/v1/models")["data"]]

    def chat(self, model: str, messages: Sequence[dict[str, str]], **options: Any) -> Iterator[str]:
        """The answer to a conversation, in pieces as they come. `options` are OpenAI's: temperature, max_tokens, ..."""
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        waits = httpx.Timeout(600, connect=5)
        with (
            _reaching(self.url),
            httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=waits) as response,
        ):
            if response.is_error:
                response.read()
                raise UserError(_error_message(response))
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield _text(json.loads(line.removeprefix("data: ")))

    def answer(self, model: str, question: str, **options: Any) -> str:
        """The whole answer to one question."""
        return "".join(self.chat(model, [{"role": "user", "content": question}], **options))

    # the cluster

    def status(self) -> Status | None:
        """What the cluster holds and runs; None where no cluster runs."""
        import ray
        from ray import serve

        if not self.attach():
            return None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        applications = serve.status().applications
        return Status(
            size=cluster.size(nodes),
            free_cpus=ray.available_resources().get("CPU", 0.0),
            jobs=self.jobs(),
            applications=[Application(name, app.status.value, _message(app)) for name, app in applications.items()],
        )

    def jobs(self) -> list[Job]:
        """The submitted jobs of the cluster, the newest first."""
        found = [
            Job(job.submission_id, str(job.status.value), job.entrypoint, _moment(job.start_time))
            for job in self._jobs().list_jobs()
            if job.submission_id
        ]
        return sorted(found, key=lambda job: job.started.timestamp() if job.started else 0.0, reverse=True)

    def logs(self, job: str) -> str:
        """What a job has printed so far."""
        self._find_job(job)
        text: str = self._jobs().get_job_logs(job)
        return text

    def stop(self, name: str) -> str:
        """Stop a job or a served application; returns which of the two it was."""
        from ray import serve

        if not self.attach():
            raise UserError("no Ray cluster runs here")
        applications = serve.status().applications
        if name in applications:
            serve.delete(name)
            return "application"
        self._find_job(name, or_one_of=list(applications))
        self._jobs().stop_job(name)
        return "job"

    def stop_all(self) -> list[str]:
        """Stop every running job and every served application; returns their names."""
        from ray import serve

        if not self.attach():
            return []
        names = [job.id for job in self.jobs() if job.state in ("PENDING", "RUNNING")]
        for name in names:
            self._jobs().stop_job(name)
        applications = list(serve.status().applications)
        serve.shutdown()
        return names + applications

    def attach(self) -> bool:
        """Connect to the cluster that runs here; returns whether there is one."""
        return self._connecting.submit(_find_job_server_after, cluster.attach).result()

    def connect(self) -> bool:
        """The same, but where there is no cluster one is started, which lives as long as this process.

        Returns whether it was started.
        """
        return self._connecting.submit(_find_job_server_after, cluster.connect).result()

    def disconnect(self) -> None:
        """Leave the cluster, if this process is connected to one. A cluster that this process started stops."""
        if self.is_connected():
            import ray

            self._connecting.submit(ray.shutdown).result()

    def is_connected(self) -> bool:
        """Whether this process is connected to a cluster already. Unlike `attach` it costs nothing: no import of Ray."""
        # Ray's module is there but still empty while another thread imports it.
        initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
        return initialized is not None and bool(initialized())

    def _find_job(self, name: str, or_one_of: Sequence[str] = ()) -> Job:
        jobs = {job.id: job for job in self.jobs()}
        if name not in jobs:
            raise UserError(f"nothing here is called {name!r} (there are: {', '.join([*or_one_of, *jobs]) or 'none'})")
        return jobs[name]

    def _jobs(self, address: str | None = None) -> "JobSubmissionClient":
        from ray.job_submission import JobSubmissionClient

        try:
            with _without_defaults() if address else nullcontext():
                return JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            where = f"at {address}" if address else "here"
            raise UserError(f"no Ray job server answers {where}: {str(error).splitlines()[0]}") from error

    def _get(self, path: str) -> Any:
        with _reaching(self.url):
            response = httpx.get(self.url + path, timeout=10)
        if response.is_error:
            raise UserError(_error_message(response))
        return response.json()


def _gcs_address() -> str:
    import ray

    address: str = ray.get_runtime_context().gcs_address
    return address


def _find_job_server_after(connect: Callable[[], bool]) -> bool:
    """Connect, and let Ray's job client ask the same cluster: by itself it takes any that runs on this machine."""
    result = connect()
    import ray
    from ray._private.worker import get_dashboard_url  # Ray tells it in public only to the one who calls ray.init

    if ray.is_initialized() and (url := get_dashboard_url()):
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", f"http://{url}")
    return result


@contextmanager
def _without_defaults() -> Iterator[None]:
    """Ray lets these variables decide over the address that its job client is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Within it, an endpoint that does not answer is the user's mistake and not a traceback."""
    try:
        yield
    except httpx.TransportError as error:
        raise UserError(f"nothing answers at {url}: start it with manta serve CONFIG, or name another --url") from error


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url} answers {response.status_code}: {response.text[:200]}"


def _message(application: "ApplicationStatusOverview") -> str:
    """What is wrong with an application: Serve has the reason at the end of what its deployments say."""
    said = {name: one.message.rstrip().splitlines() for name, one in application.deployments.items()}
    failed = [name for name, one in application.deployments.items() if "FAILED" in one.status.value and said[name]]
    return "; ".join(f"{name}: {said[name][-1]}" for name in failed) or application.message


def _text(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise UserError(chunk["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000) if milliseconds else None
