"""IPEX's own way, in process: `ipex.llm.optimize`, and the model's `generate`."""

import torch
from transformers import AutoModelForCausalLM

from scripts.bench import load, lockstep


def main() -> None:
    import intel_extension_for_pytorch as ipex  # after torch

    options = lockstep.arguments()
    torch.set_num_threads(options.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    model = AutoModelForCausalLM.from_pretrained(options.model, torch_dtype=dtype).eval()
    model = ipex.llm.optimize(model, dtype=dtype, inplace=True, deployment_mode=True)

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts)
        length = load.NEW_TOKENS
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )
        assert found.shape[1] == ids.shape[1] + length

    lockstep.drive(options, generate)


if __name__ == "__main__":
    main()
