"""The computations of finetune/kernels.py and the log-probabilities made with them, against plain torch and float64."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_models import llama_config
from torch.nn import functional

from finetune import Data, FinetuneConfig, Instruct, Jsonl, Lora, ModelSource, Train
from finetune import lora as loras
from finetune.data import Batch, Layout, collate
from finetune.kernels import Documents, LabelLogProbs, LoraProduct, attention
from finetune.logprobs import LogProbs, choose_layout, usual_attention
from plugins.spec import UserError
from plugins.types import IGNORE

RANDOM = np.random.default_rng(0)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(RANDOM.normal(size=shape)).to(dtype).requires_grad_()


def gradients(result: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    found = torch.autograd.grad((result * weights).sum(), leaves, retain_graph=True)
    return [result, *found]


def check(ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for found, wanted in zip(ours, expected, strict=True):
        assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("window", [None, 5, 64, 100])
@pytest.mark.parametrize("bounds", [(0, 150), (0, 1, 3, 40, 41, 120, 150), tuple(range(0, 151, 10)), (0, 64, 128, 150)])
def test_attention_is_that_of_each_document_alone(bounds: tuple[int, ...], window: int | None) -> None:
    query, key, value = leaf(6, 150, 8), leaf(2, 150, 8), leaf(2, 150, 4)
    expected = []
    for first, last in itertools.pairwise(bounds):
        place = torch.arange(last - first)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < (window or 1000))
        q, k, v = query[:, first:last], key[:, first:last], value[:, first:last]
        scores = (q @ k.repeat_interleave(3, 0).transpose(1, 2) * 0.3).masked_fill(~mask, float("-inf"))
        expected.append((scores.softmax(-1) @ v.repeat_interleave(3, 0)).transpose(0, 1))
    ours = attention(query, key, value, Documents(bounds), scale=0.3, window=window)
    leaves = (query, key, value)
    check(gradients(ours, *leaves), gradients(torch.cat(expected), *leaves), 1e-6)  # a key's gradient is summed in fp32


def test_attention_in_bf16_is_as_near_to_the_truth_as_torchs_own() -> None:
    exact = leaf(4, 300, 64), leaf(2, 300, 64), leaf(2, 300, 64)
    rough = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]

    def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=0.125, enable_gqa=True
        )[0].transpose(0, 1)

    truth = gradients(torchs(*exact), *exact)
    ours = gradients(attention(*rough, Documents((0, 300)), scale=0.125), *rough)
    theirs = gradients(torchs(*rough), *rough)
    for found, usual, true in zip(ours, theirs, truth, strict=True):
        assert (found.double() - true).norm() < 2.5 * (usual.double() - true).norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_the_lora_product_and_its_gradients(bias: bool, drops: bool) -> None:
    x, a, b = leaf(2, 7, 5), leaf(3, 5), leaf(4, 3)
    weight, added = leaf(4, 5).detach(), leaf(4).detach() if bias else None
    kept = x * torch.from_numpy(RANDOM.integers(0, 2, (2, 7, 5))) if drops else x
    ours = LoraProduct.apply(x, kept if drops else None, weight, added, a, b, 0.7)
    expected = functional.linear(x, weight, added) + 0.7 * kept @ a.T @ b.T
    check(gradients(ours, x, a, b), gradients(expected, x, a, b), 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_log_probabilities_of_labels_and_their_gradients(
    bias: bool, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.kernels.CHUNK", 4)
    hidden, weight, labels = leaf(11, 6), leaf(20, 6), torch.from_numpy(RANDOM.integers(0, 20, 11))
    added = leaf(20) if bias else None
    leaves = [hidden, *([weight] if trained else []), *([added] if added is not None and trained else [])]
    weight.requires_grad_(trained)
    ours = LabelLogProbs.apply(hidden, weight, added, labels)
    expected = functional.linear(hidden, weight, added).log_softmax(-1)[torch.arange(11), labels].float()
    check(gradients(ours, *leaves), gradients(expected, *leaves), 1e-6)


def test_a_label_that_could_hardly_be_less_likely_has_a_finite_log_probability() -> None:
    weight = torch.tensor([[1000.0], [0.0], [-1000.0]])
    found = LabelLogProbs.apply(torch.ones(3, 1), weight, None, torch.arange(3))
    assert found.tolist() == [0, -1000, -2000]


# models

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, tuple[Callable[[], Any], Layout]] = {
    "llama": (lambda: transformers.LlamaConfig(**GROUPED), "flat"),
    "llama, tied": (lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True), "flat"),
    "qwen2": (lambda: transformers.Qwen2Config(**GROUPED), "flat"),
    "qwen3": (lambda: transformers.Qwen3Config(**GROUPED, head_dim=8), "flat"),
    "mistral, window": (lambda: transformers.MistralConfig(**GROUPED, sliding_window=9), "flat"),
    "gemma": (lambda: transformers.GemmaConfig(**GROUPED, head_dim=8), "flat"),
    "gemma2, soft caps": (lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=9), "padded"),
    "gemma3, windows": (lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=9), "flat"),
    "phi3": (lambda: transformers.Phi3Config(**GROUPED), "flat"),
    "phi, a head with bias": (lambda: transformers.PhiConfig(**GROUPED), "flat"),
    "granite, scaled logits": (lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=3.0), "flat"),
    "opt": (lambda: transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0), "flat"),
    "gpt2, dropout": (lambda: transformers.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3), "padded"),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), "padded"),
    "mamba": (lambda: transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4), "padded"),
}  # fmt: skip
LENGTHS = [3, 20, 1, 33, 12]


def made(architecture: str) -> tuple[Any, Layout]:
    settings, layout = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(settings()).eval(), layout


def run_config(**changes: Any) -> FinetuneConfig:
    rows = Data(source=Jsonl("rows"), processor=Instruct(), **changes)
    return FinetuneConfig(name="x", model=ModelSource("tiny"), data=rows, train=Train(max_steps=1))


def rows() -> list[tuple[Any, Any]]:
    made = []
    for length in LENGTHS:
        tokens = RANDOM.integers(3, 128, length).astype(np.int32)
        made.append((tokens, np.where(RANDOM.random(length) < 0.6, tokens, IGNORE).astype(np.int32)))
    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_one_batch_are_as_if_each_were_alone(architecture: str) -> None:
    model, expected_layout = made(architecture)
    layout = choose_layout(model, run_config())
    assert layout == expected_layout
    data = rows()
    alone = []
    with torch.no_grad():
        for tokens, labels in data:
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].double().log_softmax(-1)
            alone += [logits[at - 1, labels[at]] for at in range(1, len(tokens)) if labels[at] != IGNORE]
        logprobs = LogProbs(model, layout)
        together = logprobs(collate([[row] for row in data], layout))
        packed = logprobs(collate([data[:2], data[2:]], layout)) if layout == "flat" else together
    assert torch.allclose(together.double(), torch.stack(alone), atol=2e-5)
    assert torch.allclose(packed.double(), torch.stack(alone), atol=2e-5)


@pytest.mark.parametrize("architecture", ["gemma2, soft caps", "gpt2, dropout"])
def test_packs_that_must_be_padded_keep_their_rows_apart_too(architecture: str) -> None:
    model, layout = made(architecture)
    assert choose_layout(model, run_config(packing=True)) == layout == "padded"
    data = rows()
    with torch.no_grad():
        logprobs = LogProbs(model, layout)
        packed = logprobs(collate([data[:2], data[2:]], layout))
        one_by_one = torch.cat([logprobs(collate([[row]], layout)) for row in data])
    assert torch.allclose(packed, one_by_one, atol=2e-5)


@pytest.mark.parametrize("architecture", ["bloom", "mamba"])
def test_a_model_that_mixes_the_rows_of_a_pack_is_not_given_any(architecture: str) -> None:
    model, _ = made(architecture)
    with pytest.raises(UserError, match=r"data\.packing: model 'tiny' mixes the rows of a pack"):
        choose_layout(model, run_config(packing=True))


def losses_of(model: Any, layout: Layout, batch: Batch) -> list[torch.Tensor]:
    model.train()
    total = -LogProbs(model, layout)(batch).sum()
    total.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [total.detach(), *found]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft_and_transformers_alone(checkpointing: bool) -> None:
    data = rows()
    results = {}
    for name in ("ours", "theirs"):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(llama_config())
        adapted: Any = loras.adapt(model, Lora(rank=4), own_layers=name == "ours")
        with torch.no_grad():
            for at, (_, weight) in enumerate(p for p in adapted.named_parameters() if "lora_B" in p[0]):
                weight.copy_(torch.sin(torch.arange(weight.numel()).view_as(weight) * 0.1 + at))
        layout: Layout = "flat" if name == "ours" else "padded"
        if checkpointing and name == "ours":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        results[name] = losses_of(adapted, layout, collate([[row] for row in data], layout))
    assert len(results["ours"]) == len(results["theirs"]) == 2 * 2 * 7 + 1
    check(results["ours"], results["theirs"], 1e-4)


def test_generation_is_transformers_own() -> None:
    model, layout = made("llama")
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    logprobs = LogProbs(model, layout)
    with usual_attention(logprobs.model):
        assert model.generate(ids, max_new_tokens=5, do_sample=False).tolist() == expected.tolist()
    logprobs(collate([[rows()[1]]], layout))  # and back
