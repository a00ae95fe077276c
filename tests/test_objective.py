"""Objectives against the same formulas written out by hand in float64."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import save_model
from torch.nn import functional

from finetune import (
    Data,
    Dpo,
    FinetuneConfig,
    Full,
    Instruct,
    Jsonl,
    Lora,
    ModelSource,
    Optim,
    Orpo,
    Preference,
    Scoring,
    Sft,
    Train,
    preflight,
)
from finetune import model as models
from finetune.data import collate
from finetune.logprobs import LogProbs
from finetune.loop import make_optimizer, training_step
from finetune.objective import objective_of
from finetune.strategy import DataParallel
from finetune.tokenise import Examples, prepare
from plugins.spec import UserError
from plugins.types import IGNORE

CPU = torch.device("cpu")
ROWS = [
    {"prompt": f"say {i}", "chosen": "the fox " * (1 + i % 3) + str(i), "rejected": "no " * (1 + i % 4)}
    for i in range(12)
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    folder = tmp_path_factory.mktemp("objective")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return FinetuneConfig(
        name="test",
        model=ModelSource(str(save_model(folder / "base")), dtype="fp32"),
        data=Data(source=Jsonl(str(folder / "rows.jsonl")), processor=Preference(), max_length=128),
        train=Train(max_steps=6, batch_size=4),
        objective=Dpo(),
        output=str(folder / "outputs"),
    )


def pairs_of(config: FinetuneConfig) -> Examples:
    return prepare(config.data, models.load_tokenizer(config.model), seed=0).train


def moved(model: Any) -> Any:
    """An adapter that does something, as it will once training has begun."""
    with torch.no_grad():
        for at, (_, weight) in enumerate(named for named in model.named_parameters() if "lora_B" in named[0]):
            weight.copy_(0.05 * torch.sin(torch.arange(weight.numel()).view_as(weight) + at))
    return model


def answers_by_hand(model: Any, rows: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """[pairs, 2] log-probabilities of chosen and rejected answers, and their numbers of tokens; a row at a time."""
    sums, counts = [], []
    for index in range(len(rows)):
        for tokens, labels in rows[index]:
            with torch.no_grad():
                ids = torch.from_numpy(tokens).long()
                logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            learned = [at for at in range(1, len(labels)) if labels[at] != IGNORE]
            sums.append(sum(float(logits[at - 1, ids[at]]) for at in learned))
            counts.append(len(learned))
    return torch.tensor(sums, dtype=torch.float64).view(-1, 2), torch.tensor(counts).view(-1, 2)


def by_hand(objective: Any, policy: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    if isinstance(objective, Orpo):
        mean = (policy / counts).exp()
        odds = mean / (1 - mean)
        return -mean[:, 0].log() - objective.weight * torch.sigmoid((odds[:, 0] / odds[:, 1]).log()).log()
    if objective.loss == "ipo":
        ratios = (policy - reference) / counts
        return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * objective.beta)) ** 2
    ratios = policy - reference
    return -torch.sigmoid(objective.beta * (ratios[:, 0] - ratios[:, 1])).log()


@pytest.mark.parametrize("objective", [Dpo(), Dpo(beta=0.5, loss="ipo"), Orpo(weight=0.3)], ids=["dpo", "ipo", "orpo"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_preference_losses_are_those_of_the_papers(config: FinetuneConfig, objective: Any, layout: Any) -> None:
    config = replace(config, objective=objective)
    rows = pairs_of(config)
    model: Any = moved(models.build(config, CPU)).eval()
    with model.disable_adapter():
        reference, counts = answers_by_hand(model, rows)
    policy, _ = answers_by_hand(model, rows)
    expected = by_hand(objective, policy, reference, counts)
    logprobs = LogProbs(model, layout)
    made = objective_of(objective, logprobs)
    batch = collate([[row] for index in range(len(rows)) for row in rows[index]], layout)
    assert made.weight(batch) == len(ROWS)
    found = made.losses(logprobs, batch)
    assert found.loss.item() == pytest.approx(float(expected.sum()), rel=1e-5)
    ahead = policy - reference if isinstance(objective, Dpo) else policy / counts
    if objective == Dpo():
        assert float(found.metrics["accuracy"]) == (ahead[:, 0] > ahead[:, 1]).sum()
        assert float(found.metrics["margin"]) == pytest.approx(0.1 * float((ahead[:, 0] - ahead[:, 1]).sum()), rel=1e-4)


@pytest.mark.parametrize("method", [Lora(rank=4), Lora(rank=4, dora=True), Lora(rank=4, modules_to_save=("lm_head",))])
def test_the_first_loss_of_dpo_is_log_2_and_it_falls(config: FinetuneConfig, method: Any) -> None:
    config = replace(config, method=method, optim=Optim(lr=1e-3, warmup=0))
    rows = pairs_of(config)
    torch.manual_seed(0)
    model = models.build(config, CPU)
    logprobs = LogProbs(model, "flat")
    optimizer = make_optimizer(model, config.optim)
    batch = collate([[row] for index in range(len(rows)) for row in rows[index]], "flat")
    results = [
        training_step(
            logprobs, [batch], objective=objective_of(Dpo(), logprobs), optimizer=optimizer, strategy=DataParallel(CPU),
            clip=1.0, lr=1e-3, dtype=torch.float32,
        )
        for _ in range(10)
    ]  # fmt: skip
    assert results[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert results[-1].loss < results[0].loss
    assert results[-1].metrics["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: replace(c, method=Full()), "objective = Dpo needs method = Lora"),
        (lambda c: replace(c, method=Lora(init="olora")), "method.init = 'olora' changes the base"),
        (lambda c: replace(c, data=replace(c.data, packing=True)), "data.packing = True: the pairs of objective = Dpo"),
        (lambda c: replace(c, data=replace(c.data, long_rows="split")), "data.long_rows = 'split': the pairs"),
        (lambda c: replace(c, scoring=Scoring()), "scoring compares answers"),
        (lambda c: replace(c, train=replace(c.train, patience=2)), "train.patience needs held-out rows"),
        (lambda c: replace(c, data=replace(c.data, streaming=True), train=Train()), "train.max_steps is missing"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_config(
    config: FinetuneConfig, change: Callable[[FinetuneConfig], FinetuneConfig], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        change(config)
    assert str(caught.value).startswith(said)


def test_pairs_are_for_preferences_and_single_rows_for_sft(config: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"processor = Preference makes pairs: objective = Sft .* use Dpo or Orpo"):
        preflight.check(replace(config, objective=Sft()), tmp_path)
    instruct = Instruct(instruction="prompt", input=None, output="chosen")
    with pytest.raises(UserError, match=r"objective = Dpo learns from pairs: data\.processor = Preference makes them"):
        preflight.check(replace(config, data=replace(config.data, processor=instruct)), tmp_path)


def test_the_loss_of_sft_is_that_of_transformers(config: FinetuneConfig) -> None:
    instruct = Instruct(instruction="prompt", input=None, output="chosen")
    config = replace(config, objective=Sft(), data=replace(config.data, processor=instruct))
    rows = pairs_of(config)
    model: Any = moved(models.build(config, CPU)).eval()
    batch = collate([rows[index] for index in range(len(rows))], "padded")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    logprobs = LogProbs(model, "flat")
    flat = collate([rows[index] for index in range(len(rows))], "flat")
    made = objective_of(Sft(), logprobs)
    assert made.losses(logprobs, flat).loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert made.weight(flat) == (batch.labels != IGNORE).sum()
