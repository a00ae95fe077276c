"""The demo: teach the demo base a new skill with LoRA, on two workers. Runs on a laptop in about a minute."""

from finetune import (
    Checkpointing,
    Data,
    FinetuneConfig,
    Instruct,
    Jsonl,
    Lora,
    ModelSource,
    Optim,
    Scaling,
    Train,
)

config = FinetuneConfig(
    name="demo_lora",
    model=ModelSource("scripts/demo_base/model", dtype="fp32"),
    data=Data(
        source=Jsonl("scripts/demo_base/train.jsonl"),
        processor=Instruct(),
        validation=0.05,
        max_length=512,
    ),
    method=Lora(rank=16, alpha=32),
    optim=Optim(lr=5e-3),
    train=Train(max_steps=150, batch_size=16, eval_every=50),
    checkpoint=Checkpointing(every=50),
    scaling=Scaling(workers=2),
)
