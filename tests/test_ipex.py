"""The IPEX engine, in its own environment, beside the torch engine: models of several kinds, token by token (fp32).

What it owes as an engine: test_contract.py.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from ipex_side import DEFAULTS, answers

from plugins.engines import Ipex, ipex
from plugins.environments import Environment
from plugins.spec import UserError
from plugins.types import ModelSource

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "scripts/demo_base/model"
FOX = "the quick brown fox"
PROMPTS = (
    FOX,
    "a",
    "hello world one two three four five six",
    "東京 and 🙂",
    "the weather, the sea and the mountains " * 6,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    name: size for name, size in small_models.llama_config().to_diff_dict().items()
    if name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "initializer_range")
}  # fmt: skip
GPT2 = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
KINDS = {
    "llama": small_models.llama_config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama3": small_models.llama_config(rope_parameters=LLAMA3),
    "gpt2": transformers.GPT2Config(**GPT2, bos_token_id=None, eos_token_id=0),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "window": transformers.MistralConfig(**SIZES, sliding_window=8),
}
engine = pytest.mark.engine
needs_ipex = pytest.mark.environment("ipex")


def of_ipex(*jobs: Any) -> list[Any]:
    """What the IPEX engine says to each job, all in one process of its own environment."""
    command = [Environment.find("ipex").python, "-m", "tests.ipex_side", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind, and runs of the one called llama."""
    folder = tmp_path_factory.mktemp("ipex")
    for name, config in KINDS.items():
        small_models.save_model(folder / name, config)
    small_models.save_lora_run(folder / "run", folder / "llama")
    small_models.save_lora_run(folder / "dora", folder / "llama", seed=2, use_dora=True)
    small_models.save_lora_run(folder / "other", folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, tuple[Any, Any]]:
    """What both engines say, ours and then torch's, to the jobs of the tests below."""
    together = [{"prompt": prompt} for prompt in PROMPTS]
    scored = {"prompt": PROMPTS[2], "logprobs": 20, "prompt_logprobs": 20}
    jobs: dict[str, Any] = {
        name: {"model": str(folder / name), "asked": [*([one] for one in together), together, [scored]]}
        for name in KINDS
    }
    runs = {name: str(folder / name) for name in ("run", "dora", "other", "nowhere")}
    adapters = [{"prompt": FOX, "adapter": name} for name in (None, "run", "dora", "other")]
    jobs["adapters"] = {"model": str(folder / "llama"), "runs": runs, "asked": [*([one] for one in adapters), adapters]}
    jobs["int8"] = {"model": str(folder / "llama"), "options": {"weights": "int8"}, "runs": {"run": str(folder / "run")},
                    "asked": [[{"prompt": FOX, "adapter": "run"}]]}  # fmt: skip
    crowd = [{"prompt": prompt, "max_tokens": length} for length in (10, 150, 30) for prompt in PROMPTS]
    jobs["crowd"] = {"model": str(folder / "llama"), "options": {"kv_memory": "0.3MiB"}, "asked": [crowd]}
    theirs = {name: answers("Torch", job) for name, job in jobs.items() if name not in ("crowd", "int8")}
    theirs["crowd"] = answers("Torch", {"model": str(folder / "llama"), "asked": [[one] for one in crowd]})
    theirs["int8"] = None
    return {name: (ours, theirs[name]) for name, ours in zip(jobs, of_ipex(*jobs.values()), strict=True)}


@engine
@needs_ipex
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_torch_engines_whoever_shares_the_batch(said: dict[str, tuple[Any, Any]], kind: str) -> None:
    ours, theirs = (side["said"] for side in said[kind])
    wanted = [group[0] for group in theirs[: len(PROMPTS)]]
    assert [group[0] for group in ours[: len(PROMPTS)]] == wanted
    assert ours[len(PROMPTS)] == wanted
    assert len({one["text"] for one in wanted}) == len(PROMPTS)


