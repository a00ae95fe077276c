"""A config -> a Serve application, and nothing else."""

import logging
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ray
from ray import serve
from ray.serve.context import _get_global_client

from plugins import cluster
from plugins.engines import OpenVino, OwnEnvironment
from plugins.environments import SHORT_WAITS, Environment
from plugins.model_files import WEIGHTS, check_model_files
from plugins.runs import Run, find_runs, read_run, same_base
from plugins.spec import UserError
from serve.config import ServeConfig, ServedModel
from serve.ingress import Ingress
from serve.model import EmbeddingDeployment, ModelDeployment

log = logging.getLogger(__name__)
Runs = Mapping[str, str]  # adapter name -> run directory, absolute

# How often a replica that is to end looks whether its answers have. By itself a model's takes 2 s to see that it has none.
LEAVING_S = 0.5

# What in a runtime_env says which Python a replica runs in.
PYTHONS = {"py_executable", "pip", "uv", "conda", "image_uri", "container"}


def deploy(config: ServeConfig) -> list[str]:
    """Serve `config` on the Ray cluster that this process is connected to; returns the model ids once they answer.

    Raises UserError before anything starts, for models and runs that are not there and a cluster that is too small.
    """
    runs = find_adapters(config, cluster.output_root())
    check_environments(config)
    _check_cluster(config)
    _check_endpoint(config)
    _say_wait(config)
    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        serve.run(build(config, runs), name=config.name, route_prefix="/")
    except RuntimeError as error:
        raise UserError(f"{config.name} could not be deployed: {_reason(config.name)}") from error
    return [name for model in config.models for name in (model.id, *(f"{model.id}:{run}" for run in runs[model.id]))]


def _reason(application: str) -> str:
    """Why Serve could not start the replicas: the last line of what the replica that failed has said."""
    status = serve.status().applications[application]
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return errors[-1].rpartition("UserError: ")[2] if errors else lines[0]


def serve_until_interrupted(config: ServeConfig) -> None:
    """Deploy on the cluster that runs here and return; where one has to be started, stay until Ctrl-C and stop it again."""
    with cluster.connection() as started:
        models = deploy(config)
        log.info("serving %s on http://%s:%d/v1", ", ".join(models), config.host, config.port)
        if started:
            log.info("Ctrl-C stops it")
            threading.Event().wait()


def build(config: ServeConfig, runs: Mapping[str, Runs]) -> serve.Application:
    """The application graph: the ingress over one deployment for each model."""
    ingress = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": 0},  # it only forwards: on a laptop the cores belong to the models
        max_ongoing_requests=1000,
        max_queued_requests=2000,
        graceful_shutdown_wait_loop_s=LEAVING_S,
    )(serve.ingress()(Ingress))
    served = {model.id: list(runs[model.id]) for model in config.models if not model.makes_embeddings}
    return ingress.bind(served, {model.id: _deployment(model, runs[model.id]) for model in config.models})


def _deployment(model: ServedModel, runs: Runs) -> serve.Application:
    own = model.runtime_env or {}
    environment = _environment(model)
    place = {"py_executable": environment.python} if environment else {}
    actor = {
        "num_cpus": model.cpus,
        "num_gpus": model.gpus,
        "runtime_env": own | place | {"env_vars": SHORT_WAITS | own.get("env_vars", {})},
    }
    scaling = {
        "min_replicas": model.replicas.min,
        "max_replicas": model.replicas.max,
        "target_ongoing_requests": 16,  # more in one batch, and each waits longer
    }
    deployment = serve.deployment(
        name=f"Model:{model.id}",
        ray_actor_options=actor,
        autoscaling_config=scaling,
        # Beyond the batch an engine queues by itself; beyond this, waiting helps nobody.
        max_ongoing_requests=128,
        max_queued_requests=512,
        max_constructor_retry_count=2,
        graceful_shutdown_wait_loop_s=LEAVING_S,
    )
    if model.source.is_local and not model.is_elsewhere:
        here = Path(model.source.path).expanduser().absolute()
        model = replace(model, source=replace(model.source, path=str(here)))
    if model.makes_embeddings:
        return deployment(EmbeddingDeployment).bind(model)
    return deployment(ModelDeployment).bind(model, dict(runs))


