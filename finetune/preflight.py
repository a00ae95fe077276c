"""What a run will need, and whether it is there: all of it looked at before anything starts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config import FinetuneConfig
from finetune.data import Prepared, prepare
from finetune.loop import total_steps
from finetune.model import load_tokenizer, outline
from plugins import cluster
from plugins.model_files import check_model_files
from plugins.spec import UserError
from plugins.template import Tokenizer
from plugins.types import RunManifest

Resources = Mapping[str, float]
GIB = 1024**3


@dataclass(frozen=True)
class Ready:
    """A run that can start. `config` has absolute paths; `bytes_a_worker` is a lower bound: weights and optimiser."""

    config: FinetuneConfig
    directory: Path
    tokenizer: Tokenizer
    rows: Prepared
    steps: int
    weights: int
    trained_weights: int
    bytes_a_worker: int


def check(config: FinetuneConfig, root: Path) -> Ready:
    """Look at everything that needs no cluster. `root` is what a relative output is under. Raises UserError."""
    directory = root / Path(config.output).expanduser() / config.name
    _check_directory(directory, config)
    if config.model.is_local:
        here = Path(config.model.path).expanduser().absolute()
        config = replace(config, model=replace(config.model, path=str(here)))
    check_model_files(config.model, "model.path")
    model = outline(config)
    tokenizer = load_tokenizer(config.model)
    rows = prepare(config.data, tokenizer, seed=config.train.seed)
    _check_fit(model, rows)
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen_bytes = 2 if config.scaling.gpus else 4
    return Ready(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        rows=rows,
        steps=total_steps(config.train, len(rows.train), config.scaling.workers),
        weights=weights,
        trained_weights=trained,
        # A trained weight has its fp32 value, its gradient and AdamW's two moments.
        bytes_a_worker=(weights - trained) * frozen_bytes + trained * 16,
    )


def check_cluster(ready: Ready, nodes: Sequence[Resources]) -> None:
    """Whether the workers fit on `nodes` (Ray's resources of each). Ray would wait for ever for what can never come."""
    scaling = ready.config.scaling
    room = cluster.room(nodes, cpus=scaling.cpus, gpus=scaling.gpus)
    if room < scaling.workers:
        asks = f"cpus = {scaling.cpus:g}" + (f" and gpus = {scaling.gpus:g}" if scaling.gpus else "")
        raise UserError(
            f"scaling.workers = {scaling.workers} with {asks} each: "
            f"the cluster has room for {room} ({cluster.size(nodes)})"
        )
    memory = sum(node.get("memory", 0) for node in nodes)
    if not scaling.gpus and memory and scaling.workers * ready.bytes_a_worker > memory:
        raise UserError(
            f"model.path = {ready.config.model.path!r}: {scaling.workers} workers need at least "
            f"{ready.bytes_a_worker / GIB:.1f} GiB each for weights and optimiser; the cluster has {memory / GIB:.1f} GiB"
        )


def _check_directory(directory: Path, config: FinetuneConfig) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output: {directory} is a file; a run needs a directory")
    if config.checkpoint.resume and RunManifest.read(directory) is not None:
        raise UserError(
            f"run {config.name!r} is finished ({directory}): choose another name=..., "
            "or start it over with checkpoint.resume=false"
        )
    above = next(parent for parent in directory.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"output: cannot write to {directory}: {above} is not a directory that takes new files")


def _check_fit(model: object, rows: Prepared) -> None:
    settings = model.config  # type: ignore[attr-defined]
    longest = max(int((part.starts[1:] - part.starts[:-1]).max(initial=0)) for part in (rows.train, rows.held_out))
    positions = getattr(settings, "max_position_embeddings", None)
    if positions and longest > positions:
        raise UserError(
            f"data.max_length: rows have up to {longest} tokens, and the model has {positions} positions: "
            f"set data.max_length={positions}"
        )
    highest = int(rows.train.tokens.max())
    if highest >= settings.vocab_size:
        raise UserError(
            f"model.path: the tokenizer makes token {highest}, but the model's vocabulary has {settings.vocab_size}: "
            "they do not belong together"
        )
