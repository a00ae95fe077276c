"""A small real model on open instruction rows: an evening on a laptop's CPU, minutes on a GPU (scaling.gpus=1)."""

from finetune import Checkpointing, Data, FinetuneConfig, Hub, Instruct, Lora, ModelSource, Optim, Train

config = FinetuneConfig(
    name="qwen2_5_0_5b_dolly",
    model=ModelSource("Qwen/Qwen2.5-0.5B-Instruct"),
    data=Data(
        source=Hub("databricks/databricks-dolly-15k"),
        processor=Instruct(instruction="instruction", input="context", output="response"),
        validation=0.02,
        max_length=1024,
    ),
    method=Lora(rank=16, alpha=32, dropout=0.05),
    optim=Optim(lr=2e-4),
    train=Train(epochs=1, batch_size=4, accumulate=4, eval_every=100),
    checkpoint=Checkpointing(every=100),
)
