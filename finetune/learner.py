"""One rank's model with all that training it takes: method, layout of its rows, objective, optimiser, strategy. No Ray."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint
from finetune import model as models
from finetune.checkpoint import State
from finetune.config import FinetuneConfig, Sft
from finetune.data import Batch, Step, evaluation_batches, streamed_steps, training_steps
from finetune.logprobs import LogProbs, choose_layout
from finetune.loop import StepResult, autocast, evaluate, make_optimizer, training_step
from finetune.objective import objective_of
from finetune.strategy import strategy_of
from finetune.tokenise import Examples
from plugins import hardware


class Learner:
    """`model` learns by `step`. `state` says how far a run is, and is the caller's to advance."""

    def __init__(self, config: FinetuneConfig, *, resume: Path | None = None, trained: Path | None = None) -> None:
        """`resume`: a checkpoint to go on from. `trained`: a run directory whose weights the model takes."""
        self.config = config
        hardware.use_cpus(config.scaling.cpus)
        self.device = hardware.device(config.scaling.gpus)
        self.dtype = hardware.compute_dtype(config.model.dtype, self.device)
        self.strategy = strategy_of(config.strategy, self.device)
        torch.manual_seed(config.train.seed)  # the same new weights on every rank
        self.model = models.build(config, self.device)
        self.optimizer = make_optimizer(self.model, config.optim)
        if trained:
            models.load_trained(self.model, trained)
        self.state = checkpoint.load(resume, self.model, self.optimizer) if resume else State()
        with autocast(self.device, self.dtype):
            self.logprobs = LogProbs(self.model, choose_layout(self.model, config), compiled=config.train.compile)
        self.objective = objective_of(config.objective, self.logprobs)
        self.ranks_model = self.strategy.wrap(self.logprobs)

    def steps(self, examples: Examples) -> Iterator[Step]:
        """This rank's steps from `state` on, without end: of `examples`, or of the stream that the config names."""
        portions: dict[str, Any] = {
            "batch_size": self.config.train.batch_size,
            "accumulate": self.config.train.accumulate,
            "rank": self.strategy.rank,
            "world_size": self.strategy.world_size,
            "seed": self.config.train.seed,
        }
        data, layout, state = self.config.data, self.logprobs.layout, self.state
        if not data.streaming:
            return training_steps(examples, data, layout, first_step=state.step, **portions)
        tokenizer = models.load_tokenizer(self.config.model)
        position = state.positions[self.strategy.rank] if state.positions else (0, 0, 0)
        return streamed_steps(data, tokenizer, layout, position=position, **portions)

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        return training_step(
            self.ranks_model,
            micro_batches,
            objective=self.objective,
            optimizer=self.optimizer,
            strategy=self.strategy,
            clip=self.config.optim.clip,
            lr=lr,
            dtype=self.dtype,
        )

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """`loss` and what else the objective tells of `examples`, over all ranks; of Sft `perplexity` too."""
        shares = evaluation_batches(
            examples,
            self.logprobs.layout,
            batch_size=self.config.train.batch_size,
            rank=self.strategy.rank,
            world_size=self.strategy.world_size,
        )
        found = evaluate(self.ranks_model, shares, objective=self.objective, strategy=self.strategy, dtype=self.dtype)
        if isinstance(self.config.objective, Sft):
            found["perplexity"] = math.exp(min(found["loss"], 700.0))  # beyond it there is no float
        return found
