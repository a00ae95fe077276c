"""transformers' own continuous batching, in process, on the GPU where there is one."""

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from scripts.bench import load, lockstep


def main() -> None:
    options = lockstep.arguments()
    torch.set_num_threads(options.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    config = GenerationConfig(max_new_tokens=load.NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sequences = 0

    def generate(prompts: list[list[int]]) -> None:
        nonlocal sequences
        if len(prompts) != sequences:  # it is made for so many, and kept for the next ones
            model.destroy_cached_continuous_batching_manager()
            sequences = len(prompts)
        found = model.generate_batch(prompts, generation_config=config, persistent_manager=True)
        lengths = [len(one.generated_tokens) for one in found.values()]
        if lengths != [load.NEW_TOKENS] * len(prompts):
            raise ValueError(f"answers of {lengths} tokens")

    lockstep.drive(options, generate)
    model.destroy_cached_continuous_batching_manager()


if __name__ == "__main__":
    main()
