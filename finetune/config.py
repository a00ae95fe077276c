"""What a finetuning run is: a FinetuneConfig and its parts, and every rule about them."""

import re
from typing import Annotated, Literal

from plugins.data import DataProcessor, Source
from plugins.spec import NOT_EMPTY, UserError, above, at_least, between, spec
from plugins.types import ModelSource


@spec
class Data:
    """Rows and what becomes of them.

    `validation`: rows held out for evaluation: a fraction of `source`, or a source of their own. `max_length`: tokens of
    a row; longer rows are cut at the end, and counted.
    """

    source: Source
    processor: DataProcessor
    validation: float | Source = 0.0
    max_length: Annotated[int, at_least(2)] = 1024

    def __post_init__(self) -> None:
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            raise UserError(f"Data.validation = {self.validation}: a fraction must be from 0 to below 1")


@spec
class Lora:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): the base is frozen, small matrices beside it are trained."""

    rank: Annotated[int, at_least(1)] = 8
    alpha: Annotated[float, above(0)] = 16.0
    dropout: Annotated[float, between(0, 0.99)] = 0.0
    targets: Annotated[Literal["all-linear"] | tuple[str, ...], NOT_EMPTY] = "all-linear"


@spec
class Full:
    """Every weight is trained."""


@spec
class Sft:
    """Supervised finetuning: cross entropy of the labelled tokens, each of them weighing the same."""


@spec
class Optim:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and the course of its learning rate.

    `warmup`: steps if 1 or more, else a fraction of all steps. `clip`: the largest norm of the gradient, None for any.
    """

    lr: Annotated[float, above(0)] = 2e-4
    weight_decay: Annotated[float, at_least(0)] = 0.0
    warmup: Annotated[float, at_least(0)] = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: Annotated[float | None, above(0)] = 1.0


@spec
class Train:
    """How long, and in what portions.

    `max_steps`, where given, is the end; else `epochs`. `batch_size`: rows a worker sees in one forward (the micro
    batch). `accumulate`: micro batches a step. `eval_every`: steps between evaluations (None: only at the end).
    """

    max_steps: Annotated[int | None, at_least(1)] = None
    epochs: Annotated[float, above(0)] = 1.0
    batch_size: Annotated[int, at_least(1)] = 8
    accumulate: Annotated[int, at_least(1)] = 1
    eval_every: Annotated[int | None, at_least(1)] = None
    log_every: Annotated[int, at_least(1)] = 10
    seed: Annotated[int, at_least(0)] = 0


@spec
class Checkpointing:
    """`every`: steps between checkpoints (None: only at the end). `keep`: how many of the newest stay.

    `resume`: go on from the last checkpoint of an unfinished run of the same name; False starts it over.
    """

    every: Annotated[int | None, at_least(1)] = None
    keep: Annotated[int, at_least(1)] = 2
    resume: bool = True


@spec
class Scaling:
    """`workers` data-parallel ranks; `cpus` and `gpus` of each."""

    workers: Annotated[int, at_least(1)] = 1
    cpus: Annotated[float, above(0)] = 1.0
    gpus: Annotated[float, at_least(0)] = 0.0


@spec
class Ddp:
    """Distributed data parallel: every rank holds the whole model; gradients are averaged."""


@spec
class FinetuneConfig:
    """One finetuning run. It is written to `output`/`name`/; serving knows it as `base:name`."""

    name: str
    model: ModelSource
    data: Data
    train: Train
    method: Lora | Full = Lora()
    objective: Sft = Sft()
    optim: Optim = Optim()
    checkpoint: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()
    strategy: Ddp = Ddp()
    output: Annotated[str, NOT_EMPTY] = "outputs"

    def __post_init__(self) -> None:
        # The name becomes a directory and a part of a model id.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(
                f"FinetuneConfig.name = {self.name!r}: letters, digits, '.', '_' and '-' only, not beginning with a sign"
            )
