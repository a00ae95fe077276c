"""The peer to beat on real rows: TRL's SFTTrainer with its defaults, padded or packed. Runs in .venv-trl.

What the defaults of TRL 1.16 (transformers 5.23) come to here, read in its sources and seen in a run: batches of 8 rows or
packs; weights in fp32 under bf16 autocast (every linear layer multiplies in bf16, the loss is fp32); attention by SDPA;
activations computed again in the backward pass (`gradient_checkpointing`); fused AdamW, weight decay 0, clip 1, a rate that
falls in a line from 2e-5; the loss on the answers only, since the rows have a prompt and a completion; head and softmax in
chunks, without the logits of a whole batch in memory. `packing=True` is best fit decreasing: whole rows in packs of
max_length, the packs of a batch end to end in one sequence, kept apart by their positions.
"""

import json
import tempfile

import datasets
import peft
import trl

from scripts.bench import contender
from scripts.bench.counted import Counted
from scripts.bench.workload import MAX_LENGTH, MODEL, ROWS, chat


class CountedSft(Counted, trl.SFTTrainer):
    pass


def main() -> None:
    parser = contender.arguments("TRL's SFTTrainer")
    parser.add_argument("--packing", action="store_true")
    options = parser.parse_args()
    rows = [chat(json.loads(line)) for line in (options.workload / ROWS).read_text().splitlines()]
    watch = contender.Stopwatch(options.warmup)
    with tempfile.TemporaryDirectory() as output:
        CountedSft(
            watch,
            model=str(options.workload / MODEL),
            args=trl.SFTConfig(
                output_dir=output,
                use_cpu=True,
                packing=options.packing,
                max_length=MAX_LENGTH,
                max_steps=options.steps,
                save_strategy="no",
                report_to="none",
                seed=0,
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows]),
            peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        ).train()
    watch.report()


if __name__ == "__main__":
    main()
