"""Finetune a language model on Ray Train. These are the names that a config file needs."""

from finetune.config import (
    Checkpointing,
    Data,
    Ddp,
    Dpo,
    FinetuneConfig,
    Full,
    Lora,
    Optim,
    Orpo,
    Scaling,
    Scoring,
    Sft,
    Track,
    Train,
)
from plugins.data import Chat, Completion, Csv, Hub, Instruct, Json, Jsonl, Mixture, Parquet, Preference
from plugins.types import Example, ModelSource, Pair

__all__ = [
    "Chat", "Checkpointing", "Completion", "Csv", "Data", "Ddp", "Dpo", "Example", "FinetuneConfig", "Full", "Hub",
    "Instruct", "Json", "Jsonl", "Lora", "Mixture", "ModelSource", "Optim", "Orpo", "Pair", "Parquet", "Preference",
    "Scaling", "Scoring", "Sft", "Track", "Train",
]  # fmt: skip
