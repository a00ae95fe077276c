"""The training loop on one process and on two, without Ray."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import save_model
from torch import distributed, multiprocessing
from torch.nn import functional

from finetune import Data, FinetuneConfig, Full, Instruct, Jsonl, Lora, ModelSource, Optim, Train, checkpoint, preflight
from finetune import model as models
from finetune.checkpoint import State
from finetune.data import training_steps
from finetune.learner import Learner
from finetune.logprobs import usual_attention
from finetune.loop import make_optimizer, schedule, total_steps
from finetune.tokenise import Prepared, prepare
from plugins.spec import UserError, override, plain
from plugins.types import IGNORE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    folder = tmp_path_factory.mktemp("loop")
    rows = [{"instruction": f"say {'very ' * (i % 7)}{i}", "output": "fox " * (1 + i % 5) + str(i)} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return FinetuneConfig(
        name="test",
        model=ModelSource(str(save_model(folder / "base")), dtype="fp32"),
        data=Data(source=Jsonl(str(folder / "rows.jsonl")), processor=Instruct(), validation=0.2, max_length=128),
        train=Train(max_steps=6, batch_size=8),
        optim=Optim(lr=1e-2, warmup=0),
        output=str(folder / "outputs"),
    )


@dataclass
class Trainee:
    """One rank's model and optimiser, as the worker puts them together."""

    config: FinetuneConfig
    rows: Prepared
    steps_done: int = 0
    first_seed: int = 0

    def __post_init__(self) -> None:
        train = replace(self.config.train, seed=self.first_seed)  # of new weights
        self.learner = Learner(replace(self.config, train=train))
        self.learner.config = self.config
        self.model, self.optimizer = self.learner.model, self.learner.optimizer

    def run(self, until: int) -> list[float]:
        self.learner.state = State(step=self.steps_done)
        steps, rate = self.learner.steps(self.rows.train), schedule(self.config.optim, 6)
        losses = [self.learner.step(next(steps).micro_batches, rate(at)).loss for at in range(self.steps_done, until)]
        self.steps_done = until
        return losses

    def evaluate(self) -> float:
        return self.learner.evaluate(self.rows.held_out)["loss"]


def rows_of(config: FinetuneConfig) -> Prepared:
    return prepare(config.data, models.load_tokenizer(config.model), seed=0)


def portioned(config: FinetuneConfig, batch_size: int, accumulate: int) -> FinetuneConfig:
    return replace(config, train=replace(config.train, batch_size=batch_size, accumulate=accumulate))


METHODS = {"lora": Lora(rank=4), "full": Full()}
SPLITS = [(4, 1), (2, 2)]  # batch size and accumulation of each of two ranks: 8 rows a step


