"""Config files: loading, overrides, and what a mistake is answered with."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from finetune import Data, FinetuneConfig, Full, Instruct, Jsonl, Lora, ModelSource, Optim, Train
from plugins import cluster
from plugins.engines import Ipex, OpenVino, Torch
from plugins.loading import load_config
from plugins.spec import UserError, override, render
from serve import Replicas, ServeConfig, ServedModel

ROOT = Path(__file__).resolve().parents[1]
FINETUNE_CONFIGS = sorted((ROOT / "configs" / "finetune").glob("*.py"))
SERVE_CONFIGS = sorted((ROOT / "configs" / "serve").glob("*.py"))


def config(**changes: object) -> FinetuneConfig:
    parts = {
        "name": "run",
        "model": ModelSource("base"),
        "data": Data(source=Jsonl("rows.jsonl"), processor=Instruct()),
        "train": Train(max_steps=3),
    }
    return FinetuneConfig(**(parts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", FINETUNE_CONFIGS + SERVE_CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_light_and_travels_to_a_fresh_process(path: Path, tmp_path: Path) -> None:
    kind = "finetune.config.FinetuneConfig" if path in FINETUNE_CONFIGS else "serve.config.ServeConfig"
    module, _, name = kind.rpartition(".")
    load = (
        f"import sys; from pathlib import Path; from {module} import {name}\n"
        "from plugins.loading import load_config\n"
        f"config = load_config({str(path)!r}, {name})\n"
        "heavy = {'torch', 'ray', 'transformers', 'peft', 'datasets', 'gradio'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "from ray import cloudpickle  # which takes along what the file itself defines\n"
        f"Path({str(tmp_path / 'pickle')!r}).write_bytes(cloudpickle.dumps(config))\n"
    )
    run(load)
    run(f"import pickle; print(pickle.loads(open({str(tmp_path / 'pickle')!r}, 'rb').read()))")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_processor_of_the_users_own_is_pickled_by_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from finetune import *\n"
        "class Shout:\n"
        "    def __call__(self, row, tokenizer):\n"
        "        return Example([1, 2], [1, 2])\n"
        "config = FinetuneConfig(name='mine', model=ModelSource('x'), train=Train(),\n"
        "                        data=Data(source=Jsonl('r'), processor=Shout()))\n"
    )
    from ray import cloudpickle

    loaded = load_config(path, FinetuneConfig)
    (tmp_path / "pickle").write_bytes(cloudpickle.dumps(loaded))
    unpickle = f"import pickle; config = pickle.loads(open({str(tmp_path / 'pickle')!r}, 'rb').read())\n"
    assert "input_ids=[1, 2]" in run(unpickle + "print(config.data.processor({}, None))")


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("optim.lr=3e-4", lambda c: c.optim.lr, 3e-4),
        ("optim.clip=none", lambda c: c.optim.clip, None),
        ("train.max_steps=7", lambda c: c.train.max_steps, 7),
        ("checkpoint.resume=false", lambda c: c.checkpoint.resume, False),
        ("method.targets=q_proj, v_proj", lambda c: c.method.targets, ("q_proj", "v_proj")),
        ("method.targets=all-linear", lambda c: c.method.targets, "all-linear"),
        ("method=Full", lambda c: c.method, Full()),
        ("data.validation=0.25", lambda c: c.data.validation, 0.25),
        ("data.source.path=other=rows.jsonl", lambda c: c.data.source.path, "other=rows.jsonl"),
        ("model.dtype=fp32", lambda c: c.model.dtype, "fp32"),
    ],
)
def test_an_override_takes_the_type_of_its_field(assignment, field, value) -> None:  # type: ignore[no-untyped-def]
    assert field(override(config(), assignment)) == value


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("optim.lr", "write it as field=value"),
        ("optim.lrr=1", "Optim has no field 'lrr'; did you mean 'lr'?"),
        ("optm.lr=1", "FinetuneConfig has no field 'optm'; did you mean 'optim'?"),
        ("optim.lr=fast", "optim.lr = 'fast': must be a number"),
        ("optim.lr=nan", "optim.lr = nan: must be a number"),
        ("optim.lr=-1", "optim.lr = -1.0: must be above 0"),
        ("train.max_steps=0", "train.max_steps = 0: must be at least 1"),
        ("train.max_steps=1.5", "must be a whole number or None"),
        ("optim.schedule=cosin", "must be 'cosine' or 'linear' or 'constant'; did you mean 'cosine'?"),
        ("checkpoint.resume=no", "must be True or False"),
        ("method.targets=", "must be not empty"),
        ("data.validation=1.5", "a fraction must be from 0 to below 1"),
        ("name=a/b", "letters, digits"),
        ("train.seed.x=1", "has no field 'x'"),
        ("data.processor=Chat", "data.processor = 'Chat': must be DataProcessor(...)"),
    ],
)
def test_a_wrong_override_names_field_value_and_choices_in_one_line(assignment: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        override(config(), assignment)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_order_of_overrides_does_not_matter() -> None:
    together = ("train.patience=2", "train.eval_every=5", "data.validation=0.5")
    for assignments in (together, together[::-1]):
        assert override(config(), *assignments).train.patience == 2
    with pytest.raises(UserError, match=r"train\.patience needs held-out rows"):
        override(config(), "train.patience=2", "train.eval_every=5")
    changed = override(config(), "method.rank=3", "method=Lora")
    assert changed.method == Lora(rank=3)


def test_overrides_reach_into_tuples() -> None:
    served = ServeConfig(models=(ServedModel(id="a", source=ModelSource("x")),))
    assert override(served, "models.0.cpus=2").models[0].cpus == 2.0
    for wrong in ("models.1.cpus=2", "models.0=2"):
        with pytest.raises(UserError, match=r"models\."):
            override(served, wrong)


def served(**fields: Any) -> ServedModel:
    return ServedModel(id="a", source=ModelSource("x"), **fields)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Lora(rnk=8), "Lora has no field 'rnk'; did you mean 'rank'?"),
        (lambda: Lora(rank="8"), "Lora.rank = '8': must be a whole number"),
        (lambda: Lora(8), "Lora takes its fields by name"),
        (lambda: Lora(rank=True), "Lora.rank = True: must be a whole number"),
        (lambda: Data(source=Jsonl("x")), "Data.processor is missing"),
        (lambda: config(method=Lora), "an instance: Lora(...)"),
        (lambda: config(model="gpt2"), "FinetuneConfig.model = 'gpt2': must be ModelSource(...)"),
        (lambda: Data(source="rows.jsonl", processor=Instruct()), "Data.source = 'rows.jsonl': must be Source(...)"),
        (lambda: Replicas(min=2, max=1), "Replicas.max = 1"),
        (lambda: ServeConfig(models=()), "ServeConfig.models = (): must be not empty"),
        (lambda: ServedModel(id="a:b", source=ModelSource("x")), "ServedModel.id = 'a:b'"),
        (lambda: ServeConfig(models=[ServedModel(id="a", source=ModelSource("x"))] * 2), "two models have the id 'a'"),
        (lambda: served(engine=Torch(cuda_graphs=True)), "Torch.cuda_graphs = True: on GPUs only"),
        (lambda: served(engine=Torch(weights="int8"), gpus=1), "Torch.weights = 'int8': on CPUs only"),
        (lambda: served(engine=Ipex(), gpus=1), "ServedModel.gpus = 1: Ipex computes on CPUs only"),
        (lambda: served(engine=OpenVino(), gpus=0.5), "ServedModel.gpus = 0.5: OpenVino computes on CPUs only"),
    ],
)
def test_a_mistake_in_a_config_is_one_line_about_the_field(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_taken_as_the_field_means_them() -> None:
    assert Optim(lr=1).lr == 1.0
    assert Jsonl(Path("rows.jsonl")).path == "rows.jsonl"
    assert Lora(targets=["q_proj"]).targets == ("q_proj",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config = ", "bad.py:1: invalid syntax"),
        ("x = 1", "assigns nothing to `config`"),
        ("\nfrom finetune import Loraa", "bad.py:2: ImportError"),
        ("config = 3", "config is a int; FinetuneConfig is needed"),
        ("from finetune import *\n\nLora(rank=0)", "bad.py:3: Lora.rank = 0: must be at least 1"),
    ],
)
def test_a_mistake_in_a_config_file_names_its_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "bad.py", FinetuneConfig)
    assert said in str(caught.value)


def test_a_missing_config_file_suggests_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    with pytest.raises(UserError, match=r"did you mean .*mine\.py"):
        load_config(tmp_path / "mien.py", FinetuneConfig)


def test_the_shown_config_is_python_that_makes_the_same_config() -> None:
    names: dict[str, object] = {}
    exec("from finetune import *", names)
    exec(f"config = {render(config(method=Lora(rank=3)))}", names)
    assert names["config"] == config(method=Lora(rank=3))


def test_the_commands_answer_mistakes_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for command, config_path in (("finetune", FINETUNE_CONFIGS[0]), ("serve", SERVE_CONFIGS[0])):
        done = subprocess.run(
            [sys.executable, "-m", command, str(config_path), "nmae=x"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "did you mean 'name'?" in done.stderr


def test_print_shows_the_resolved_config_and_stops() -> None:
    command = [sys.executable, "-m", "finetune", str(FINETUNE_CONFIGS[0]), "--print", "optim.lr=0.125"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "lr=0.125" in done.stdout


def test_the_code_and_nothing_else_travels_to_a_cluster(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    create_package(str(cluster.PROJECT), tmp_path / "package.zip", excludes=cluster.EXCLUDES, include_gitignore=True)
    names = zipfile.ZipFile(tmp_path / "package.zip").namelist()
    assert {"finetune/worker.py", "serve/model.py", "plugins/engines/torch.py", "ui/client.py"} <= set(names)
    assert {name.split("/")[0] for name in names if "/" in name} == {"finetune", "serve", "plugins", "ui"}


def test_pickled_specs_stay_equal() -> None:
    assert pickle.loads(pickle.dumps(config())) == config()
