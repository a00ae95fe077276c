"""Recorded steps where there is no GPU, by a recorder that does what CUDA graphs do.

It calls the same operators on the same memory once more, with the numbers that they had.
"""

import asyncio
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from test_torch_engine import PROMPTS, answer, architecture, generated, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plugins import hardware
from plugins.engines import Torch, graphs, native, scheduler
from plugins.engines.attention import Rule, Step, Tables
from plugins.engines.cache import Cache
from plugins.engines.runner import _Probe as Probe
from plugins.engines.scheduler import Piece, Running
from plugins.engines.torch import TorchEngine
from plugins.spec import UserError
from plugins.types import ModelSource

# What brings a tensor's number to Python.
ASKS = [torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default]


class Recorder(TorchDispatchMode):
    """Keeps every operator that is called, with its numbers as they are and its tensors where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in ASKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = operator(*args, **(kwargs or {}))
        self._calls.append((operator, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for operator, args, kwargs, made in self._calls:
            for old, new in zip(tree_leaves(made), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(graphs.Capture):
    """Without a GPU, and with counts."""

    recorded = replayed = 0

    def __init__(self) -> None:
        pass

    def __call__(self, compute: graphs.Compute) -> tuple[torch.Tensor, Callable[[], None]]:
        recorder = Recorder()
        with recorder:
            made = compute()
        made.zero_()  # what is recorded has not been computed yet
        Capture.recorded += 1

        def replay() -> None:
            Capture.replayed += 1
            recorder.replay()

        return made, replay


def go_without_gpu(patch: pytest.MonkeyPatch) -> None:
    """Have an engine believe that it has a GPU, and compute by torch's operators."""
    patch.setattr(hardware, "device", lambda gpus: torch.device("cpu"))
    patch.setattr(native, "load", lambda: None)
    patch.setattr("plugins.engines.torch.Capture", Capture)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    go_without_gpu(monkeypatch)
    monkeypatch.setattr(Capture, "recorded", 0)
    monkeypatch.setattr(Capture, "replayed", 0)


def start(model: Path, **options: Any) -> TorchEngine:
    spec = Torch(**({"max_batch": 4, "kv_memory": "16MiB", "cuda_graphs": True} | options))
    return TorchEngine(ModelSource(str(model), dtype="fp32"), spec, cpus=1, gpus=1)


@pytest.mark.parametrize("name", ["llama", "qwen3, some layers with a window", "gemma2, window and soft cap"])
def test_answers_are_those_of_transformers_in_any_company(
    tmp_path: Path, no_gpu: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler.Scheduler, "_chunk", lambda self, decoding: 24)
    model = small_models.save_model(tmp_path / "model", None if name == "llama" else architecture(name))
    # Those that stay longest are not the first: the others' rows go to them.
    asked = list(zip(PROMPTS, (40, 3, 24, 17, 8, 30), strict=True))
    wanted = [generated(model, prompt, max_tokens=count) for prompt, count in asked]
    engine = start(model, max_batch=6)
    try:
        for _ in range(2):
            asks = (lambda p=prompt, n=count: answer(engine, p, max_tokens=n) for prompt, count in asked)
            together = run(engine, *asks)
            assert [delta.text for delta in together] == wanted
        assert 0 < Capture.recorded < Capture.replayed / 3
        recorded = Capture.recorded
        for (prompt, count), text in zip(asked, wanted, strict=True):
            assert run(engine, lambda p=prompt, n=count: answer(engine, p, max_tokens=n))[0].text == text
        assert Capture.recorded <= recorded + 2  # one alone, in rows of either size
    finally:
        asyncio.run(engine.close())


def test_steps_with_an_adapter_are_computed_as_without(tmp_path: Path, no_gpu: None) -> None:
    base = small_models.save_model(tmp_path / "model")
    adapter = small_models.save_lora_run(tmp_path / "run", base)
    engine = start(base)
    try:
        asyncio.run(engine.load_adapter("run", adapter))
        before = Capture.replayed
        [alone] = run(engine, lambda: answer(engine, PROMPTS[0], adapter="run"))
        assert Capture.replayed == before
        assert alone.text == generated(base, PROMPTS[0], adapter)
        own, plain = run(
            engine,
            lambda: answer(engine, PROMPTS[0], adapter="run", max_tokens=12),
            lambda: answer(engine, PROMPTS[0], max_tokens=40),
        )
        assert own.text == generated(base, PROMPTS[0], adapter, max_tokens=12)
        assert plain.text == generated(base, PROMPTS[0], max_tokens=40)
        assert Capture.replayed > before
    finally:
        asyncio.run(engine.close())


def test_few_graphs_are_held_and_no_memory_of_keys_and_values_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(step: Step) -> torch.Tensor:
        heads = step.ids.float().view(-1, 1, 1).expand(-1, 2, 4)
        return step.attention(0, heads, heads, heads, Rule(1.0)).flatten(1)

    class Once(Capture):
        def __call__(self, compute: graphs.Compute) -> tuple[torch.Tensor, Callable[[], None]]:
            Capture.recorded += 1
            return compute(), lambda: None

    monkeypatch.setattr(Capture, "recorded", 0)
    monkeypatch.setattr(graphs, "HELD", 2)
    device = torch.device("cpu")
    made = graphs.Graphs(forward, Once(), device)
    cache = Cache(Tables([(2, 4, 4)], torch.float32, device), budget=2**14, longest=64)
    pieces = [Piece(Running(Probe([number]), cache.place(1)), 1) for number in range(1, 9)]  # type: ignore[arg-type]

    slab = pieces[0].running.place.slab
    for count, recorded in ((8, 1), (7, 1), (5, 1), (4, 2), (8, 2), (2, 3), (8, 3), (4, 4)):
        slab.places[:] = [piece.running.place for piece in pieces[:count]]  # with so many in one slab
        assert made.fit(pieces[:count])
        assert made(pieces[:count])[:, 0].tolist() == [float(number) for number in range(1, count + 1)]
        assert Capture.recorded == recorded
    alive = weakref.ref(slab)
    del cache, pieces, slab
    gc.collect()
    assert alive() is None


def test_a_model_that_asks_what_its_tensors_hold_is_refused(tmp_path: Path, no_gpu: None) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = small_models.save_model(tmp_path / "model", small_models.llama_config(rope_parameters=rope))
    with pytest.raises(UserError, match=r"^Torch.cuda_graphs = True: this model cannot be recorded: [^\n]+$"):
        start(model)


def test_without_a_gpu_there_is_nothing_to_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Torch.cuda_graphs = True: on GPUs only, and ServedModel.gpus is 0$"):
        Torch(cuda_graphs=True).start(ModelSource(str(small_models.save_model(tmp_path / "model"))), cpus=1)
