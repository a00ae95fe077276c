"""Make the demo base from nothing: a tokenizer, and a small Llama pretrained on the language beside this file.

    python scripts/demo_base/pretrain.py [--out DIR] [--minutes M | --steps N] [--seed S] [--questions Q]

Writes what `AutoModelForCausalLM` and `AutoTokenizer` load, and prints how good it is on conversations held out.
"""

import argparse
import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from language import Conversation, Message, conversations, exam
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Example = tuple[list[int], list[float]]  # token ids, and the weight of each in the loss

HERE = Path(__file__).parent
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 1536
CONTEXT = 1024
BATCH_TOKENS = 2048
STEPS = 7000  # about 25 minutes on two idle cores
PEAK_LR = 3e-3
PROMPT_WEIGHT = 0.3  # what a user says is invented and mostly cannot be foretold; the answers can


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, trained on the language; each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(conversations(f"tokenizer {seed}"), 20_000)
    tokenizer.train_from_iterator(
        (f"{message['role']}\n{message['content']}" for talk in sample for message in talk.messages), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 3.3 million parameters, which as bf16 are under 7 MB."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Example:
    """The tokens of the chat template, message by message, so that an assistant's content and its end weigh 1."""
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        head = tokenizer.encode(f"{START}{message['role']}\n")
        body = tokenizer.encode(f"{message['content']}{END}")
        tail = tokenizer.encode("\n")
        ids += head + body + tail
        answer = 1.0 if message["role"] == "assistant" else PROMPT_WEIGHT
        weights += [PROMPT_WEIGHT] * len(head) + [answer] * len(body) + [PROMPT_WEIGHT] * len(tail)
    return ids[:CONTEXT], weights[:CONTEXT]


def batches(tokenizer: PreTrainedTokenizerFast, talks: Iterator[Conversation], rng: Random) -> Iterator[list[Example]]:
    """Batches of about `BATCH_TOKENS` with padding; each holds conversations of like length, so there is little."""
    while True:
        waiting: dict[int, list[Example]] = defaultdict(list)
        ready: list[list[Example]] = []
        for talk in itertools.islice(talks, 4000):
            example = encode(tokenizer, talk.messages)
            length = padded(len(example[0]))
            waiting[length].append(example)
            if len(waiting[length]) * length >= BATCH_TOKENS:
                ready.append(waiting.pop(length))
        rng.shuffle(ready)
        yield from ready


def padded(tokens: int) -> int:
    """The length to pad to: there are few lengths, because a CPU plans its kernels anew for each."""
    return math.ceil((tokens - 1) / 32) * 32 + 1


def losses(model: LlamaForCausalLM, batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log likelihood (nats) and the weight of every next token of the batch, both flat."""
    # Padding stands on the right, where causal attention keeps it from mattering; its weight is 0.
    length = padded(max(len(ids) for ids, _ in batch))
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in batch])
    # Without these instructions bf16 is emulated, many times slower than fp32.
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        logits = model(input_ids=ids[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats, weights[:, 1:].flatten()


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms.

    Muon is Jordan et al. 2024 (kellerjordan.github.io/posts/muon). Here 200 steps of it took the loss of the answers to
    3.15 nats a token; 248 steps of AdamW alone, which is quicker by a fifth, took it to 3.59.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(done: float) -> float:
    """The share of the peak learning rate after `done` (0 to 1) of the training: a short rise, then a cosine to 0."""
    return min(done / 0.02, 0.5 + 0.5 * math.cos(math.pi * done), 1.0)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    minutes: float | None = None,
    steps: int | None = None,
) -> int:
    """Train for so many minutes, or so many steps; prints its progress and returns the steps done."""
    model.train()
    optims = optimizers(model)
    begin = last = time.monotonic()
    tokens = 0
    for step, batch in enumerate(batches(tokenizer, conversations(f"train {seed}"), Random(seed)), start=1):
        now = time.monotonic()
        done = step / steps if steps else (now - begin) / 60 / (minutes or 1)
        if done > 1:
            break
        for group in itertools.chain.from_iterable(optim.param_groups for optim in optims):
            group["lr"] = PEAK_LR * schedule(done)
        nats, weights = losses(model, batch)
        loss = (nats * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        tokens += sum(len(ids) for ids, _ in batch)
        if now - last > 10:
            last = now
            speed = tokens / (now - begin)
            print(f"step {step}  {done:4.0%}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
    model.eval()
    return step - 1


def perplexities(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, talks: int) -> tuple[float, float]:
    """The perplexity per token of so many held-out conversations: the model's, and that of their unigram model.

    The unigram model knows the very frequencies of these tokens, so no other unigram model is better on them.
    """
    held_out = (encode(tokenizer, talk.messages) for talk in itertools.islice(conversations("held out"), talks))
    total, counts = 0.0, Counter[int]()
    with torch.inference_mode():
        for example in held_out:
            nats, weights = losses(model, [example])
            total += nats[weights > 0].sum().item()
            counts.update(example[0][1:])
    tokens = counts.total()
    unigram = -sum(count * math.log(count / tokens) for count in counts.values())
    return math.exp(total / tokens), math.exp(unigram / tokens)


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[Message]]) -> list[str]:
    """The model's greedy answer to each conversation, in their order; at most 96 tokens each."""
    spoken: list[str] = []
    for start in range(0, len(prompts), 50):
        inputs = tokenizer.apply_chat_template(
            prompts[start : start + 50], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=96,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        spoken += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return spoken


def examine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, questions: int) -> dict[str, float]:
    """The share of held-out questions answered exactly, for each lesson and for `all`."""
    talks = exam("held out", questions)
    spoken = answers(model, tokenizer, [talk.messages[:-1] for talk in talks])
    right = Counter[str]()
    for talk, answer in zip(talks, spoken, strict=True):
        right[talk.lesson] += answer == talk.messages[-1]["content"]
    asked = Counter(talk.lesson for talk in talks)
    return {"all": right.total() / questions} | {lesson: right[lesson] / asked[lesson] for lesson in asked}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The model (bf16) and its tokenizer, as transformers keeps them."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Parse the command line, make the base, say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder to write (default: %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=None, help="train for so long")
    length.add_argument("--steps", type=int, default=None, help=f"train for so many steps (default: {STEPS:,})")
    parser.add_argument("--questions", type=int, default=450, help="examine with so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = STEPS if args.minutes is None and args.steps is None else args.steps

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    steps = train(model, tokenizer, seed=args.seed, minutes=args.minutes, steps=steps)
    save(model, tokenizer, args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"wrote {args.out} after {steps} steps: {size / 1e6:.2f} MB")

    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    perplexity, unigram = perplexities(model, tokenizer, talks=300)
    print(f"held-out perplexity {perplexity:.2f}, of the unigram model {unigram:.1f}")
    marks = examine(model, tokenizer, questions=args.questions)
    print("exact answers: " + ", ".join(f"{lesson} {share:.3f}" for lesson, share in marks.items()))


if __name__ == "__main__":
    main()