def one_rank(rank: int, config: FinetuneConfig, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name, method in METHODS.items():
        for batch_size, accumulate in SPLITS:
            trainee = Trainee(portioned(replace(config, method=method), batch_size, accumulate), rows_of(config))
            results[f"{name} {batch_size} x {accumulate}"] = [*trainee.run(4), trainee.evaluate()]
            del trainee  # DDP's threads end before the process group that they use
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_batch_of_8_is_2_x_4_is_two_ranks_of_4(config: FinetuneConfig, tmp_path: Path) -> None:
    config = replace(config, optim=Optim(lr=1e-3, warmup=0))
    multiprocessing.spawn(one_rank, (config, str(tmp_path)), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for name, method in METHODS.items():
        whole = Trainee(replace(config, method=method), rows_of(config))
        expected = [*whole.run(4), whole.evaluate()]
        assert expected[3] < expected[0]
        accumulated = Trainee(portioned(replace(config, method=method), 4, 2), rows_of(config))
        assert [*accumulated.run(4), accumulated.evaluate()] == pytest.approx(expected, abs=1e-5)
        for batch_size, accumulate in SPLITS:
            for rank in ranks:
                assert rank[f"{name} {batch_size} x {accumulate}"] == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_the_mean_over_labelled_tokens_by_hand(config: FinetuneConfig) -> None:
    trainee = Trainee(config, rows_of(config))
    steps = training_steps(
        trainee.rows.train,
        config.data,
        "padded",
        batch_size=8,
        accumulate=1,
        rank=0,
        world_size=1,
        seed=0,
        first_step=0,
    )
    batch = next(steps).micro_batches[0]
    assert batch.attention_mask is not None
    total, count = 0.0, 0
    with usual_attention(trainee.model):
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            length = int(mask.sum())  # each row alone, without padding, in float64
            with torch.no_grad():
                logits = trainee.model(input_ids=ids[None, :length]).logits[0].double()
            for position in range(1, length):
                if labels[position] != IGNORE:
                    total -= functional.log_softmax(logits[position - 1], -1)[labels[position]].item()
                    count += 1
    assert trainee.run(1)[0] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("method", [Lora(rank=4), Full()], ids=["lora", "full"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(config: FinetuneConfig, method: Any, tmp_path: Path) -> None:
    config = replace(config, method=method)
    whole = Trainee(config, rows_of(config))
    losses = whole.run(6)
    begun = Trainee(config, rows_of(config))
    begun.run(3)
    checkpoint.save(tmp_path, begun.model, begun.optimizer, State(step=3))
    resumed = Trainee(config, rows_of(config), first_seed=99)  # other new weights than the run began with
    resumed.steps_done = checkpoint.load(tmp_path, resumed.model, resumed.optimizer).step
    assert resumed.run(6) == pytest.approx(losses[3:], abs=1e-6)


def test_a_run_of_streamed_rows_is_resumed_at_the_exact_row(config: FinetuneConfig, tmp_path: Path) -> None:
    data = replace(config.data, streaming=True, validation=0.0, packing=True, max_length=64)
    config = replace(config, data=data, train=replace(config.train, batch_size=2))
    rows = rows_of(config)

    def go_on(learner: Learner, steps: int) -> list[float]:
        losses = []
        taken = learner.steps(rows.train)
        for _ in range(steps):
            step = next(taken)
            losses.append(learner.step(step.micro_batches, 1e-3).loss)
            learner.state = learner.state.after(step)
        return losses

    whole = go_on(Learner(config), 7)
    begun = Learner(config)
    go_on(begun, 4)
    assert begun.state.position is not None
    checkpoint.save(tmp_path, begun.model, begun.optimizer, replace(begun.state, positions=(begun.state.position,)))
    resumed = Learner(config, resume=tmp_path)
    assert resumed.state.step == 4
    assert go_on(resumed, 3) == pytest.approx(whole[4:], abs=1e-6)


def test_lora_trains_only_the_adapter_and_full_trains_all(config: FinetuneConfig) -> None:
    lora = Trainee(replace(config, method=Lora(rank=2, targets=("q_proj",))), rows_of(config)).model
    assert {name.split(".")[-3] for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all("q_proj" in name for name, p in lora.named_parameters() if p.requires_grad)
    full = Trainee(replace(config, method=Full()), rows_of(config)).model
    assert all(p.requires_grad for p in full.parameters())


def test_a_saved_adapter_is_peft_format_that_gives_the_same_logits(config: FinetuneConfig, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainee = Trainee(config, rows_of(config))
    trainee.run(3)
    models.save(trainee.model, tmp_path)
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.path), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    trainee.model.eval()
    with torch.no_grad(), usual_attention(trainee.model):
        assert torch.allclose(fresh(ids).logits, trainee.model(ids).logits, atol=1e-6)


def test_weight_decay_spares_norms_and_biases(config: FinetuneConfig) -> None:
    model = models.build(replace(config, method=Full()), CPU)
    decayed, spared = make_optimizer(model, Optim(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])


def test_schedules_warm_up_and_come_down() -> None:
    cosine = [schedule(Optim(lr=1.0, warmup=2), 10)(step) for step in range(10)]
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert cosine[6] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert cosine == sorted(cosine[:3]) + sorted(cosine[3:], reverse=True)
    linear = [schedule(Optim(lr=1.0, warmup=0.2, schedule="linear"), 10)(step) for step in range(10)]
    assert linear[6] == pytest.approx(0.5)
    constant = [schedule(Optim(lr=1.0, warmup=0, schedule="constant"), 10)(step) for step in range(10)]
    assert constant == [1.0] * 10


def test_epochs_are_counted_in_rows_of_all_ranks() -> None:
    assert total_steps(Train(epochs=2, batch_size=4, accumulate=2), units=100, world_size=2) == 13
    assert total_steps(Train(max_steps=5, epochs=2), units=100, world_size=2) == 5
    assert total_steps(Train(epochs=0.001), units=10, world_size=1) == 1


def test_preflight_counts_and_refuses(config: FinetuneConfig, tmp_path: Path) -> None:
    ready = preflight.check(config, tmp_path)
    assert 0 < ready.trained_weights < ready.weights
    assert not ready.directory.exists()  # a look changes nothing
    node = {"CPU": 2.0, "memory": 4e9}
    preflight.check_cluster(ready, [node])
    many = replace(ready, config=replace(config, scaling=replace(config.scaling, workers=3)))
    with pytest.raises(UserError, match=r"scaling.workers = 3 .* room for 2 \(2 CPUs and 0 GPUs on 1 node\)"):
        preflight.check_cluster(many, [node])
    with pytest.raises(UserError, match="GiB each"):
        preflight.check_cluster(replace(ready, bytes_a_worker=10**12), [node])


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("tokenizer.json", "no tokenizer there"),
        ("config.json", "no config.json there"),
        ("model.safetensors", "no weights there"),
        (None, "no such directory"),
    ],
)
def test_preflight_names_what_a_model_directory_lacks(
    config: FinetuneConfig, missing: str | None, said: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    if missing:
        save_model(base)
        (base / missing).unlink()
    with pytest.raises(UserError, match=said) as caught:
        preflight.check(replace(config, model=ModelSource(str(base))), tmp_path)
    assert str(caught.value).startswith(f"model.path = '{base}'")


def test_preflight_knows_the_models_layers_and_positions(config: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.targets = 'q_prj': no such linear layer; did you mean 'q_proj'"):
        preflight.check(replace(config, method=Lora(targets=("q_prj",))), tmp_path)
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"instruction": "x", "output": "word " * 300}))
    long = replace(config, data=Data(source=Jsonl(str(rows)), processor=Instruct(), max_length=1000))
    with pytest.raises(UserError, match=r"set data\.max_length=256"):
        preflight.check(long, tmp_path)


def test_a_run_takes_no_directory_that_is_something_else(config: FinetuneConfig, tmp_path: Path) -> None:
    config = replace(config, output="runs", checkpoint=replace(config.checkpoint, resume=False))
    (tmp_path / "runs" / "test").mkdir(parents=True)
    (tmp_path / "runs" / "test" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are of no run"):
        preflight.check(config, tmp_path)
    inside = save_model(tmp_path / "runs" / "other" / "model")
    (tmp_path / "runs" / "other" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="which this run writes"):
        preflight.check(replace(config, name="other", model=ModelSource(str(inside))), tmp_path)


def test_a_resumed_run_keeps_what_it_was_begun_with(config: FinetuneConfig, tmp_path: Path) -> None:
    config = replace(config, output="runs")
    (tmp_path / "runs" / "test").mkdir(parents=True)
    (tmp_path / "runs" / "test" / "config.json").write_text(json.dumps(plain(config)))
    preflight.check(override(config, "train.max_steps=9"), tmp_path)
    with pytest.raises(UserError, match=r"begun with method\.rank = 8 and goes on so, not with 4"):
        preflight.check(override(config, "method.rank=4"), tmp_path)
    with pytest.raises(UserError, match=r"begun with method = Lora and goes on so, not with Full"):
        preflight.check(override(config, "method=Full"), tmp_path)


def test_a_finished_run_is_not_overwritten_unless_told_to(config: FinetuneConfig, tmp_path: Path) -> None:
    config = replace(config, output="runs")
    (tmp_path / "runs" / "test").mkdir(parents=True)
    (tmp_path / "runs" / "test" / "run.json").write_text(
        json.dumps({"name": "test", "base": "b", "revision": None, "method": "lora", "created": "", "seconds": 1,
                    "steps": 1, "metrics": {}})
    )  # fmt: skip
    with pytest.raises(UserError, match="run 'test' is finished"):
        preflight.check(config, tmp_path)
    preflight.check(replace(config, checkpoint=replace(config.checkpoint, resume=False)), tmp_path)
