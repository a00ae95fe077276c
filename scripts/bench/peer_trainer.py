"""The peer that most people know: transformers' Trainer in bf16, LoRA by peft, batches of 4 x 512 full rows.

`bf16=True` is autocast; the weights are loaded in fp32, under which autocast is faster on a CPU than over bf16 ones.
"""

import json
import tempfile

import peft
import torch
import transformers

from scripts.bench import contender
from scripts.bench.counted import Counted
from scripts.bench.workload import FULL_ROWS, MODEL


class CountedTrainer(Counted, transformers.Trainer):
    pass


def main() -> None:
    options = contender.arguments("transformers' Trainer").parse_args()
    transformers.set_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(options.workload / MODEL, dtype=torch.float32)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    lines = (options.workload / FULL_ROWS).read_text().splitlines()
    rows = [{"input_ids": ids, "labels": ids} for ids in (json.loads(line)["input_ids"] for line in lines)]
    watch = contender.Stopwatch(options.warmup)
    with tempfile.TemporaryDirectory() as output:
        CountedTrainer(
            watch,
            model=peft.get_peft_model(base, lora),
            args=transformers.TrainingArguments(
                output_dir=output,
                use_cpu=True,
                bf16=True,
                per_device_train_batch_size=4,
                max_steps=options.steps,
                save_strategy="no",
                report_to="none",
                seed=0,
            ),
            train_dataset=rows,
        ).train()
    watch.report()


if __name__ == "__main__":
    main()