@engine
@needs_ipex
@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_those_of_transformers(said: dict[str, tuple[Any, Any]], folder: Path, kind: str) -> None:
    """Of the newest transformers, which has saved the model: rotary positions, and all else, are read rightly."""
    answer = said[kind][0]["said"][-1][0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    rows = [*answer["prompt_logprobs"], *answer["logprobs"]]
    ids = tokenizer(PROMPTS[2])["input_ids"]
    assert [token for token, _, _ in rows[: len(ids)]] == ids
    with torch.inference_mode():
        wanted = model(torch.tensor([[token for token, _, _ in rows]])).logits[0].log_softmax(-1)
    for (token, logprob, top), distribution in zip(rows[1:], wanted, strict=False):
        assert logprob == pytest.approx(distribution[token].item(), abs=1e-4)
        assert [number for _, number in top] == pytest.approx(
            [distribution[other].item() for other, _ in top], abs=1e-4
        )


@engine
@needs_ipex
def test_adapters_are_served_beside_the_base_in_one_batch(said: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = said["adapters"]
    assert ours["refused"].keys() == {"other", "nowhere"}
    assert ours["refused"] == theirs["refused"]
    assert ours["said"] == theirs["said"]
    assert "no adapter 'other'" in ours["said"][-1][3]
    assert len({one["text"] for one in ours["said"][-1][:3]}) == 3


@engine
@needs_ipex
def test_adapters_go_with_few_bits(said: dict[str, tuple[Any, Any]]) -> None:
    ours = said["int8"][0]
    assert ours["refused"] == {}
    assert ours["said"][0][0]["usage"] == [said["adapters"][1]["said"][1][0]["usage"][0], DEFAULTS["max_tokens"]]


@engine
@needs_ipex
def test_answers_that_do_not_all_fit_into_memory_are_right(said: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = (side["said"] for side in said["crowd"])
    assert ours[0] == [group[0] for group in theirs]


@engine
@needs_ipex
def test_in_bf16_and_in_few_bits_a_model_that_has_learned_says_nearly_the_same() -> None:
    """As often as asked for: of 100 prompts at least 95 answers of 16 tokens are the same in bf16."""
    words = ("fox", "sea", "house", "market", "winter", "river", "school", "letter", "garden", "clock")
    openings = ("What is a", "Tell me about the", "Where is the", "Is there a", "The")
    openings += ("A small", "My", "When does the", "Who saw the", "One")
    prompts = [f"{opening} {word}" for opening in openings for word in words]
    asked = [[{"prompt": prompt, "max_tokens": 16} for prompt in prompts]]
    told = [{"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0} for prompt in prompts[::5]]
    base = {"model": str(DEMO), "options": {"max_batch": 16, "kv_memory": "256MiB"}}
    theirs = answers("Torch", base | {"dtype": "bf16", "asked": asked})["said"][0]
    likely = _mean_logprob(answers("Torch", base | {"asked": [told]}))
    small = [base | {"options": base["options"] | {"weights": bits}, "asked": [told]} for bits in ("int8", "int4")]
    ours, *few = of_ipex(base | {"dtype": "bf16", "asked": asked}, *small)
    same = sum(mine["text"] == other["text"] for mine, other in zip(ours["said"][0], theirs, strict=True))
    assert same >= 95
    assert [_mean_logprob(one) for one in few] == [pytest.approx(likely, abs=off) for off in (0.02, 0.3)]
    assert len({likely, *(_mean_logprob(one) for one in few)}) == 3


def _mean_logprob(answered: Any) -> float:
    numbers = [logprob for one in answered["said"][0] for _, logprob, _ in one["prompt_logprobs"][1:]]
    return float(sum(numbers) / len(numbers))


@engine
@needs_ipex
def test_what_cannot_be_served_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    both = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "sliding_window": 8}
    small_models.save_model(tmp_path / "gemma2", transformers.Gemma2Config(**SIZES, **both))
    shutil.copytree(folder / "llama", tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"no weights")
    llama = str(folder / "llama")
    cases: list[tuple[Any, str]] = [
        ({"model": str(tmp_path / "gemma2")}, "the ipex engine cannot serve Gemma2ForCausalLM: .*window"),
        ({"model": str(folder / "run")}, r"source\.path = .*: no config\.json"),
        ({"model": str(folder / "nowhere")}, r"source\.path = .*: no such directory"),
        (
            {"model": llama, "options": {"max_length": 300}},
            r"Ipex\.max_length = 300: this model was made for at most 256",
        ),
        ({"model": llama, "options": {"kv_memory": "0.001MiB"}}, r"Ipex\.kv_memory = '0\.001MiB': 0 MiB, at least"),
    ]
    for (_, words), found in zip(cases, of_ipex(*(case for case, _ in cases)), strict=True):
        assert re.search(words, found), found
        assert "\n" not in found


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        (
            {},
            r"Ipex needs torch 2\.8, and here is torch [\d.]+\S*: scripts/engine-env ipex makes an environment that has it",
        ),
        ({"torch": "2.9.1"}, r"needs torch 2\.8, and here is torch 2\.9\.1"),
        ({"torch": "2.8.0"}, r"needs intel-extension-for-pytorch 2\.8, and here is no intel-extension-for-pytorch"),
    ],
)
def test_where_its_library_would_end_the_process_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], words: str
) -> None:
    """With the versions that are here, and as if torch's were another."""
    real = ipex.version
    monkeypatch.setattr(ipex, "version", lambda name: versions.get(name) or real(name))
    with pytest.raises(UserError, match=words) as caught:
        Ipex().start(ModelSource(str(tmp_path)), cpus=1)
    assert "\n" not in str(caught.value)


def test_what_it_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ServedModel\.gpus = 1: Ipex computes on CPUs only"):
        Ipex().start(ModelSource(str(tmp_path)), cpus=1, gpus=1)
    with pytest.raises(UserError, match=r"Ipex\.weights = 'int2'"):
        Ipex(weights="int2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Ipex\.kv_memory = '5'"):
        Ipex(kv_memory="5")
