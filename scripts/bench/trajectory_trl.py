"""TRL's side of trajectory.py, in .venv-trl: trains what the directory holds, and prints the loss of every step as JSON.

Its defaults, but for what has to be the same: no shuffling, no bf16, the settings that our side writes down. Tokens come
ready, so its tokenising and its template have no part in it. It divides by the labelled tokens of the whole step, as we do.
"""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer


class Recorded(trl.SFTTrainer):
    """Keeps the loss of every micro batch: its share in the loss of the step, unrounded."""

    micro_losses: list[float]

    def compute_loss(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = super().compute_loss(*arguments, **options)
        self.micro_losses.append(loss.item())
        return loss


def main() -> None:
    shared = Path(sys.argv[1])
    settings = json.loads((shared / "settings.json").read_text())
    base = settings.pop("base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if (shared / "adapter").exists():
        model = peft.PeftModel.from_pretrained(model, str(shared / "adapter"), is_trainable=True)
    trainer = Recorded(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(shared / "trl"),
            use_cpu=True,
            bf16=False,
            max_length=None,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            **settings,
        ),
        train_dataset=datasets.Dataset.from_json(str(shared / "tokens.jsonl"), cache_dir=str(shared / "cache")),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.micro_losses = []
    trainer.train()
    accumulate, losses = settings["gradient_accumulation_steps"], trainer.micro_losses
    print(json.dumps([sum(losses[first : first + accumulate]) for first in range(0, len(losses), accumulate)]))


if __name__ == "__main__":
    main()
