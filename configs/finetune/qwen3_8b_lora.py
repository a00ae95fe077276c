"""An 8B model with LoRA, data-parallel on two GPUs of 80 GB."""

from finetune import Checkpointing, Data, FinetuneConfig, Hub, Instruct, Lora, ModelSource, Optim, Scaling, Train

config = FinetuneConfig(
    name="qwen3_8b_dolly",
    model=ModelSource("Qwen/Qwen3-8B"),
    data=Data(
        source=Hub("databricks/databricks-dolly-15k"),
        processor=Instruct(instruction="instruction", input="context", output="response"),
        validation=0.02,
        max_length=2048,
    ),
    method=Lora(rank=32, alpha=64, dropout=0.05),
    optim=Optim(lr=1e-4, warmup=50),
    train=Train(epochs=2, batch_size=2, accumulate=8, eval_every=100),
    checkpoint=Checkpointing(every=100, keep=3),
    scaling=Scaling(workers=2, cpus=8, gpus=1),
)
