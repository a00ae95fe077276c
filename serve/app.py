"""A config -> a Serve application, and nothing else."""

import logging
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ray
from ray import serve

from plugins import cluster
from plugins.model_files import check_model_files
from plugins.runs import Run, find_runs, read_run, same_base
from plugins.spec import UserError
from serve.config import ServeConfig, ServedModel
from serve.ingress import Ingress
from serve.model import ModelDeployment

log = logging.getLogger(__name__)
Runs = Mapping[str, str]  # adapter name -> run directory, absolute


def deploy(config: ServeConfig) -> list[str]:
    """Serve `config` on the Ray cluster that this process is connected to; returns the model ids once they answer.

    Raises UserError before anything starts, for models and runs that are not there and a cluster that is too small.
    """
    runs = find_adapters(config, cluster.output_root())
    _check_cluster(config)
    _check_port(config)
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(build(config, runs), name=config.name, route_prefix="/")
    return [name for model in config.models for name in (model.id, *(f"{model.id}:{run}" for run in runs[model.id]))]


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
    )(serve.ingress()(Ingress))
    served = {model.id: list(runs[model.id]) for model in config.models}
    return ingress.bind(served, {model.id: _deployment(model, runs[model.id]) for model in config.models})


def _deployment(model: ServedModel, runs: Runs) -> serve.Application:
    actor = {"num_cpus": model.cpus, "num_gpus": model.gpus}
    scaling = {"min_replicas": model.replicas.min, "max_replicas": model.replicas.max}
    deployment = serve.deployment(
        name=f"Model:{model.id}",
        ray_actor_options=actor | ({"runtime_env": model.runtime_env} if model.runtime_env else {}),
        autoscaling_config=scaling,
        # Beyond the batch an engine queues by itself; beyond this, waiting helps nobody.
        max_ongoing_requests=128,
        max_queued_requests=512,
    )(ModelDeployment)
    here = Path(model.source.path).expanduser().absolute()
    source = replace(model.source, path=str(here)) if model.source.is_local else model.source
    return deployment.bind(replace(model, source=source), dict(runs))


def find_adapters(config: ServeConfig, root: Path) -> dict[str, dict[str, str]]:
    """For each model id, its runs: name -> directory. `root` is what relative run directories are under."""
    found = {}
    for index, model in enumerate(config.models):
        check_model_files(model.source, f"models.{index}.source.path")
        found[model.id] = {
            run.name: str(run.path)
            for entry in model.adapters
            for run in _matching(entry, model, root, f"models.{index}.adapters")
        }
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
    return same_base(run.manifest.base, model.source.path)


def _check_cluster(config: ServeConfig) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for model in config.models:
        room = cluster.room(nodes, cpus=model.cpus, gpus=model.gpus)
        if room < model.replicas.min:
            raise UserError(
                f"model {model.id!r}: {model.replicas.min} replicas of {model.cpus:g} CPUs and {model.gpus:g} GPUs; "
                f"the cluster has room for {room} ({cluster.size(nodes)})"
            )


def _check_port(config: ServeConfig) -> None:
    if serve.status().proxies:
        return  # Serve listens already, where it was told to when it started
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(f"port = {config.port} on {config.host!r} cannot be used: {error.strerror}") from error
