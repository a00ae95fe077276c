"""What a run can train, and how: kinds of LoRA, quantised bases, activation checkpointing, compiled kernels."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from small_models import llama_config, save_model

from finetune import Data, FinetuneConfig, Full, Instruct, Jsonl, Lora, ModelSource, Optim, Train, preflight
from finetune import model as models
from finetune.checkpoint import State, load, save
from finetune.data import collate
from finetune.logprobs import LogProbs, choose_layout, usual_attention
from finetune.loop import StepResult, make_optimizer, training_step
from finetune.objective import TokenCrossEntropy
from finetune.strategy import DataParallel
from finetune.tokenise import Examples
from plugins.spec import UserError
from plugins.types import Example

CPU = torch.device("cpu")
ROWS = Examples.of(Example(list(range(5 + i, 25 + 3 * i)), list(range(5 + i, 25 + 3 * i))) for i in range(4))
IDS = torch.tensor([[5, 9, 17, 33, 65, 129]])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    base = save_model(tmp_path_factory.mktemp("methods") / "base")
    return FinetuneConfig(
        name="test",
        model=ModelSource(str(base), dtype="fp32"),
        data=Data(source=Jsonl("rows.jsonl"), processor=Instruct()),
        train=Train(max_steps=9),
        optim=Optim(lr=3e-3, warmup=0),
    )


def trained(config: FinetuneConfig, steps: int = 8) -> tuple[Any, torch.optim.Optimizer, list[StepResult]]:
    torch.manual_seed(0)
    model: Any = models.build(config, CPU)
    logprobs = LogProbs(model, choose_layout(model, config), compiled=config.train.compile)
    optimizer = make_optimizer(model, config.optim)
    batch = collate([ROWS[index] for index in range(len(ROWS))], logprobs.layout)
    results = [
        training_step(
            logprobs, [batch], objective=TokenCrossEntropy(), optimizer=optimizer, strategy=DataParallel(CPU),
            clip=1.0, lr=config.optim.lr, dtype=torch.float32,
        )
        for _ in range(steps)
    ]  # fmt: skip
    return model, optimizer, results


METHODS = {
    "lora": Lora(rank=4),
    "dropout": Lora(rank=4, dropout=0.1),
    "some layers": Lora(rank=4, targets=("q_proj", "down_proj")),
    "rslora": Lora(rank=4, rslora=True),
    "dora": Lora(rank=4, dora=True),
    "whole head": Lora(rank=4, modules_to_save=("lm_head",)),
    "whole norms": Lora(rank=4, modules_to_save=("norm",)),
    "gaussian": Lora(rank=4, init="gaussian"),
    "orthogonal": Lora(rank=4, init="orthogonal"),
    "pissa": Lora(rank=4, init="pissa"),
    "pissa, rslora": Lora(rank=4, init="pissa", rslora=True),
    "olora": Lora(rank=4, init="olora"),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_kind_of_lora_learns_from_the_base_and_is_saved_for_it(
    config: FinetuneConfig, name: str, tmp_path: Path
) -> None:
    config = replace(config, method=METHODS[name])
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.path)
    model, optimizer, results = trained(config)
    assert results[0].loss == pytest.approx(trained(replace(config, method=Lora(rank=2)), 1)[2][0].loss, rel=0.02)
    assert results[-1].loss < 0.9 * results[0].loss
    save(tmp_path, model, optimizer, State(step=8))
    fresh = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")  # beside the base as it was given
    model.eval()
    with torch.no_grad(), usual_attention(model):
        expected = model(IDS).logits
        assert torch.allclose(fresh(IDS).logits, expected, atol=2e-4)
    torch.manual_seed(1)
    resumed: Any = models.build(config, CPU)
    assert load(tmp_path, resumed, make_optimizer(resumed, config.optim)).step == 8
    with torch.no_grad():
        assert torch.allclose(resumed.eval()(IDS).logits, expected, atol=2e-4)


def test_the_adapters_factor_is_rank_stable(config: FinetuneConfig) -> None:
    plain, stable = (models.build(replace(config, method=Lora(rank=4, rslora=rs)), CPU) for rs in (False, True))

    def factor(model: Any) -> float:
        return float(model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"])

    assert (factor(plain), factor(stable)) == (4, 8)  # alpha / rank, alpha / sqrt(rank)


def test_names_that_the_model_does_not_have_are_refused(config: FinetuneConfig) -> None:
    with pytest.raises(
        UserError, match=r"method\.modules_to_save = 'lmhead': the model has none; did you mean 'lm_head'"
    ):
        models.outline(replace(config, method=Lora(modules_to_save=("lmhead",))))
    models.outline(replace(config, method=Lora(init="pissa", dora=True)))  # an outline has nothing to decompose


@pytest.mark.parametrize("method", [Lora(rank=4), Full()], ids=["lora", "full"])
def test_activation_checkpointing_changes_no_number(config: FinetuneConfig, method: Any) -> None:
    config = replace(config, method=method)
    _, _, expected = trained(config)
    _, _, found = trained(replace(config, train=replace(config.train, activation_checkpointing=True)))
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-4)


@pytest.mark.engine
@pytest.mark.parametrize("method", [Lora(rank=4), Full()], ids=["lora", "full"])
def test_compiled_kernels_change_no_number(config: FinetuneConfig, method: Any) -> None:
    config = replace(config, method=method)
    _, _, expected = trained(config, 4)
    _, _, found = trained(replace(config, train=replace(config.train, compile=True)), 4)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-3)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_quantised_base_learns_and_is_smaller(config: FinetuneConfig, bits: Any, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama_config(hidden_size=128, intermediate_size=256))
    config = replace(config, model=ModelSource(str(base), dtype="fp32"), method=Lora(rank=4, quantize=bits))
    model, optimizer, results = trained(config)
    assert results[-1].loss < 0.9 * results[0].loss
    whole, _, _ = trained(replace(config, method=Lora(rank=4)), 1)
    assert 0 < model.get_memory_footprint() < 0.6 * whole.get_memory_footprint()
    save(tmp_path, model, optimizer, State(step=8))
    saved, held = peft.load_peft_weights(str(tmp_path / "adapter")), peft.get_peft_model_state_dict(model)
    assert saved.keys() == held.keys()
    assert all(torch.equal(saved[name], held[name]) for name in held)


def test_quantised_needs_its_library(config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"method\.quantize = 'nf4' needs bitsandbytes, which is not installed: pip install"
    ):
        preflight.check(replace(config, method=Lora(quantize="nf4")), tmp_path)
    with pytest.raises(UserError, match=r"Lora\.init = 'pissa' changes the base's weights"):
        Lora(quantize="int8", init="pissa")
