"""The OpenVINO engine beside the torch engine, on small random models: the export, and answers token by token (fp32)."""

import asyncio
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models

from plugins import environments
from plugins.engines import Engine, OpenVino, Torch, openvino_files
from plugins.engines.batched import BatchedEngine
from plugins.engines.cache import BLOCK
from plugins.engines.openvino import OpenVinoEngine
from plugins.engines.openvino_files import exported
from plugins.spec import UserError
from plugins.types import Constraint, Delta, GenerateRequest, Message, ModelSource, RequestError

PROMPTS = (
    "the quick brown fox",
    "a",
    "hello world one two three four five six seven eight nine ten",
    "東京 and 🙂",
    "the weather, the sea and the mountains answers a question about the small house",
)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


ROOT = Path(__file__).parents[1]


def needs_export(test: Any) -> Any:
    return pytest.mark.engine(pytest.mark.environment(OpenVino.exporter)(test))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With positions that transformers 4 reads wrongly from a file of version 5."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return small_models.save_model(
        tmp_path_factory.mktemp("models") / "llama", small_models.llama_config(rope_parameters=rope)
    )


@pytest.fixture(scope="module")
def engines(base: Path) -> Iterator[tuple[Engine, Engine]]:
    """OpenVINO's, and the one that it has to agree with."""
    both = start(base), Torch(max_batch=4, kv_memory="16MiB").start(ModelSource(str(base), dtype="fp32"), cpus=1)
    yield both
    for engine in both:
        asyncio.run(engine.close())


def start(model: Path, **options: Any) -> OpenVinoEngine:
    spec = OpenVino(**({"max_batch": 4, "kv_memory": "16MiB"} | options))
    engine = spec.start(ModelSource(str(model), dtype="fp32"), cpus=1)
    assert isinstance(engine, OpenVinoEngine)
    return engine


async def answer(engine: Engine, prompt: Any, **changes: Any) -> Delta:
    request = GenerateRequest(prompt=prompt, **({"temperature": 0.0, "max_tokens": 24} | changes))
    return Delta.joined([delta async for delta in engine.generate(request)])


def ask(engine: Engine, prompt: Any, **changes: Any) -> Delta:
    return asyncio.run(asyncio.wait_for(answer(engine, prompt, **changes), 60))


def together(engine: Engine, *asked: Callable[[], Any]) -> list[Any]:
    async def main() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*(one() for one in asked), return_exceptions=True), 60)

    return asyncio.run(main())


# Answers


@needs_export
def test_answers_are_the_torch_engines_whoever_shares_the_batch(engines: tuple[Engine, Engine]) -> None:
    ours, theirs = engines
    wanted = [ask(theirs, prompt, max_tokens=100) for prompt in PROMPTS]
    asked = [lambda p=prompt: answer(ours, p, max_tokens=100) for prompt in PROMPTS]
    assert together(ours, *asked) == wanted
    assert [ask(ours, prompt, max_tokens=100) for prompt in PROMPTS] == wanted
    assert len({delta.text for delta in wanted}) == len(PROMPTS)


@needs_export
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.3, "seed": 5},
        {"temperature": 1.3, "seed": 5, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"logit_bias": {300: 50.0}},
        {"stop": ("e", "zz"), "min_tokens": 5},
        {"stop": ("e", "zz"), "include_stop": True},
        {"stop_token_ids": tuple(range(100, 200)), "ignore_eos": True},
        {"echo": True, "max_tokens": 3},
        {"constraint": Constraint("json_schema", json.dumps(SCHEMA), "response_format"), "max_tokens": 60},
        {"constraint": Constraint("regex", "[a-c]{3}[0-9]", "guided_regex")},
        {"constraint": Constraint("choice", ("yes", "no thanks"), "guided_choice")},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_parameter_does_what_it_does_in_the_torch_engine(
    engines: tuple[Engine, Engine], changes: dict[str, Any]
) -> None:
    ours, theirs = (ask(engine, PROMPTS[0], **changes) for engine in engines)
    assert ours == theirs
    assert ours != ask(engines[0], PROMPTS[0])
    company = [lambda p=prompt: answer(engines[0], p, temperature=1.0) for prompt in PROMPTS[1:]]
    assert together(engines[0], lambda: answer(engines[0], PROMPTS[0], **changes), *company)[0] == theirs


