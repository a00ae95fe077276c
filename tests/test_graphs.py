"""Recorded steps where there is no GPU, by a recorder that does what CUDA graphs do.

It calls the same operators on the same memory once more, with the numbers that they had.
"""

import asyncio
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
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

aten = torch.ops.aten
# What waits for a GPU, or copies to it, and so cannot be recorded. (Not all: an operator that does so inside is not seen.)
WAITING = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten.lift_fresh.default, aten._grouped_mm.default,
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Keeps every operator that is called, with its numbers as they are and its tensors where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = operator(*args, **(kwargs or {}))
        self._calls.append((operator, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for operator, args, kwargs, made in self._calls:
            for old, new in zip(tree_leaves(made), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@dataclass
class Counts:
    recorded: int = 0
    replayed: int = 0

    def recorder(self) -> graphs.Record:
        def record(compute: graphs.Compute) -> tuple[torch.Tensor, Callable[[], None]]:
            operators = Operators()
            with operators:
                made = compute()
            made.zero_()  # what is recorded has not been computed yet
            self.recorded += 1

            def replay() -> None:
                self.replayed += 1
                operators.replay()

            return made, replay

        return record


def go_without_gpu(patch: pytest.MonkeyPatch) -> Counts:
    """Have an engine believe that it has a GPU, and compute by torch's operators."""
    counts = Counts()
    patch.setattr(hardware, "device", lambda gpus: torch.device("cpu"))
    patch.setattr(native, "load", lambda: None)
    patch.setattr(graphs, "recorder", counts.recorder)
    return counts


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return go_without_gpu(monkeypatch)


def start(model: Path, **options: Any) -> TorchEngine:
    spec = Torch(**({"max_batch": 4, "kv_memory": "16MiB", "cuda_graphs": True} | options))
    return TorchEngine(ModelSource(str(model), dtype="fp32"), spec, cpus=1, gpus=1)


@pytest.mark.parametrize("name", ["llama", "qwen3, some layers with a window", "gemma2, window and soft cap"])
def test_answers_are_those_of_transformers_in_any_company(
    tmp_path: Path, no_gpu: Counts, name: str, monkeypatch: pytest.MonkeyPatch
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
        assert 0 < no_gpu.recorded < no_gpu.replayed / 3
        recorded = no_gpu.recorded
        for (prompt, count), text in zip(asked, wanted, strict=True):
            assert run(engine, lambda p=prompt, n=count: answer(engine, p, max_tokens=n))[0].text == text
        assert no_gpu.recorded <= recorded + 2  # one alone, in rows of either size
    finally:
        asyncio.run(engine.close())


def test_steps_with_an_adapter_are_computed_as_without(tmp_path: Path, no_gpu: Counts) -> None:
    base = small_models.save_model(tmp_path / "model")
    adapter = small_models.save_lora_run(tmp_path / "run", base)
    engine = start(base)
    try:
        asyncio.run(engine.load_adapter("run", adapter))
        before = no_gpu.replayed
        [alone] = run(engine, lambda: answer(engine, PROMPTS[0], adapter="run"))
        assert no_gpu.replayed == before
        assert alone.text == generated(base, PROMPTS[0], adapter)
        own, plain = run(
            engine,
            lambda: answer(engine, PROMPTS[0], adapter="run", max_tokens=12),
            lambda: answer(engine, PROMPTS[0], max_tokens=40),
        )
        assert own.text == generated(base, PROMPTS[0], adapter, max_tokens=12)
        assert plain.text == generated(base, PROMPTS[0], max_tokens=40)
        assert no_gpu.replayed > before
    finally:
        asyncio.run(engine.close())


def forward(step: Step) -> torch.Tensor:
    """What comes out says which token went in, and the mean of those that have been in its row."""
    heads = step.ids.float().view(-1, 1, 1).expand(-1, 2, 4)
    seen = step.attention(0, torch.zeros_like(heads), heads, heads, Rule(1.0))
    return torch.cat((heads[:, 0, :1], seen[:, 0, :1]), -1)


class Table:
    """Sequences of a token each, in a cache."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache = Cache(Tables([(2, 4, 4)], torch.float32, self.device), budget=2**14, longest=128)
        self.graphs = graphs.Graphs(forward, self.device)

    def sit(self, tokens: int) -> Running[Probe]:
        place = self.cache.place(tokens)
        assert place is not None
        return Running(Probe([]), place)

    def step(self, *running: Running[Probe]) -> None:
        """Each says something that nobody has said yet, and it is seen that it and no other has."""
        for number, one in enumerate(running):
            one.sequence.tokens.append(100 * len(one.sequence.tokens) + number + 1)
        pieces = [Piece(one, 1) for one in running]
        assert self.graphs.fit(pieces)
        made = self.graphs(pieces)
        tokens = [torch.tensor(one.sequence.tokens, dtype=torch.float32) for one in running]
        torch.testing.assert_close(made, torch.stack([torch.stack((own[-1], own.mean())) for own in tokens]))
        for one in running:
            one.place.length += 1


def test_a_graph_serves_what_it_covers_and_few_are_held(no_gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "HELD", 3)
    table = Table()
    few = [table.sit(1) for _ in range(8)]
    recorded = []
    for count in (8, 7, 5, 4, 3, 1, 8, 5, 2):
        while len(few) > count:
            table.cache.free(few.pop().place)
        few += [table.sit(1) for _ in range(count - len(few))]
        table.step(*few)
        recorded.append(no_gpu.recorded)
    # Of 8 rows, which also 4 have half of; of 4, for 3; of 1; those of 8 and 4 are still there; of 4 for 2.
    assert recorded == [1, 1, 1, 1, 2, 3, 3, 3, 3]
    long = table.sit(100)
    table.step(*few, long)
    table.cache.free(long.place)
    table.step(*few)  # by the same, whose other slab is empty now
    assert no_gpu.recorded == 4
    table.cache.free(few.pop().place)
    table.step(*few)  # that of 1 row was the least recently used
    assert no_gpu.recorded == 5


def test_graphs_keep_no_memory_of_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "recorder", lambda: lambda compute: (compute(), lambda: None))
    table = Table()
    table.step(table.sit(1))
    slab = weakref.ref(table.cache.slabs[0])
    table.cache = Cache(Tables([(2, 4, 4)], torch.float32, table.device), budget=2**14, longest=128)
    gc.collect()
    assert slab() is None
    table.step(table.sit(1))


def test_a_model_that_asks_what_its_tensors_hold_is_refused(tmp_path: Path, no_gpu: Counts) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = small_models.save_model(tmp_path / "model", small_models.llama_config(rope_parameters=rope))
    with pytest.raises(UserError, match=r"^Torch.cuda_graphs = True: this model cannot be recorded: [^\n]+$"):
        start(model)


def test_without_a_gpu_there_is_nothing_to_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Torch.cuda_graphs = True: on GPUs only, and ServedModel.gpus is 0$"):
        Torch(cuda_graphs=True).start(ModelSource(str(small_models.save_model(tmp_path / "model"))), cpus=1)
