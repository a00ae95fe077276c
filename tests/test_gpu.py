"""The torch engine on a GPU: its tests once more, computed there. With recorded steps also where there is no GPU."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_graphs
import test_torch_engine
from test_parameters import (  # noqa: F401  # pytest finds them here too
    net,
    test_a_constrained_answer_always_matches,
    test_a_prompt_may_be_scored_in_any_pieces_beside_others,
    test_echo_gives_the_prompt_with_the_models_own_logprobs,
    test_logprobs_of_an_answer_are_the_models_own,
    test_penalties_and_bias_steer_the_whole_answer,
    test_seeded_answers_are_the_same_alone_and_in_company,
)
from test_torch_engine import (  # noqa: F401  # pytest finds them here too
    base,
    runs,
    test_a_consumer_that_goes_away_frees_its_place,
    test_a_request_that_runs_out_of_memory_fails_alone,
    test_a_shared_beginning_is_computed_once_and_changes_no_answer,
    test_adapters_answer_side_by_side,
    test_an_adapter_may_replace_whole_modules,
    test_an_answer_grows_to_the_length_of_the_model,
    test_answers_are_those_of_transformers_whoever_shares_the_batch,
    test_answers_under_way_keep_their_adapter,
    test_kinds_of_lora,
    test_memory_for_keys_and_values_is_bounded_and_changes_no_answer,
    test_requests_join_and_leave_at_any_step,
    test_where_there_is_no_memory_for_a_row_the_request_fails_alone,
)

from plugins.engines.torch import TorchEngine


@pytest.fixture(
    scope="module",
    autouse=True,
    params=[
        pytest.param("recorded, no GPU", marks=pytest.mark.slow),
        pytest.param("computed", marks=pytest.mark.gpu),
        pytest.param("recorded", marks=pytest.mark.gpu),
    ],
)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the engines of these tests compute."""

    def start(model: Path, **options: Any) -> TorchEngine:
        return test_graphs.start(model, **{"cuda_graphs": request.param != "computed"} | options)

    with pytest.MonkeyPatch.context() as patch:
        if "no GPU" in request.param:
            test_graphs.go_without_gpu(patch)
        patch.setattr(test_torch_engine, "start", start)
        yield request.param


@pytest.fixture(scope="module")
def engine(way: str, base: Path) -> Iterator[TorchEngine]:  # noqa: F811
    made = test_torch_engine.start(base)
    yield made
    graphs = made._batcher._runner._graphs
    used = graphs is not None and any(graph.rows() for graph in graphs._graphs)
    assert used == (way != "computed")
    asyncio.run(made.close())


# Not of experts: but in bf16 on a few kinds of GPU, what chooses them cannot be recorded.
@pytest.mark.parametrize("name", [name for name in test_torch_engine.ARCHITECTURES if "experts" not in name])
def test_other_architectures(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_torch_engine.test_other_architectures(tmp_path, name, "torch's", monkeypatch)