@needs_export
def test_what_is_likely_is_as_likely_as_to_the_torch_engine(engines: tuple[Engine, Engine]) -> None:
    ours, theirs = (ask(engine, PROMPTS[2], logprobs=3, prompt_logprobs=2) for engine in engines)
    assert len(ours.prompt_logprobs) == ours.prompt_tokens
    assert len(ours.logprobs) == 24
    for mine, other in zip(
        (*ours.prompt_logprobs, *ours.logprobs), (*theirs.prompt_logprobs, *theirs.logprobs), strict=True
    ):
        assert mine.token == other.token
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [top.token for top in mine.top] == [top.token for top in other.top]


@needs_export
def test_messages_and_text_of_many_bytes_come_as_they_are_made(engines: tuple[Engine, Engine]) -> None:
    messages = (Message("user", "東京 🙂?"),)

    async def main() -> list[Delta]:
        asked = GenerateRequest(prompt=messages, temperature=1.0, seed=3, max_tokens=200, ignore_eos=True)
        return [delta async for delta in engines[0].generate(asked)]

    deltas = asyncio.run(main())
    assert len(deltas) > 2
    assert deltas[0].completion_tokens < 50
    whole = ask(engines[1], messages, temperature=1.0, seed=3, max_tokens=200, ignore_eos=True)
    assert "".join(delta.text for delta in deltas) == whole.text


@needs_export
def test_a_prompt_that_begins_as_an_earlier_one_is_read_from_there_on(base: Path) -> None:
    engine = start(base)
    try:
        long = " ".join(PROMPTS)
        first = ask(engine, long)
        assert engine._batcher._scheduler.cache.hits == 0
        assert ask(engine, long) == first
        assert engine._batcher._scheduler.cache.hits > 0
    finally:
        asyncio.run(engine.close())


@needs_export
def test_answers_that_do_not_all_fit_into_memory_are_right(base: Path, engines: tuple[Engine, Engine]) -> None:
    """Rows grow, give way to others, and leave pages that rows of other lengths take."""
    engine = start(base, kv_memory="0.3MiB")
    try:
        for length in (10, 150, 30, 100):
            asked = [lambda p=prompt, n=length: answer(engine, p, max_tokens=n) for prompt in PROMPTS * 2]
            wanted = [ask(engines[1], prompt, max_tokens=length) for prompt in PROMPTS]
            assert together(engine, *asked) == wanted * 2
        cache = engine._batcher._scheduler.cache
        assert cache.allocated // BLOCK + len(cache._store._free) == cache.budget // BLOCK  # no page has been lost
    finally:
        asyncio.run(engine.close())


@needs_export
@pytest.mark.parametrize("length", [20, 33, 200])
def test_an_answer_grows_to_the_length_asked_for(base: Path, engines: tuple[Engine, Engine], length: int) -> None:
    engine = start(base, max_length=length, max_batch=2)
    try:
        full = ask(engine, PROMPTS[0], max_tokens=None, ignore_eos=True)
        assert full.prompt_tokens + full.completion_tokens == length
        assert full == ask(engines[1], PROMPTS[0], max_tokens=full.completion_tokens, ignore_eos=True)
    finally:
        asyncio.run(engine.close())


@needs_export
def test_who_leaves_is_forgotten_and_a_bad_request_fails_alone(engines: tuple[Engine, Engine]) -> None:
    ours = engines[0]
    assert isinstance(ours, BatchedEngine)

    async def leave() -> None:
        stream = ours.generate(GenerateRequest(prompt="one two", max_tokens=None, temperature=1.5, seed=3))
        await anext(stream)
        await stream.aclose()

    no_schema = Constraint("json_schema", '{"type": "nonsense"}', "response_format")
    _, good, bad, worse = together(
        ours,
        leave,
        lambda: answer(ours, PROMPTS[0]),
        lambda: answer(ours, PROMPTS[0], constraint=no_schema),
        lambda: answer(ours, (1, 5000)),
    )
    assert good == ask(engines[1], PROMPTS[0])
    assert isinstance(bad, RequestError)
    assert bad.param == "response_format"
    assert str(worse) == "prompt: 5000 is not a token of this model (0 to 383)"
    assert ours._batcher._scheduler.sequences() == []


