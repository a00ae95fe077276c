"""native.cpp beside torch's own operators; and what an engine does with it, or without."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from plugins.engines import native
from plugins.engines.layers import Panels
from plugins.engines.lean import Torch
from plugins.engines.native import Native, Rows

pytestmark = pytest.mark.compiler

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 24, 25, 40)  # of all kinds that products know, on any CPU
SIZES = ((64, 96), (37, 50), (128, 16), (8, 300))  # inputs, outputs: also such as fill no panel
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> Native:
    found = native.load()
    assert found is not None
    return found


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Products


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_product_is_right_and_a_row_is_the_same_to_the_bit_beside_any_others(
    kernels: Native, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    weight = (random(outputs, inputs) * (40 if dtype == torch.int8 else 1)).to(dtype)
    scales = random(outputs, seed=1) if dtype == torch.int8 else None
    x, bias, to = random(max(ROWS), inputs, seed=2), random(outputs, seed=3), random(max(ROWS), outputs, seed=4)
    whole = weight.double() * (1 if scales is None else scales.double()[:, None])
    wanted = functional.linear(x.double(), whole, bias.double()) + to
    panels = kernels.panels(weight)
    alone = [
        kernels.product(x[row : row + 1], panels, outputs, scales=scales, bias=bias, to=to[row : row + 1])
        for row in range(max(ROWS))
    ]
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * wanted.abs().max().item()}
    torch.testing.assert_close(torch.cat(alone).double(), wanted, **tolerance)
    for rows in ROWS:
        made = kernels.product(x[:rows], panels, outputs, scales=scales, bias=bias, to=to[:rows])
        assert torch.equal(made, torch.cat(alone[:rows])), rows
    bare = kernels.product(x, panels, outputs, scales=scales)
    torch.testing.assert_close(bare.double(), x.double() @ whole.T, **tolerance)


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.int8])
def test_a_product_in_tiles_is_right_and_a_row_is_the_same_beside_any_others(
    kernels: Native, inputs: int, outputs: int, weights: torch.dtype
) -> None:
    if not kernels.has_tiles:
        pytest.skip("this CPU has no AMX")
    weight = (random(outputs, inputs) * (40 if weights == torch.int8 else 1)).to(weights)
    scales = random(outputs, seed=1) if weights == torch.int8 else None
    x, to = (random(100, size, dtype=torch.bfloat16, seed=2) for size in (inputs, outputs))
    bias = random(outputs, seed=3)
    whole = weight.double() * (1 if scales is None else scales.double()[:, None])
    wanted = functional.linear(x.double(), whole, bias.double()) + to
    panels = kernels.panels(weight, in_tiles=True)
    assert torch.equal(kernels.weight(panels, outputs, inputs), weight)

    def product(rows: slice) -> torch.Tensor:
        return kernels.product(x[rows], panels, outputs, scales=scales, bias=bias, to=to[rows])

    all_rows = product(slice(None))
    torch.testing.assert_close(all_rows.double(), wanted, rtol=2**-8, atol=2**-8 * wanted.abs().max().item())
    few = 4 if weights == torch.int8 else 0  # there 8-bit weights are not multiplied in tiles
    counts = (1, 3, 5, 15, 16, 17, 31, 32, 33, 64, 77)
    for count in counts:
        made = product(slice(0, count))
        alike = all_rows[:count] if count > few else torch.cat([product(slice(row, row + 1)) for row in range(count)])
        assert torch.equal(made, alike), count
        torch.testing.assert_close(made.double(), wanted[:count], rtol=2**-8, atol=2**-8 * wanted.abs().max().item())


def test_weights_that_are_bf16_are_kept_so_and_others_are_not_rounded(kernels: Native) -> None:
    narrow, wide = random(32, 64, dtype=torch.bfloat16).float(), random(32, 64)
    for weight, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        made = Panels(kernels, weight, None, None)
        assert made.panels.dtype == dtype
        assert torch.equal(made.weight(), weight)


def test_it_computes_with_as_many_threads_as_torch(kernels: Native) -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert kernels.threads() == count
    finally:
        torch.set_num_threads(before)


# What lies between them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 24, 64, 100])
def test_what_lies_between_products_is_as_torch_makes_it(kernels: Native, dtype: torch.dtype, width: int) -> None:
    torch_ = Torch()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    heads = random(5, 7, width, dtype=dtype)[:, 1:4]  # as of a product of which other heads are a part
    weight = random(width, dtype=dtype, seed=1)
    for x in (heads, random(40, width, dtype=dtype)):
        torch.testing.assert_close(kernels.norm(x, weight, 1e-6), torch_.norm(x, weight, 1e-6), **tolerance)
    both = random(5, 2 * width, dtype=dtype) * 20
    torch.testing.assert_close(kernels.gate(both), torch_.gate(both.clone()), **tolerance)
    angles = torch.arange(5)[:, None] / 1000 ** (torch.arange(width // 2) / width)
    cosines = angles.cos().repeat(1, 2).to(dtype)
    sines = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    wanted = torch_.rotate(heads, cosines, sines)
    torch.testing.assert_close(kernels.rotate(heads, cosines, sines), wanted, **tolerance)


# Attention


def attention(kernels: Native, pieces: list[tuple[int, int]], **rule: Any) -> list[torch.Tensor]:
    """Of sequences whose tokens `start:end` are computed in one step, after the others; each has a row of its own."""
    dtype, heads, kv_heads, width, value_width = (
        rule.pop(name) for name in ("dtype", "heads", "kv_heads", "width", "value_width")
    )
    keys = torch.full((len(pieces), kv_heads, 128, width), math.nan, dtype=dtype)  # what is not seen may be anything
    lanes = kernels.panel // 2  # of so many tokens, keys lie side by side
    side_by_side = keys.view(len(pieces), kv_heads, -1, width, lanes)
    values = torch.full((len(pieces), kv_heads, 128, value_width), math.nan, dtype=dtype)
    parts = []
    for row, (start, end) in enumerate(pieces):
        sequence = [random(128, count, size, dtype=dtype, seed=seed)[:end] for count, size, seed in (
            (heads, width, 1), (kv_heads, width, 2), (kv_heads, value_width, 3)
        )]  # fmt: skip
        known = keys.new_full((kv_heads, 128, width), math.nan)
        known[:, :start], values[row, :, :start] = (part[:start].transpose(0, 1) for part in sequence[1:])
        side_by_side[row] = known.unflatten(1, (-1, lanes)).transpose(2, 3)
        parts.append([part[start:] for part in sequence])
    query, key, value = (torch.cat(each) for each in zip(*parts, strict=True))
    addresses = [
        np.array([[table[row].data_ptr() for row in range(len(pieces))]], np.int64) for table in (keys, values)
    ]
    counts = [end - start for start, end in pieces]
    firsts = [sum(counts[:row]) for row in range(len(pieces))]
    rows = Rows(
        *addresses, capacities=[128] * len(pieces), firsts=firsts, counts=counts, starts=[start for start, _ in pieces]
    )
    made = kernels.attend(rows, 0, query, key, value, **({"scale": 0.3, "window": None, "softcap": None} | rule))
    for row, (_, end) in enumerate(pieces):  # what is new is in the cache
        there = side_by_side[row].transpose(2, 3).flatten(1, 2)
        assert torch.equal(there[:, :end], random(128, kv_heads, width, dtype=dtype, seed=2)[:end].transpose(0, 1))
        assert torch.equal(
            values[row, :, :end], random(128, kv_heads, value_width, dtype=dtype, seed=3)[:end].transpose(0, 1)
        )
    return list(made.split(counts))


def reference(length: int, **rule: Any) -> torch.Tensor:
    heads, kv_heads, dtype = rule["heads"], rule["kv_heads"], rule["dtype"]
    query = random(128, heads, rule["width"], dtype=dtype, seed=1)[:length].double()
    key, value = (
        random(128, kv_heads, size, dtype=dtype, seed=seed)[:length].double().repeat_interleave(heads // kv_heads, 1)
        for size, seed in ((rule["width"], 2), (rule["value_width"], 3))
    )
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
    if cap := rule.get("softcap"):
        scores = (scores / cap).tanh() * cap
    here, there = torch.arange(length)[:, None], torch.arange(length)
    hidden = (there > here) | (there <= here - (rule.get("window") or length))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rule",
    [
        {"heads": 4, "kv_heads": 4, "width": 64, "value_width": 64},
        {"heads": 6, "kv_heads": 2, "width": 8, "value_width": 8, "window": 9},
        {"heads": 30, "kv_heads": 2, "width": 20, "value_width": 12, "softcap": 2.0},
        {"heads": 3, "kv_heads": 1, "width": 5, "value_width": 37, "window": 1},
    ],
    ids=["", "window", "softcap", "odd"],
)
def test_attention_is_right_and_the_same_to_the_bit_however_it_is_cut(
    kernels: Native, dtype: torch.dtype, rule: dict[str, Any]
) -> None:
    rule = rule | {"dtype": dtype}
    whole = attention(kernels, [(0, 101)], **rule)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(whole.double(), reference(101, **rule), rtol=tolerance, atol=tolerance)
    cuts = [(0, 1), (1, 2), (2, 30), (30, 31), (31, 64), (64, 101)]
    for together in (cuts, cuts[::-1]):  # in one step, as those of as many sequences
        for (start, end), part in zip(together, attention(kernels, together, **rule), strict=True):
            assert torch.equal(part, whole[start:end]), (start, end)


# Where it cannot be made


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return monkeypatch


def test_without_a_compiler_it_says_so(
    anew: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    anew.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.load.__wrapped__() is None
    assert "no C++ compiler (g++) is here" in caplog.text


def test_with_a_compiler_that_fails_it_says_why(
    anew: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++: error: no OpenMP here' >&2\nexit 1\n")
    compiler.chmod(0o755)
    anew.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING):
        assert native.load.__wrapped__() is None
    assert "cannot compile native.cpp (g++: error: no OpenMP here)" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))  # nothing half-made is left


def test_what_was_compiled_is_kept(kernels: Native) -> None:
    """Another process finds it, with a compiler that could only be asked who it is."""
    program = (
        "from plugins.engines import native\n"
        "made = native.subprocess.run\n"
        "def run(command, **options):\n"
        "    assert str(native.SOURCE) not in command, 'compiled again'\n"
        "    return made(command, **options)\n"
        "native.subprocess.run = run\n"
        "print(native.load().panel)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True)
    assert ended.stdout.strip() == str(kernels.panel), ended.stderr
