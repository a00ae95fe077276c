"""The resumable state of a run <-> a directory."""

import json
from pathlib import Path

import torch

from finetune import model as models

STATE, OPTIMIZER = "state.json", "optimizer.pt"


def save(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """Write the trained weights, the optimiser's moments and the number of steps done. One rank calls this.

    Nothing else is needed: the order of the rows, the learning rate and the random numbers all follow from the step.
    """
    models.save(model, directory)
    torch.save(optimizer.state_dict(), directory / OPTIMIZER)
    (directory / STATE).write_text(json.dumps({"step": step}))


def load(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save` wrote; returns the number of steps done."""
    models.load_trained(model, directory)
    optimizer.load_state_dict(torch.load(directory / OPTIMIZER, weights_only=True, map_location="cpu"))
    step: int = json.loads((directory / STATE).read_text())["step"]
    return step
