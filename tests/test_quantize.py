"""`manta quantize`: a model with smaller weights in a directory of its own, served from there, beside the original."""

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_ipex import of_ipex

from plugins import environments
from plugins import measure as measuring
from plugins import quantize as quantizing
from plugins.engines import Engine, Ipex, OpenVino, Torch, openvino_files, quantized_files
from plugins.environments import Environment
from plugins.measure import Measured, measure
from plugins.spec import UserError
from plugins.types import Delta, GenerateRequest, ModelSource, RunManifest
from serve.app import find_adapters
from serve.config import ServeConfig, ServedModel
from ui.cli import main

ROOT = Path(__file__).parents[1]
PROMPTS = ("the quick brown fox", "a", "hello world one two three", "東京 and 🙂")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}

READ_BY_TRANSFORMERS = """
import json, sys, torch, transformers
net = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.inference_mode():
    print(json.dumps(net(torch.tensor(json.loads(sys.argv[2]))).logits[0].tolist()))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_model(tmp_path_factory.mktemp("models") / "llama", small_models.llama_config(**SIZES))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "one two three"}]},
        {"conversations": [{"from": "human", "value": "the weather"}, {"from": "gpt", "value": "the sea"}]},
        {"instruction": "the small house", "output": "runs away"},
        *({"text": line} for line in small_models.CORPUS),
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


async def answer(engine: Engine, prompt: Any, **changes: Any) -> Delta:
    request = GenerateRequest(prompt=prompt, **({"temperature": 0.0, "max_tokens": 24} | changes))
    return Delta.joined([delta async for delta in engine.generate(request)])


def answers(spec: Any, model: Path, **changes: Any) -> list[Delta]:
    engine = spec.start(ModelSource(str(model), dtype="fp32"), 1, 0)

    async def main() -> list[Delta]:
        try:
            return await asyncio.gather(*(answer(engine, prompt, **changes) for prompt in PROMPTS))
        finally:
            await engine.close()

    return asyncio.run(main())


def table(printed: str) -> dict[str, list[float]]:
    """The numbers of each line, by its name."""
    rows = [line.split() for line in printed.splitlines()[1:3]]
    return {name: [float(size), float(perplexity), float(speed)] for name, size, _, perplexity, speed in rows}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measured here and not in a process of its own, which takes seconds to start: the models, in order."""
    models = []

    def here(spec: Any, source: ModelSource, texts: Any) -> Measured:
        models.append(source.path)
        return asyncio.run(measuring._measure(spec, source, texts))

    monkeypatch.setattr(quantizing, "measure", here)
    monkeypatch.setattr(measuring, "TIMES", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return models


# The torch engine


def test_a_model_in_int8_is_a_directory_that_answers_as_the_same_model_made_int8_on_loading(
    base: Path, text: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    assert (
        run("quantize", str(base), "--engine", "torch", "--weights", "int8", "--to", str(small), "--text", str(text))
        == 0
    )
    printed = capsys.readouterr().out
    assert str(small) in printed
    assert "engine is Torch()" in printed
    original, quantised = (table(printed)[name] for name in ("original", "quantised"))
    weights = (small / "model.safetensors").stat().st_size
    assert weights < 0.5 * (base / "model.safetensors").stat().st_size
    assert quantised[0] == pytest.approx(weights / 2**20, abs=0.06)
    assert quantised[1] == pytest.approx(original[1], rel=0.05)
    assert measured[0] == str(base)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]

    options = {"max_batch": 4, "kv_memory": "16MiB"}
    for changes in ({}, {"logprobs": 2}):
        served = answers(Torch(**options), small, **changes)
        assert served == answers(Torch(weights="int8", **options), base, **changes)
        assert served == answers(Torch(weights="int8", **options), small, **changes)
    assert [one.logprobs for one in served] != [one.logprobs for one in answers(Torch(**options), base, logprobs=2)]


def test_its_weights_are_those_of_the_model_to_half_a_step(base: Path, tmp_path: Path) -> None:
    Torch().quantize(ModelSource(str(base)), "int8", tmp_path)
    stored, original = load_file(tmp_path / "model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert stored[name].dtype == torch.int8
    made = stored[name].float() * stored[f"{name}_scale"]
    assert ((made - original[name]).abs() <= 0.501 * stored[f"{name}_scale"]).all()
    assert torch.equal(stored["lm_head.weight"], original["lm_head.weight"])


def test_transformers_refuses_it_by_the_librarys_name(base: Path, tmp_path: Path) -> None:
    Torch().quantize(ModelSource(str(base)), "int8", tmp_path)
    with pytest.raises(ImportError, match="compressed-tensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_adapters_are_served_beside_it(base: Path, tmp_path: Path) -> None:
    Torch().quantize(ModelSource(str(base)), "int8", small := made(tmp_path / "small"))
    adapter = small_models.save_lora_run(tmp_path / "run", base)
    said = []
    for spec, model in ((Torch(kv_memory="16MiB"), small), (Torch(kv_memory="16MiB", weights="int8"), base)):
        engine = spec.start(ModelSource(str(model), dtype="fp32"), 1, 0)
        try:
            asyncio.run(engine.load_adapter("run", adapter))
            said.append([asyncio.run(answer(engine, PROMPTS[0], adapter=name)) for name in (None, "run")])
        finally:
            asyncio.run(engine.close())
    assert said[0] == said[1]
    assert said[0][0] != said[0][1]


def test_a_finished_run_is_quantised_with_its_adapter_in_it(
    base: Path, text: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = small_models.save_lora_run(tmp_path / "outputs/talk", base, chat_template=small_models.CHATML)
    unfinished = ["quantize", str(adapter), "--engine", "torch", "--weights", "int8", "--text", str(text)]
    monkeypatch.chdir(tmp_path)
    assert run(*unfinished) == 2
    RunManifest(
        name="talk", base=str(base), revision=None, method="lora", created="", seconds=1.0, steps=1, metrics={}
    ).write(adapter)
    assert run(*unfinished) == 0
    small = tmp_path / "talk-torch-int8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs", small.name]

    whole = Torch(kv_memory="16MiB").start(ModelSource(str(base), dtype="fp32"), 1, 0)
    try:
        asyncio.run(whole.load_adapter("talk", adapter))
        likely = asyncio.run(answer(whole, PROMPTS[0], adapter="talk", max_tokens=0, prompt_logprobs=0))
    finally:
        asyncio.run(whole.close())
    found = answers(Torch(kv_memory="16MiB"), small, max_tokens=0, prompt_logprobs=0)[0]
    alone = answers(Torch(kv_memory="16MiB"), base, max_tokens=0, prompt_logprobs=0)[0]
    off = [sum(abs(a.logprob - b.logprob) for a, b in zip(one.prompt_logprobs[1:], likely.prompt_logprobs[1:], strict=True))
           for one in (found, alone)]  # type: ignore[operator]  # fmt: skip
    assert off[0] < 0.1 * off[1]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_half_of_it_missing_is_said(base: Path, tmp_path: Path, weights: str) -> None:
    Ipex().quantize(ModelSource(str(base)), weights, tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    held = name if weights == "int8" else f"{name}_packed"
    save_file({key: tensor for key, tensor in load_file(file).items() if key != held}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"is not whole: it has no {name}"):
        quantized_files.read(ModelSource(str(tmp_path)), torch.float32)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# IPEX


def test_in_4_bits_eight_weights_are_in_an_integer_and_64_share_a_scale(tmp_path: Path) -> None:
    """Also where the last of them are fewer. Whole again, each is the nearest of the sixteen that its scale allows."""
    sizes = SIZES | {"intermediate_size": 200}
    base = small_models.save_model(tmp_path / "base", small_models.llama_config(**sizes))
    Ipex().quantize(ModelSource(str(base)), "int4", small := made(tmp_path / "small"))
    stored, original = load_file(small / "model.safetensors"), load_file(base / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], original["lm_head.weight"])
    net = quantized_files.read(ModelSource(str(small)), torch.float32)
    for name, inputs in (("model.layers.1.mlp.down_proj", 200), ("model.layers.0.self_attn.k_proj", 128)):
        assert f"{name}.weight" not in stored
        packed, scales = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
        weight = original[f"{name}.weight"]
        assert (packed.dtype, packed.shape) == (torch.int32, (len(weight), inputs // 8))
        assert scales.shape == (len(weight), math.ceil(inputs / 64))
        assert stored[f"{name}.weight_shape"].tolist() == list(weight.shape)
        each = scales.repeat_interleave(64, 1)[:, :inputs]
        integers = torch.stack([(packed >> 4 * at) & 15 for at in range(8)], -1).flatten(1) - 8
        assert torch.equal(net.get_submodule(name).weight, integers * each)
        nearest = torch.arange(-8, 8)
        off = (weight[..., None] - nearest * each[..., None]).abs()
        assert ((weight - integers * each).abs() <= off.amin(-1) + 1e-6).all()
        step = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in weight.split(64, 1)], 1) / 7
        plain = (weight / step).round() * step
        assert (weight - integers * each).norm() < 0.95 * (weight - plain).norm()  # of steps that reach the largest


def test_both_engines_read_the_same_8_bits_and_only_ipex_4(base: Path, tmp_path: Path) -> None:
    Ipex().quantize(ModelSource(str(base)), "int8", eight := made(tmp_path / "eight"))
    Torch().quantize(ModelSource(str(base)), "int8", other := made(tmp_path / "other"))
    assert (eight / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    Ipex().quantize(ModelSource(str(base)), "int4", four := made(tmp_path / "four"))
    with pytest.raises(
        UserError, match=r"four': of compressed-tensors' formats the torch engine serves only integers of 8 "
    ):
        answers(Torch(), four)


@pytest.mark.engine
@pytest.mark.environment("ipex")
@pytest.mark.parametrize(("weights", "other", "smaller"), [("int8", "int4", 0.7), ("int4", "int8", 0.55)])
def test_ipex_serves_what_it_has_quantised_as_if_made_on_loading(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str, other: str, smaller: float
) -> None:
    small, model = tmp_path / "small", shutil.copytree(base, tmp_path / "model")
    # As most models are, so that in bf16 too both begin with the same weights.
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(model)
    options = ["--engine", "ipex", "--weights", weights, "--to", str(small), "--text", str(text)]
    assert run("quantize", str(model), *options) == 0
    printed = capsys.readouterr().out
    assert "engine is Ipex()" in printed
    original, quantised = (table(printed)[name] for name in ("original", "quantised"))
    assert quantised[0] < smaller * original[0]
    assert quantised[1] == pytest.approx(original[1], rel=0.05 if weights == "int8" else 0.5)

    # One at a time: who shares a batch decides the last digits.
    asked = [*([{"prompt": prompt, "logprobs": 2}] for prompt in PROMPTS), [{"prompt": "a", "adapter": "run"}]]
    job = {"runs": {"run": str(small_models.save_lora_run(tmp_path / "run", base))}, "asked": asked}
    *served, whole, refused = of_ipex(
        *(
            job | {"model": str(folder), "dtype": dtype, "options": {"weights": bits}}
            for dtype in ("fp32", "bf16")
            for folder, bits in ((small, "same"), (small, weights), (model, weights))
        ),
        job | {"model": str(model)},
        job | {"model": str(small), "options": {"weights": other}},
    )
    said = [[answer for group in one["said"] for answer in group] for one in (*served, whole)]
    assert said[0] == said[1] == said[2] != said[6]
    assert said[3] == said[4] == said[5] != said[0]
    assert all(isinstance(answer, dict) for answer in said[0])  # with the adapter too
    assert re.search(rf"Ipex\.weights = '{other}': '.*small' is in {weights} already; leave it at 'same'", refused)


@pytest.mark.engine
@pytest.mark.environment("vllm")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_transformers_reads_it_with_the_formats_library(base: Path, tmp_path: Path, weights: str) -> None:
    """As it is in vLLM's environment: what it finds in the files, and how it computes with that, is what is meant."""
    Ipex().quantize(ModelSource(str(base)), weights, tmp_path)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        wanted = quantized_files.read(ModelSource(str(tmp_path)), torch.float32)(ids).logits[0]
    command = [Environment.find("vllm").python, "-c", READ_BY_TRANSFORMERS, str(tmp_path), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    off = ((found - wanted).norm() / wanted.norm()).item()
    assert off < (0.05 if weights == "int8" else 1e-4)  # in int8 the activations are integers too


def test_without_ipexs_environment_nothing_is_written(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_environments(tmp_path, monkeypatch)
    monkeypatch.setattr(quantized_files, "write", None)
    to = tmp_path / "to"
    arguments = ["--engine", "ipex", "--weights", "int4", "--to", str(to), "--text", str(text)]
    assert run("quantize", str(base), *arguments) == 2
    errors = capsys.readouterr().err
    assert re.search("^manta: engine = Ipex needs an environment of its own, and .*engine-env ipex makes", errors)
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


# OpenVINO


@pytest.mark.engine
@pytest.mark.environment(OpenVino.exporter)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_model_in_openvinos_format_is_served_without_another_export(
    base: Path,
    text: Path,
    tmp_path: Path,
    measured: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
) -> None:
    small = tmp_path / f"small-{weights}-1.5"
    options = ["--engine", "openvino", "--weights", weights, "--to", str(small), "--text", str(text)]
    assert run("quantize", str(base), *options) == 0
    printed = capsys.readouterr().out
    assert "engine is OpenVino()" in printed
    original, quantised = (table(printed)[name] for name in ("original", "quantised"))
    assert quantised[0] < 0.4 * original[0]
    assert quantised[1] == pytest.approx(original[1], rel=0.05 if weights == "int8" else 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [small.name]

    made_on_loading = answers(OpenVino(weights=weights, kv_memory="16MiB"), base)  # type: ignore[arg-type]
    monkeypatch.setattr(openvino_files, "_export", None)
    assert answers(OpenVino(kv_memory="16MiB"), small) == made_on_loading
    config = ServeConfig(models=(ServedModel(id="small", source=ModelSource(str(small)), engine=OpenVino()),))
    assert find_adapters(config, tmp_path) == {"small": {}}
    with pytest.raises(UserError, match=r"source\.path = .*: it is in OpenVINO's format, which only engine=OpenVino"):
        find_adapters(replace(config, models=(replace(config.models[0], engine=Torch()),)), tmp_path)
    with pytest.raises(UserError, match=r"OpenVino\.weights = 'int8': .* is in OpenVINO's format already"):
        answers(OpenVino(weights="int8"), small)
    engine = OpenVino(kv_memory="16MiB").start(ModelSource(str(small)), 1)
    try:
        with pytest.raises(UserError, match=r"takes no adapter: serve the model that it was made of, or what manta "):
            asyncio.run(engine.load_adapter("run", small_models.save_lora_run(tmp_path / "run", base)))
    finally:
        asyncio.run(engine.close())


# What is measured


@pytest.mark.slow
def test_the_perplexity_is_the_models_own(base: Path, text: Path) -> None:
    source = ModelSource(str(base), dtype="fp32")
    texts = quantizing._texts(text, source)
    assert len(texts) == 7
    net = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    losses = []
    for ids in texts:
        row = torch.tensor([ids])
        with torch.no_grad():
            losses += torch.nn.functional.cross_entropy(net(row).logits[0, :-1], row[0, 1:], reduction="none").tolist()
    found = measure(Torch(kv_memory="16MiB"), source, texts)  # in its own process
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found.tokens_per_s > 1


def test_a_text_is_read_in_pieces_up_to_a_bound(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "long.txt"
    file.write_text("hello world " * 500)
    source = ModelSource(str(base))
    whole = quantizing._texts(file, source)
    assert {len(piece) for piece in whole[:-1]} == {256}  # as many as the model has positions
    monkeypatch.setattr(quantizing, "TOKENS", 300)
    assert [len(piece) for piece in quantizing._texts(file, source)] == [256, 44]
    assert [piece[:44] for piece in whole[:2]] == [piece[:44] for piece in quantizing._texts(file, source)]


# Mistakes


def run(*arguments: str) -> int:
    return main(arguments)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"--engine": "tensorrt"}, r"engine = 'tensorrt': choices: ipex, openvino, torch"),
        ({"--engine": "torhc"}, r"engine = 'torhc': did you mean 'torch'\? "),
        ({"--weights": "int4"}, r"weights = 'int4' for torch: .*int8"),
        ({"--weights": "int2", "--engine": "openvino"}, r"weights = 'int2' for openvino: .*int4, int8"),
        ({"--weights": "int2", "--engine": "ipex"}, r"weights = 'int2' for ipex: .*int4, int8"),
        ({"MODEL": "/nothing/there"}, r"model = '/nothing/there': no such directory"),
        ({"--to": "{base}"}, r"to = '.*llama': there are files already; name a directory that is new or empty"),
        ({"--text": "{base}/absent.txt"}, r"text = '.*absent.txt' cannot be read: "),
        ({"--text": "{base}/absent.jsonl"}, r"no file at .*absent.jsonl"),
        (
            {"--text": "{wrong}"},
            r".*wrong.jsonl line 1: a row needs one of the fields messages, conversations, instruction, ",
        ),
        ({"--text": "{empty}"}, r"text = '.*empty.txt': there is no text in it"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, str], line: str
) -> None:
    (tmp_path / "wrong.jsonl").write_text('{"words": "hello"}\n')
    (tmp_path / "empty.txt").write_text("")
    names = {"base": base, "wrong": tmp_path / "wrong.jsonl", "empty": tmp_path / "empty.txt"}
    given = {"MODEL": str(base), "--engine": "torch", "--weights": "int8", "--to": str(tmp_path / "to")} | arguments
    model = given.pop("MODEL")
    assert run("quantize", model, *(part.format(**names) for pair in given.items() for part in pair)) == 2
    errors = capsys.readouterr().err
    assert re.search(f"^manta: {line}", errors, re.MULTILINE), errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "wrong.jsonl"]


def test_a_model_that_is_not_whole_is_said_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    asked = ("quantize", str(model), "--engine", "torch", "--weights", "int8", "--to", str(tmp_path / "to"))
    (tmp_path / "system.jsonl").write_text('{"messages": [{"role": "system", "content": "hello"}]}\n')
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system messages') }}")
    assert run(*asked, "--text", str(tmp_path / "system.jsonl")) == 2
    assert "system.jsonl line 1: the chat template refuses it: no system messages" in capsys.readouterr().err
    (model / "config.json").write_text("{")
    assert run(*asked) == 2
    assert "model/config.json cannot be read: " in capsys.readouterr().err
    (model / "model.safetensors").unlink()
    assert run(*asked) == 2
    assert "no weights there" in capsys.readouterr().err


def test_of_weights_in_two_formats_one_is_counted(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    shutil.copy(model / "model.safetensors", model / "pytorch_model.bin")
    assert quantizing._size(model) == (model / "model.safetensors").stat().st_size


def test_a_model_is_quantised_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Torch().quantize(ModelSource(str(base)), "int8", made(tmp_path / "small"))
    assert run("quantize", "small", "--engine", "openvino", "--weights", "int4") == 2
    assert "model = 'small': its weights are quantised already, by compressed-tensors" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"small is quantised already \(compressed-tensors\): OpenVino takes the model"):
        openvino_files._prepare(tmp_path / "small", tmp_path)


def test_without_the_exports_environment_one_line_says_what_makes_it(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_environments(tmp_path, monkeypatch)
    to = tmp_path / "to"
    arguments = ["--engine", "openvino", "--weights", "int8", "--to", str(to), "--text", str(text)]
    assert run("quantize", str(base), *arguments) == 2
    assert "openvino-export is not there: scripts/engine-env openvino-export makes it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


def without_environments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    monkeypatch.setattr(environments, "PROJECT", folder)
    monkeypatch.setattr(sys, "prefix", str(folder / ".venv"))


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    gpt2 = small_models.save_model(tmp_path / "gpt2", config)
    with pytest.raises(UserError, match="has no linear layers that could be stored as integers"):
        Torch().quantize(ModelSource(str(gpt2)), "int8", made(tmp_path / "to"))


def test_other_compressed_weights_are_refused(base: Path, tmp_path: Path) -> None:
    Torch().quantize(ModelSource(str(base)), "int8", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    groups = settings["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["strategy"] = "group"
    for other in (groups, {}, None):
        settings["quantization_config"]["config_groups"] = other
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="serves only integers of 8 bits with a scale for each output"):
            answers(Torch(), tmp_path)


def test_one_that_fails_when_it_is_served_is_not_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(spec: Any, source: ModelSource, texts: Any) -> Measured:
        if source.path == str(base):
            return Measured(1.0, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizing, "measure", broken)
    to = tmp_path / "to"
    assert run("quantize", str(base), "--engine", "torch", "--weights", "int8", "--to", str(to)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