# Adapters


@pytest.fixture(scope="module")
def runs(base: Path) -> list[Path]:
    """Three that say different things; the second has a template of its own, and is of a kind that adds more than LoRA."""
    folder = base.parent
    return [
        small_models.save_lora_run(folder / "first", base, seed=1),
        small_models.save_lora_run(folder / "second", base, seed=2, use_dora=True, chat_template=small_models.CHATML),
        small_models.save_lora_run(folder / "third", base, seed=3),
    ]


@needs_export
def test_each_request_gets_its_adapters_answer_whoever_shares_the_step(base: Path, runs: list[Path]) -> None:
    names = (None, "first", "second")
    reference = Torch(max_batch=8, kv_memory="16MiB").start(ModelSource(str(base), dtype="fp32"), cpus=1)
    ours = start(base, max_batch=8)
    try:
        for engine in (reference, ours):
            for run in runs[:2]:
                asyncio.run(engine.load_adapter(run.name, run))
        asked = [(prompt, name) for prompt in PROMPTS[:3] for name in names]
        wanted = [ask(reference, prompt, adapter=name) for prompt, name in asked]
        assert len({delta.text for delta in wanted}) == len(asked)
        assert together(ours, *(lambda p=p, n=n: answer(ours, p, adapter=n) for p, n in asked)) == wanted
        assert [ask(ours, prompt, adapter=name) for prompt, name in asked] == wanted
        scored = [ask(one, PROMPTS[2], adapter="first", prompt_logprobs=0) for one in (ours, reference)]
        assert scored[0].text == scored[1].text
        for mine, other in zip(scored[0].prompt_logprobs[1:], scored[1].prompt_logprobs[1:], strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
    finally:
        for engine in (reference, ours):
            asyncio.run(engine.close())


@needs_export
def test_of_more_adapters_than_fit_the_last_used_stay_and_each_is_exported_once(
    base: Path, runs: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = start(base, max_adapters=2)
    try:
        for run in runs:
            asyncio.run(engine.load_adapter(run.name, run))
        exports = caplog.text.count("exporting")
        said = {run.name: ask(engine, PROMPTS[0], adapter=run.name) for run in runs}
        assert len({delta.text for delta in said.values()}) == 3
        assert {run.name: ask(engine, PROMPTS[0], adapter=run.name) for run in runs} == said
        assert caplog.text.count("exporting") == exports
        assert len(engine._batcher._runner.adapters._models) == 1 + 2

        asyncio.run(engine.load_adapter("first", runs[1]))  # a name that gets another adapter
        assert ask(engine, PROMPTS[0], adapter="first").text == said["second"].text
        asyncio.run(engine.unload_adapter("first"))
        with pytest.raises(RequestError, match="no adapter 'first'"):
            ask(engine, PROMPTS[0], adapter="first")
        assert ask(engine, PROMPTS[0], adapter="third") == said["third"]
    finally:
        asyncio.run(engine.close())


@needs_export
def test_others_are_answered_while_an_adapter_is_exported(base: Path, runs: list[Path], tmp_path: Path) -> None:
    engine = start(base)
    run = small_models.save_lora_run(tmp_path / "new", base, seed=9)

    async def main() -> int:
        loading = asyncio.create_task(engine.load_adapter("new", run))
        answered = 0
        while not loading.done():
            await answer(engine, PROMPTS[0])
            answered += 1
            await asyncio.wait({loading}, timeout=0.2)  # who asks all the time leaves the export no CPU
        await loading
        return answered

    try:
        assert asyncio.run(asyncio.wait_for(main(), 300)) > 5
    finally:
        asyncio.run(engine.close())


@needs_export
def test_an_adapter_that_does_not_fit_is_one_line(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    other = small_models.save_model(tmp_path / "other", small_models.llama_config(hidden_size=32))
    run = small_models.save_lora_run(tmp_path / "run", other)
    with pytest.raises(UserError, match=r"adapter .* does not fit its base: ") as raised:
        asyncio.run(engines[0].load_adapter("run", run))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"run .*nothing: no such directory"):
        asyncio.run(engines[0].load_adapter("run", tmp_path / "nothing"))
    with pytest.raises(RequestError, match="no adapter 'run'"):
        ask(engines[0], "hello", adapter="run")


# The export


@needs_export
def test_a_model_is_exported_once_for_all_who_ask_and_again_where_it_changes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO)
    source, found = ModelSource(str(base)), []
    askers = [threading.Thread(target=lambda: found.append(exported(source, "int8"))) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert found[0] == found[1]
    assert caplog.text.count("exporting") == 1
    assert "export: compressing its weights to int8" in caplog.text
    assert [path.name for path in (tmp_path / "openvino").iterdir() if path.is_dir()] == [found[0].name]

    copy = small_models.save_model(tmp_path / "copy", small_models.llama_config(rope_parameters=_rope(base)))
    assert exported(ModelSource(str(copy)), "int8") == found[0]  # wherever it lies
    (copy / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert openvino_files._key(copy, "int8") != found[0].name
    assert openvino_files._key(base, "int4") != found[0].name
    assert caplog.text.count("exporting") == 1


def _rope(model: Path) -> Any:
    return json.loads((model / "config.json").read_text())["rope_parameters"]


@needs_export
@pytest.mark.parametrize(("weights", "share"), [("int8", 0.25), ("int4", 0.25), ("bf16", 0.5)])
def test_smaller_weights_are_smaller_and_nearly_as_good(tmp_path: Path, weights: str, share: float) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    model = small_models.save_model(tmp_path / "model", small_models.llama_config(**sizes))
    source = ModelSource(str(model), dtype="fp32")
    size = (exported(source, weights) / "openvino_model.bin").stat().st_size
    assert size < 1.15 * share * (model / "model.safetensors").stat().st_size
    small = start(model, weights=weights)
    whole = Torch(max_batch=4, kv_memory="16MiB").start(source, cpus=1)
    try:
        # How likely each says that the whole model's answer is.
        said = ask(whole, PROMPTS[0], max_tokens=30, logprobs=0, ignore_eos=True)
        ids = tuple(token.token for token in said.logprobs)
        known, found = (ask(e, ids, max_tokens=1, prompt_logprobs=0).prompt_logprobs[1:] for e in (whole, small))
        off = [abs((a.logprob or 0) - (b.logprob or 0)) for a, b in zip(known, found, strict=True)]
        assert 0 < sum(off) / len(off) < (0.5 if weights == "int4" else 0.1)
    finally:
        for engine in (small, whole):
            asyncio.run(engine.close())


@needs_export
def test_a_model_that_cannot_be_exported_is_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    broken = small_models.save_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError) as raised:
        start(broken)
    assert str(raised.value).startswith(f"'{broken}' cannot be exported to OpenVINO's format: ")
    assert "\n" not in str(raised.value)
    assert [path for path in (tmp_path / "cache/openvino").iterdir() if path.is_dir()] == []


def without_environments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project is in `folder`, where none has been made yet."""
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    monkeypatch.setattr(environments, "PROJECT", folder)
    monkeypatch.setattr(sys, "prefix", str(folder / ".venv"))


def test_without_the_exports_environment_one_line_says_what_makes_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_environments(tmp_path, monkeypatch)
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"openvino-export is not there: scripts/engine-env openvino-export makes it"):
        start(base)
    assert not (tmp_path / "cache").exists()


def test_what_it_cannot_be_is_said_before_anything_is_exported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_environments(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"ServedModel\.gpus = 1: OpenVino computes on CPUs only"):
        OpenVino().start(ModelSource(str(base)), cpus=1, gpus=1)
    with pytest.raises(UserError, match=r"source\.path = .*nothing.*: no such directory"):
        start(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"OpenVino\.weights = 'int2'"):
        OpenVino(weights="int2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"OpenVino\.kv_memory = '5'"):
        OpenVino(kv_memory="5")
    with pytest.raises(UserError, match=r"OpenVino\.max_length = 300: this model was made for at most 256"):
        start(base, max_length=300)