def check_environments(config: ServeConfig) -> None:
    """Raise UserError where an engine's own environment, or what it needs to export a model, is missing or broken."""
    for index, model in enumerate(config.models):
        if environment := _environment(model):
            environment.check(f"models.{index}.engine = {type(model.engine).__name__}")
        if isinstance(model.engine, OpenVino) and model.source.is_local:
            model.engine.check_export(model.source, f"models.{index}.source.path")


def _environment(model: ServedModel) -> Environment | None:
    """What its replicas run in, where that is neither what runs here nor made by Ray as the config says."""
    if not isinstance(model.engine, OwnEnvironment) or PYTHONS & (model.runtime_env or {}).keys():
        return None
    return Environment.find(model.engine.environment, gpus=model.gpus)


def find_adapters(config: ServeConfig, root: Path) -> dict[str, dict[str, str]]:
    """For each model id, its runs: name -> directory. `root` is what relative run directories are under."""
    found = {}
    for index, model in enumerate(config.models):
        if not model.is_elsewhere:
            files = getattr(model.engine, "files", WEIGHTS)
            check_model_files(model.source, f"models.{index}.source.path", files)
        runs: dict[str, str] = {}
        for run in [
            run for entry in model.adapters for run in _matching(entry, model, root, f"models.{index}.adapters")
        ]:
            if runs.setdefault(run.name, str(run.path)) != str(run.path):
                raise UserError(
                    f"models.{index}.adapters: {run.path} and {runs[run.name]} are both called {run.name!r}"
                )
        found[model.id] = runs
    return found


def _matching(entry: str, model: ServedModel, root: Path, field: str) -> list[Run]:
    if any(mark in entry for mark in "*?["):
        pattern = (root / Path(entry).expanduser()).absolute()
        runs = [read_run(path) for path in sorted(Path("/").glob(str(pattern)[1:])) if path.is_dir()]
        return [run for run in runs if _fits(run, model)]
    run = read_run(root / Path(entry).expanduser())
    if run.manifest is None:
        finished = ", ".join(other.name for other in find_runs(run.path.parent) if other.manifest) or "none"
        raise UserError(f"{field} = {entry!r}: no finished run there (finished in {run.path.parent}: {finished})")
    if run.manifest.method != "lora":
        raise UserError(f"{field} = {entry!r}: a full finetune has no adapter; serve {run.path / 'model'} as a source")
    if not _fits(run, model):
        raise UserError(f"{field} = {entry!r}: made from {run.manifest.base!r}, not from {model.source.path!r}")
    return [run]


def _fits(run: Run, model: ServedModel) -> bool:
    if run.manifest is None or run.manifest.method != "lora":
        return False
    return same_base(run.manifest.base, model.source.path) and run.manifest.revision == model.source.revision


def _check_cluster(config: ServeConfig) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for model in config.models:
        room = cluster.room(nodes, cpus=model.cpus, gpus=model.gpus)
        if room < model.replicas.min:
            raise UserError(
                f"model {model.id!r}: {model.replicas.min} replicas of {model.cpus:g} CPUs and {model.gpus:g} GPUs; "
                f"the cluster has room for {room} ({cluster.size(nodes)})"
            )


def _say_wait(config: ServeConfig) -> None:
    wanted = sum(model.replicas.min * model.cpus for model in config.models)
    free = ray.available_resources().get("CPU", 0.0)
    if wanted > free and config.name not in serve.status().applications:
        log.info("waiting for %g CPUs: %g are free (manta status shows what runs, manta stop ends it)", wanted, free)


def _check_endpoint(config: ServeConfig) -> None:
    """One application has the endpoint, and Serve listens at one place."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        for name, application in client.get_serve_details()["applications"].items():
            if name != config.name and application["route_prefix"] == "/":
                raise UserError(f"{name!r} is served here already: manta stop {name}, or replace it with name={name}")
        host, port = client.http_config.host, client.http_config.port
        if (host, port) != (config.host, config.port):
            raise UserError(
                f"Serve listens on {host}:{port} here already: say host={host} port={port}, or manta stop --all first"
            )
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(f"port = {config.port} on {config.host!r} cannot be used: {error.strerror}") from error
