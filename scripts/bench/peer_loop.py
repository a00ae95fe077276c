"""The peer that anybody can write: a bare torch loop, LoRA by peft, bf16 autocast over fp32 weights, batches of 4 x 512.

Frozen weights in bf16 were slower here (autocast has nothing to gain from them), so this is the loop at its best.
"""

import json

import peft
import torch
from transformers import AutoModelForCausalLM

from scripts.bench import contender
from scripts.bench.workload import FULL_ROWS, MODEL

BATCH_SIZE = 4


def main() -> None:
    options = contender.arguments("a bare torch loop").parse_args()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(options.workload / MODEL, dtype=torch.float32)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    lines = (options.workload / FULL_ROWS).read_text().splitlines()
    rows = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    watch = contender.Stopwatch(options.warmup)
    for step in range(options.steps):
        batch = rows[[(step * BATCH_SIZE + row) % len(rows) for row in range(BATCH_SIZE)]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(batch.numel(), loss.item())
    watch.report()


if __name__ == "__main__":
    main()
