"""Which of two answers is better: direct preference optimisation of a small real model, the base as its own reference."""

from finetune import Checkpointing, Data, Dpo, FinetuneConfig, Hub, Lora, ModelSource, Optim, Preference, Train

config = FinetuneConfig(
    name="qwen2_5_0_5b_ultrafeedback",
    model=ModelSource("Qwen/Qwen2.5-0.5B-Instruct"),
    data=Data(
        source=Hub("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"),
        validation=Hub("HuggingFaceH4/ultrafeedback_binarized", split="test_prefs"),
        processor=Preference(),
        max_length=1024,
    ),
    method=Lora(rank=16, alpha=32),
    objective=Dpo(beta=0.1),
    optim=Optim(lr=2e-5),
    train=Train(max_steps=500, batch_size=2, accumulate=8, eval_every=100),
    checkpoint=Checkpointing(every=100),
)
