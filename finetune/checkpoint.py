"""The resumable state of a run <-> a directory."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from finetune import model as models
from finetune.data import Position, Step

STATE, OPTIMIZER = "state.json", "optimizer.pt"


@dataclass(frozen=True)
class State:
    """How far a run is. `lowest` held-out loss so far, and how many evaluations since then were not below it (`stale`).

    `position` is where this rank's rows are, if they are streamed; `positions` are those of all ranks, in a checkpoint.
    """

    step: int = 0
    lowest: float | None = None
    stale: int = 0
    position: Position | None = None
    positions: tuple[Position, ...] = ()

    def after(self, step: Step) -> "State":
        return replace(self, step=self.step + 1, position=step.position)

    def evaluated(self, loss: float) -> "State":
        better = self.lowest is None or loss < self.lowest
        return replace(self, lowest=loss if better else self.lowest, stale=0 if better else self.stale + 1)

    def is_done(self, steps: int, patience: int | None) -> bool:
        return self.step >= steps or (patience is not None and self.stale >= patience)


def save(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write the trained weights, the optimiser's moments and how far the run is. One rank calls this.

    Nothing else is needed: the order of the rows, the learning rate and the random numbers all follow from the step.
    """
    models.save(model, directory)
    torch.save(optimizer.state_dict(), directory / OPTIMIZER)
    (directory / STATE).write_text(json.dumps(asdict(state)))


def load(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Restore what `save` wrote; returns how far the run was."""
    models.load_trained(model, directory)
    optimizer.load_state_dict(torch.load(directory / OPTIMIZER, weights_only=True, map_location="cpu"))
    found = json.loads((directory / STATE).read_text())
    return State(**found | {"position": None, "positions": tuple(map(tuple, found["positions"]))})
