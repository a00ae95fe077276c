"""Models small enough to make, train and compare in a test: random weights, real formats."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs away from the small house",
    "a language model answers a question about the weather, the sea and the mountains",
    "naïve café, 東京 and 🙂 are written with more than one byte for a letter",
    "user assistant system hello world one two three four five six seven eight nine ten",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of 384 tokens; every byte is among them, so it can write anything."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    wrapped.chat_template = chat_template
    return wrapped


def llama_config(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
        "initializer_range": 0.3,  # large, so that tokens differ in their logits and attention matters
    }
    return transformers.LlamaConfig(**(sizes | changes))


def save_model(directory: Path, config: Any = None, *, seed: int = 0, chat_template: str | None = CHATML) -> Path:
    """A model with random weights (fp32) and the tokenizer, as transformers saves them.

    It hardly ever ends an answer by itself, so that a test decides where answers end.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config or llama_config())
    with torch.no_grad():
        model.get_output_embeddings().weight[:3] = 0  # the special tokens: their logits are 0, the best is far above
    model.save_pretrained(directory)
    tokenizer(chat_template).save_pretrained(directory)
    return directory


def save_lora_run(
    run: Path, base: Path, *, seed: int = 1, rank: int = 4, chat_template: str | None = None, **lora: Any
) -> Path:
    """A run directory with an adapter that changes what `base` says; with a tokenizer where a template is given."""
    import peft

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **lora)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:  # zero at first: an adapter that does nothing
                weight.normal_(std=0.2)
            elif "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    wrapped.save_pretrained(run / "adapter")
    if chat_template is not None:
        tokenizer(chat_template).save_pretrained(run)
    return run
