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
    a row; what is longer is, by `long_rows`, cut at the end, split into several rows, or dropped, and counted.

    `packing` fills packs of `max_length` tokens with whole rows, which do not see each other; a batch then counts packs.
    `bucketing` puts rows of like length into the same step. `streaming` reads the rows during the run, in blocks, rather
    than all of them before it. `processes` tokenise, where there are rows enough (None: one a core, up to 8).
    """

    source: Source
    processor: DataProcessor
    validation: float | Source = 0.0
    max_length: Annotated[int, at_least(2)] = 1024
    long_rows: Literal["truncate", "split", "drop"] = "truncate"
    packing: bool = False
    bucketing: bool = False
    streaming: bool = False
    processes: Annotated[int | None, at_least(1)] = None

    def __post_init__(self) -> None:
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            raise UserError(f"Data.validation = {self.validation}: a fraction must be from 0 to below 1")
        if self.packing and self.bucketing:
            raise UserError("Data.bucketing: packs are all of one length already; choose packing or bucketing")
        if self.streaming and self.validation and isinstance(self.validation, float):
            raise UserError(
                f"Data.validation = {self.validation}: no fraction can be held out of rows that are streamed; "
                "give a source of its own, or 0"
            )


CHANGE_BASE = ("pissa", "olora")  # these begin with an adapter that is not zero, and take it out of the base's weights


@spec
class Lora:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): the base is frozen, small matrices beside it are trained.

    `rslora` scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732), `dora` trains magnitude and direction
    apart (Liu et al. 2024, arXiv 2402.09353). `modules_to_save` are trained whole, beside the adapter: "lm_head", say.
    `init`: how A and B begin: PEFT's own way, or "gaussian", "orthogonal", or from the base's weights: "pissa" (Meng et
    al. 2024, arXiv 2404.02948), "olora" (Büyükakyüz 2024, arXiv 2406.01775). `quantize` holds the frozen base in 8 or 4
    bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): it needs the extra `quantize`, which is bitsandbytes.
    """

    rank: Annotated[int, at_least(1)] = 8
    alpha: Annotated[float, above(0)] = 16.0
    dropout: Annotated[float, between(0, 0.99)] = 0.0
    targets: Annotated[Literal["all-linear"] | tuple[str, ...], NOT_EMPTY] = "all-linear"
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    quantize: Literal["int8", "nf4"] | None = None

    def __post_init__(self) -> None:
        if self.quantize and self.init in CHANGE_BASE:
            raise UserError(f"Lora.init = {self.init!r} changes the base's weights, which Lora.quantize holds fixed")


@spec
class Full:
    """Every weight is trained."""


@spec
class Sft:
    """Supervised finetuning: cross entropy of the labelled tokens, each of them weighing the same."""


@spec
class Dpo:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) of pairs; the base is the reference.

    `beta`: how firmly it is held to the reference. `loss`: "sigmoid", or "ipo" (Azar et al. 2023, arXiv 2310.12036), whose
    margins are those of the mean token.
    """

    beta: Annotated[float, above(0)] = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"


@spec
class Orpo:
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691) of pairs; it needs no reference.

    The loss is that of the chosen answer's mean token plus `weight` times that of the odds ratio.
    """

    weight: Annotated[float, above(0)] = 0.1


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
    `patience`: stop when so many evaluations in a row have not brought the held-out loss below its lowest.
    `activation_checkpointing` computes activations again in the backward pass instead of keeping them: less memory, more
    time. `compile` lets torch.compile make the model's kernels.
    """

    max_steps: Annotated[int | None, at_least(1)] = None
    epochs: Annotated[float, above(0)] = 1.0
    batch_size: Annotated[int, at_least(1)] = 8
    accumulate: Annotated[int, at_least(1)] = 1
    eval_every: Annotated[int | None, at_least(1)] = None
    log_every: Annotated[int, at_least(1)] = 10
    patience: Annotated[int | None, at_least(1)] = None
    seed: Annotated[int, at_least(0)] = 0
    activation_checkpointing: bool = False
    compile: bool = False


@spec
class Checkpointing:
    """`every`: steps between checkpoints (None: only at the end). `keep`: how many of the newest stay.

    `resume`: go on from the last checkpoint of an unfinished run of the same name; False starts it over. `export`: which
    weights the finished run has: the last, or those with the lowest held-out loss, which are then kept besides.
    """

    every: Annotated[int | None, at_least(1)] = None
    keep: Annotated[int, at_least(1)] = 2
    resume: bool = True
    export: Literal["last", "best"] = "last"


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
class Track:
    """Where metrics go besides metrics.jsonl: `wandb` names a project of Weights & Biases, `tensorboard` writes event files.

    `offline`: W&B writes into the run directory only; `wandb sync` sends it later.
    """

    wandb: Annotated[str | None, NOT_EMPTY] = None
    tensorboard: bool = False
    offline: bool = False


@spec
class Scoring:
    """Answers that the finished model gives to held-out rows, against the rows' own: exact match and ROUGE.

    `rows`: how many are asked at most. `max_tokens`: of an answer. Decoding is greedy.
    """

    rows: Annotated[int, at_least(1)] = 100
    max_tokens: Annotated[int, at_least(1)] = 128


@spec
class FinetuneConfig:
    """One finetuning run. It is written to `output`/`name`/; serving knows it as `base:name`."""

    name: str
    model: ModelSource
    data: Data
    train: Train
    method: Lora | Full = Lora()
    objective: Sft | Dpo | Orpo = Sft()
    optim: Optim = Optim()
    checkpoint: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()
    strategy: Ddp = Ddp()
    scoring: Scoring | None = None
    track: Track = Track()
    output: Annotated[str, NOT_EMPTY] = "outputs"

    def __post_init__(self) -> None:
        # The name becomes a directory and a part of a model id.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(
                f"FinetuneConfig.name = {self.name!r}: letters, digits, '.', '_' and '-' only, not beginning with a sign"
            )
        objective = type(self.objective).__name__
        if isinstance(self.objective, Dpo) and isinstance(self.method, Full):
            raise UserError("objective = Dpo needs method = Lora: the base with the adapter off is its reference")
        init = self.method.init if isinstance(self.method, Lora) else "default"
        if isinstance(self.objective, Dpo) and init in CHANGE_BASE:
            raise UserError(f"method.init = {init!r} changes the base, which is the reference of objective = Dpo")
        if not isinstance(self.objective, Sft) and (self.data.packing or self.data.long_rows == "split"):
            asked = "packing = True" if self.data.packing else "long_rows = 'split'"
            raise UserError(f"data.{asked}: the pairs of objective = {objective} stay whole and are not packed")
        if not isinstance(self.objective, Sft) and self.scoring:
            raise UserError(f"scoring compares answers with the rows' own; objective = {objective} has two of each")
        if self.data.streaming and self.train.max_steps is None:
            raise UserError(
                "train.max_steps is missing: how many rows data.streaming will find is not known beforehand"
            )
        held_out = not isinstance(self.data.validation, float) or self.data.validation > 0
        for asked, wanted in {
            "train.patience": self.train.patience,
            "checkpoint.export = 'best'": self.checkpoint.export == "best",
            "scoring": self.scoring,
            "train.eval_every": self.train.eval_every,
        }.items():
            if wanted and not held_out:
                raise UserError(f"{asked} needs held-out rows: set data.validation")
        if self.train.patience and not self.train.eval_every:
            raise UserError("train.patience counts evaluations: set train.eval_every")
