"""Finetune a language model on Ray Train. These are the names that a config file needs."""

from finetune.config import Checkpointing, Data, Ddp, FinetuneConfig, Full, Lora, Optim, Scaling, Sft, Train
from plugins.data import Chat, Completion, Csv, Hub, Instruct, Jsonl, Parquet
from plugins.types import Example, ModelSource

__all__ = [
    "Chat", "Checkpointing", "Completion", "Csv", "Data", "Ddp", "Example", "FinetuneConfig", "Full", "Hub", "Instruct",
    "Jsonl", "Lora", "ModelSource", "Optim", "Parquet", "Scaling", "Sft", "Train",
]  # fmt: skip
