"""What a run will need, and whether it is there: all of it looked at before anything starts."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config import FinetuneConfig, Lora, Sft
from finetune.data import units_an_epoch
from finetune.evaluate import questions
from finetune.loop import total_steps
from finetune.lora import check_quantize
from finetune.model import load_tokenizer, outline
from finetune.tokenise import Prepared, prepare
from plugins import cluster
from plugins.data import Csv, Json, Jsonl, Mixture, Parquet, Source
from plugins.model_files import check_model_files
from plugins.runs import RESOLVED, is_run
from plugins.spec import UserError, plain
from plugins.template import Tokenizer
from plugins.types import RunManifest

log = logging.getLogger(__name__)
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
    config = replace(config, data=replace(config.data, source=_absolute(config.data.source)))
    check_model_files(config.model, "model.path")
    _check_machine(config)
    model = outline(config)
    tokenizer = load_tokenizer(config.model)
    log.info("run %s: reading the rows", config.name)
    rows = prepare(config.data, tokenizer, seed=config.train.seed)
    _check_pairs(config, rows)
    _check_fit(model, rows, config)
    if config.scoring:
        questions(rows.held_out, tokenizer, rows=1)  # that there is something to ask
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    quantize = config.method.quantize if isinstance(config.method, Lora) else None
    frozen_bytes = {"int8": 1.0, "nf4": 0.5, None: 2.0}[quantize]
    return Ready(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        rows=rows,
        steps=total_steps(config.train, units_an_epoch(rows.train, config.data), config.scaling.workers),
        weights=weights,
        trained_weights=trained,
        # A trained weight has its fp32 value, its gradient and AdamW's two moments.
        bytes_a_worker=int((weights - trained) * frozen_bytes) + trained * 16,
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


# What a resumed run may do otherwise than it began: how far it goes, what it reports, on how many workers.
RESUME_MAY_CHANGE = (
    "checkpoint",
    "scaling",
    "output",
    "scoring",
    "track",
    "train.max_steps",
    "train.epochs",
    "train.eval_every",
    "train.log_every",
    "train.patience",
)


def _check_directory(directory: Path, config: FinetuneConfig) -> None:
    above = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"output: cannot write to {directory}: {above} is not a directory that takes new files")
    if directory.exists() and any(directory.iterdir()) and not is_run(directory):
        raise UserError(f"output: {directory} holds files that are of no run; choose another output=... or name=...")
    base = Path(config.model.path).expanduser().resolve()
    if base.is_relative_to(directory.resolve()):
        raise UserError(
            f"model.path = {config.model.path!r} lies in {directory}, which this run writes: choose another name=..."
        )
    if not config.checkpoint.resume:
        return
    if RunManifest.read(directory) is not None:
        raise UserError(
            f"run {config.name!r} is finished ({directory}): choose another name=..., "
            "or start it over with checkpoint.resume=false"
        )
    if (directory / RESOLVED).exists():
        _check_same(json.loads((directory / RESOLVED).read_text()), plain(config), config.name)


def _check_same(begun: object, now: object, run: str, field: str = "") -> None:
    if field in RESUME_MAY_CHANGE:
        return
    if isinstance(begun, dict) and isinstance(now, dict) and begun.get("type") == now.get("type"):
        for name in begun.keys() & now.keys():
            _check_same(begun.get(name), now.get(name), run, f"{field}.{name}".lstrip("."))
    elif begun != now:
        raise UserError(
            f"run {run!r} was begun with {field} = {_short(begun)} and goes on so, not with {_short(now)}: "
            "choose another name=..., or start it over with checkpoint.resume=false"
        )


def _short(value: object) -> object:
    return value.get("type", value) if isinstance(value, dict) else value


def _absolute(source: Source) -> Source:
    """A source of files as a worker can read it, which runs in another directory."""
    if isinstance(source, Mixture):
        return replace(source, sources=tuple(map(_absolute, source.sources)))
    if isinstance(source, Jsonl | Json | Csv | Parquet):
        return replace(source, path=str(Path(source.path).expanduser().absolute()))
    return source


def _check_machine(config: FinetuneConfig) -> None:
    if isinstance(config.method, Lora):
        check_quantize(config.method)
    if config.train.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("train.compile needs a C++ compiler, and there is none here: install g++, or leave it out")


def _check_pairs(config: FinetuneConfig, rows: Prepared) -> None:
    objective = type(config.objective).__name__
    processor = type(config.data.processor).__name__
    pairs = rows.train.pairs
    if pairs and isinstance(config.objective, Sft):
        raise UserError(
            f"data.processor = {processor} makes pairs: objective = Sft learns single answers; use Dpo or Orpo"
        )
    if not pairs and not isinstance(config.objective, Sft):
        raise UserError(
            f"objective = {objective} learns from pairs: data.processor = Preference makes them, {processor} not"
        )


def _check_fit(model: object, rows: Prepared, config: FinetuneConfig) -> None:
    settings = model.config.get_text_config()  # type: ignore[attr-defined]
    longest = max(int((part.starts[1:] - part.starts[:-1]).max(initial=0)) for part in (rows.train, rows.held_out))
    positions = getattr(settings, "max_position_embeddings", None)
    if config.data.streaming:
        longest = config.data.max_length  # rows that long may come
    if positions and longest > positions:
        raise UserError(
            f"data.max_length: rows have up to {longest} tokens, and the model has {positions} positions: "
            f"set data.max_length={positions}"
        )
    highest = max(int(part.tokens.max(initial=0)) for part in (rows.train, rows.held_out))
    if highest >= settings.vocab_size:
        raise UserError(
            f"model.path: the tokenizer makes token {highest}, but the model's vocabulary has {settings.vocab_size}: "
            "they do not belong together"
        )
