"""A finished run handed out: merged into one model, read by an older transformers, pushed to a hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from small_models import CORPUS, llama_config, save_model, tokenizer

from finetune import Data, FinetuneConfig, Full, Hub, Instruct, Jsonl, Lora, ModelSource, Train
from finetune.push import model_card
from plugins.older_transformers import write_older_keys
from plugins.spec import UserError, plain
from plugins.types import RunManifest
from ui import cli
from ui.client import Platform

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[5, 6, 7, 8, 90, 91, 200, 300]])


def manifest(run: Path, base: Path | str, **changes: Any) -> RunManifest:
    config = FinetuneConfig(
        name=run.name,
        model=ModelSource(str(base)),
        data=Data(source=Jsonl("/home/mira/secret-project/rows.jsonl"), processor=Instruct(), validation=0.1),
        method=Lora(rank=4, alpha=8),
        train=Train(max_steps=30),
        output="/home/mira/outputs",
    )
    made = RunManifest(
        name=run.name, base=str(base), revision=None, method="lora", created="2026-11-20T10:00:00+00:00", seconds=9.5,
        steps=30, metrics={"step": 30, "steps": 30, "loss": 1.25, "eval_loss": 1.5, "base_eval_loss": 4.125, "lr": 0.0},
        config=plain(config), versions={"torch": "2.13.0", "transformers": "5.23.0"},
    )  # fmt: skip
    return replace(made, **changes)


def lora_run(folder: Path, base: Path, **lora: Any) -> Path:
    """A finished run with an adapter, made by PEFT itself, that changes what `base` says."""
    run = folder / "outputs" / "fox"
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    model = peft.get_peft_model(loaded(base, dtype=torch.float32), peft.LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(str(run / "adapter"), save_embedding_layers=False)
    tokenizer().save_pretrained(run)
    manifest(run, base).write(run)
    return run


def full_run(folder: Path, config: Any = None) -> Path:
    run = folder / "outputs" / "whole"
    save_model(run / "model", config, seed=3)
    tokenizer().save_pretrained(run)
    manifest(run, "someone/base", method="full").write(run)
    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits.float()
    return result


def loaded(directory: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def beside(base: Path, run: Path) -> torch.Tensor:
    """The logits of the base with the adapter beside it, in fp32."""
    return logits(peft.PeftModel.from_pretrained(loaded(base, dtype=torch.float32), run / "adapter"))


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    """Equal as far as fp32 goes, to 1e-5 of the largest logit."""
    torch.testing.assert_close(first, second, atol=1e-5 * float(second.abs().max()), rtol=0)


GPT2 = transformers.GPT2Config(
    vocab_size=384,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=256,
    bos_token_id=0,
    eos_token_id=0,
    initializer_range=0.1,
)
TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (llama_config(), {}),
        (llama_config(), {"use_rslora": True}),
        (llama_config(), {"use_dora": True}),
        (llama_config(), {"modules_to_save": ["lm_head"]}),
        (llama_config(**TIED), {}),
        (llama_config(**TIED), {"modules_to_save": ["lm_head"]}),
        (llama_config(**TIED), {"modules_to_save": ["embed_tokens"]}),
        (llama_config(**TIED), {"target_modules": ["q_proj", "lm_head"]}),
        (GPT2, {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}),
    ],
    ids=lambda value: (
        value.model_type if isinstance(value, transformers.PretrainedConfig) else "-".join(value) or "plain"
    ),
)
def test_the_merged_model_says_what_base_and_adapter_say(config: Any, lora: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", config)
    run = lora_run(tmp_path, base, **lora)
    Platform().export(str(run), merged=tmp_path / "merged")
    merged, expected = loaded(tmp_path / "merged"), beside(base, run)
    assert merged.dtype == torch.float32
    assert (expected - logits(loaded(base))).abs().max() > 0.1  # the adapter matters
    same(logits(merged), expected)
    assert not isinstance(merged, peft.PeftModel)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert ours(CORPUS)["input_ids"] == tokenizer()(CORPUS)["input_ids"]
    assert ours.chat_template == tokenizer().chat_template


def test_embeddings_stay_tied_unless_the_adapter_parts_them(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama_config(**TIED))
    Platform().export(str(lora_run(tmp_path, base)), merged=tmp_path / "tied")
    assert loaded(tmp_path / "tied").config.tie_word_embeddings
    assert (tmp_path / "tied/model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size
    Platform().export(str(lora_run(tmp_path, base, modules_to_save=["lm_head"])), merged=tmp_path / "apart")
    assert not loaded(tmp_path / "apart").config.tie_word_embeddings


def test_weights_have_the_dtype_of_the_base_or_the_one_asked_for(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    loaded(base).to(torch.bfloat16).save_pretrained(base)
    run = lora_run(tmp_path, base)
    expected = beside(base, run)
    Platform().export(str(run), merged=tmp_path / "bf16")
    Platform().export(str(run), merged=tmp_path / "fp32", dtype="fp32")
    assert loaded(tmp_path / "bf16").dtype == torch.bfloat16
    same(logits(loaded(tmp_path / "fp32", dtype="auto")), expected)
    # A merged weight rounded to bf16 is off by at most 2^-9 of itself; so each of them is within that of the exact one.
    exact, rounded = (loaded(tmp_path / name, dtype=torch.float32).state_dict() for name in ("fp32", "bf16"))
    for name, weight in exact.items():
        assert ((rounded[name] - weight).abs() <= weight.abs() * 2**-8).all(), name
    off = (logits(loaded(tmp_path / "bf16", dtype=torch.float32)) - expected).abs().max()
    assert 0 < off < 0.05 * expected.abs().max()


def test_a_full_run_is_its_model(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    Platform().export(str(run), merged=tmp_path / "merged")
    assert torch.equal(logits(loaded(tmp_path / "merged")), logits(loaded(run / "model")))
    Platform().export(str(run), merged=tmp_path / "half", dtype="bf16")
    assert loaded(tmp_path / "half").dtype == torch.bfloat16
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "half").chat_template == tokenizer().chat_template


def test_a_run_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lora_run(tmp_path, save_model(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").mkdir()  # empty: as good as none
    assert cli.main(["export", run.name, "--merged", "merged"]) == 0
    assert capsys.readouterr().out.endswith("the model is in merged\n")
    assert logits(loaded(tmp_path / "merged")).shape == (1, 8, 384)
    assert cli.main(["export", "fax", "--merged", "other"]) == 2
    assert "no run 'fax' here or in" in (said := capsys.readouterr().err)
    assert "did you mean 'fox'? (choices: fox)" in said


def test_what_cannot_be_exported_is_said_in_a_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base")
    run = lora_run(tmp_path, base)
    merged = tmp_path / "merged"

    def refused(*options: str, directory: Path = run) -> str:
        capsys.readouterr()
        assert cli.main(["export", str(directory), *(options or ("--merged", str(merged)))]) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # after transformers' bars of progress
        assert error.startswith("manta: ")
        assert not merged.exists()
        assert not list(tmp_path.glob(".merged*"))
        return error

    assert "say what to make: --merged DIR, --push REPO or both" in refused("--dtype", "fp32")
    assert "--private is about the repository of --push" in refused("--private", "--merged", str(merged))
    assert "--dtype bf16 is for a whole model" in refused("--push", "me/fox", "--dtype", "bf16")
    assert f"merged = '{base}': there are files already" in refused("--merged", str(base))
    assert "there are files already" in refused("--merged", str(base / "config.json"))

    begun = tmp_path / "outputs" / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text('{"step": 20, "steps": 50}\n')
    assert "run 'begun' is not finished (step 20 of 50)" in refused(directory=begun)

    manifest(run, tmp_path / "gone").write(run)
    assert f"run 'fox': base = '{tmp_path / 'gone'}': no such directory" in refused()
    manifest(run, "someone/not-here").write(run)
    assert "'someone/not-here' is no directory here, and as a hub id it cannot be loaded" in refused()

    wider = save_model(tmp_path / "wider", llama_config(hidden_size=128))
    manifest(run, wider).write(run)
    assert "does not fit its base: base_model.model.model.layers.0" in refused()
    shallow = save_model(tmp_path / "shallow", llama_config(num_hidden_layers=1))
    manifest(run, shallow).write(run)
    assert "does not fit its base: only one of them has base_model.model.model.layers.1" in refused()
    other = save_model(tmp_path / "other", GPT2)
    adapter = json.loads((run / "adapter/adapter_config.json").read_text())
    (run / "adapter/adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["q_proj"]}))
    manifest(run, other).write(run)
    assert "does not fit its base: Target modules {'q_proj'} not found" in refused()
    (run / "adapter/adapter_model.safetensors").write_bytes(b"nothing")
    manifest(run, base).write(run)
    assert "cannot be read" in refused()


# An older transformers

OLDER = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.51"), transformers.__version__
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = json.loads(sys.argv[1])
    with torch.no_grad():
        logits = model(torch.tensor([asked["ids"]])).logits[0].float().tolist()
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in asked["chats"]]
    answer = {
        "logits": logits, "tokens": tokenizer(asked["texts"])["input_ids"], "chats": texts, "dtype": str(model.dtype),
        "chat_tokens": tokenizer(texts, add_special_tokens=False)["input_ids"], "special": tokenizer.all_special_ids,
    }
    print("ANSWER", json.dumps(answer))
"""
CHATS = [[{"role": "user", "content": "the quick fox?"}, {"role": "assistant", "content": "naïve 東京"}]]
ROPE = {"rope_type": "default", "rope_theta": 1e6}
SIZES = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
SCALED = ROPE | {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
NEAR_AND_FAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
NEWER = {
    "llama": llama_config(rope_parameters=ROPE),
    "llama3": llama_config(rope_parameters=SCALED, **TIED),
    "qwen2": transformers.Qwen2Config(num_key_value_heads=2, rope_parameters=ROPE, **SIZES),
    "gemma3": transformers.Gemma3TextConfig(
        num_key_value_heads=2, head_dim=16, rope_parameters=NEAR_AND_FAR,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        **SIZES | {"num_hidden_layers": 6, "initializer_range": 0.05},
    ),
    "gpt_neox": transformers.GPTNeoXConfig(rope_parameters=ROPE | {"partial_rotary_factor": 0.5}, **SIZES),
    "phi": transformers.PhiConfig(rope_parameters=ROPE | {"partial_rotary_factor": 0.5}, **SIZES),
}  # fmt: skip


def qwen2_tokenizer() -> Any:
    """The tokens of the tests as a tokenizer of a class of its own, which older versions know too."""
    model = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    special = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    merges = [tuple(pair) for pair in model["merges"]]
    made = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **special)
    made.chat_template = tokenizer().chat_template
    return made


@pytest.mark.parametrize(
    ("name", "said"), [((), "name an environment"), (("nope",), "no environment is called 'nope'")]
)
def test_environments_of_engines_are_listed(name: tuple[str, ...], said: str) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    asked = subprocess.run([ROOT / "scripts/engine-env", *name], env=environment, capture_output=True, text=True)
    assert asked.returncode == 2
    assert asked.stderr.startswith(f"engine-env: {said} (choices: ")
    assert "transformers4" in asked.stderr
    assert asked.stderr.count("\n") == 1
    assert not list(ROOT.glob(".venv-nope"))


@pytest.mark.engine
def test_an_older_transformers_reads_the_merged_model_as_we_do(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([ROOT / "scripts/engine-env", "transformers4"], check=True, timeout=1200, env=environment)
    folders = {}
    for name, config in NEWER.items():
        run = lora_run(tmp_path / name, save_model(tmp_path / name / "base", config))
        if name == "qwen2":
            qwen2_tokenizer().save_pretrained(run)
        folders[name] = tmp_path / name / "merged"
        Platform().export(str(run), merged=folders[name], dtype="bf16" if name == "llama3" else None)
    asked = {"ids": IDS[0].tolist(), "texts": CORPUS, "chats": CHATS}
    result = subprocess.run(
        [ROOT / ".venv-transformers4/bin/python", "-c", OLDER, json.dumps(asked), *folders.values()],
        check=True, timeout=300, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    answers = [
        json.loads(line.removeprefix("ANSWER")) for line in result.stdout.splitlines() if line.startswith("ANSWER")
    ]
    for (name, folder), older in zip(folders.items(), answers, strict=True):
        model, ours = loaded(folder, dtype="auto"), transformers.AutoTokenizer.from_pretrained(folder)
        expected = logits(model)[0]
        close = 0.02 if model.dtype == torch.bfloat16 else 1e-5
        off = (torch.tensor(older["logits"]) - expected).abs().max()
        assert off <= close * expected.abs().max(), f"{name}: logits are off by {off}"
        assert older["dtype"] == str(model.dtype), name
        assert older["tokens"] == ours(CORPUS)["input_ids"], name
        assert older["chats"] == [ours.apply_chat_template(chat, tokenize=False) for chat in CHATS], name
        assert older["chat_tokens"] == ours(older["chats"], add_special_tokens=False)["input_ids"], name
        assert sorted(older["special"]) == sorted(ours.all_special_ids), name


@pytest.mark.parametrize("name", NEWER)
def test_the_older_keys_change_nothing_for_us(name: str, tmp_path: Path) -> None:
    plain_model = save_model(tmp_path / "model", NEWER[name])
    before = loaded(plain_model), transformers.AutoTokenizer.from_pretrained(plain_model)
    write_older_keys(plain_model)
    after = loaded(plain_model), transformers.AutoTokenizer.from_pretrained(plain_model)
    assert torch.equal(logits(before[0]), logits(after[0]))
    assert after[0].config.rope_parameters == before[0].config.rope_parameters
    assert after[1].all_special_tokens == before[1].all_special_tokens
    assert after[1](CORPUS)["input_ids"] == before[1](CORPUS)["input_ids"]


# A hub


@dataclass
class HubStandIn:
    """What the hub's client asks of a hub when it makes a repository and sends files there, over real HTTP."""

    taken: dict[str, bool] = field(default_factory=dict)  # repositories, and whether each is private
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    refusal: tuple[int, str] | None = None
    port: int = 0
    large: dict[str, bytes] = field(default_factory=dict)  # by their SHA-256

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = path.partition("?")[0].strip("/").split("/")
        if self.refusal and path.startswith("/api"):
            return self.refusal[0], {"error": self.refusal[1]}
        if method == "PUT":
            self.large[parts[-1]] = body
            return 200, {}
        asked = json.loads(body) if body and not path.endswith("/commit/main") else {}
        match [method, *parts]:
            case ["POST", "api", "repos", "create"]:
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in self.taken:
                    return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
                self.taken[name], self.files[name] = (
                    asked.get("visibility") == "private" or asked.get("private") is True,
                    {},
                )
                return 200, {"url": f"{self.url}/{name}", "name": name}
            case ["GET", "api", "models", owner, name, *_]:
                return 200, {"id": f"{owner}/{name}", "private": self.taken[f"{owner}/{name}"], "siblings": []}
            case ["POST", "api", "validate-yaml"]:
                return 200, {"warnings": [], "errors": []}
            case ["POST", "api", "models", _, _, "preupload", "main"]:
                modes = [
                    (file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular")
                    for file in asked["files"]
                ]
                return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]}
            case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    one | {"actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                    for one in asked["objects"]
                ]
                return 200, {"transfer": "basic", "objects": objects}
            case ["POST", "api", "models", owner, name, "commit", "main"]:
                self.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
                return 200, {"commitUrl": f"{self.url}/{owner}/{name}/commit/1", "commitOid": "1", "success": True}
        return 404, {"error": f"nothing at {method} {path}"}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.large[value["oid"]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running(hub: HubStandIn) -> Iterator[HubStandIn]:
    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, said = hub.answer(
                self.command, self.path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
            )
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A hub of one's own, with a token for it, as HF_ENDPOINT and HF_TOKEN would name them before the start."""
    with running(HubStandIn()) as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mira")
        yield hub


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        assert b"hf_secret_of_mira" not in content
        assert b"/home/" not in content
        assert str(folder.parent).encode() not in content, name
    return folder


def test_an_adapter_is_pushed_with_tokenizer_and_card(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base")
    run = lora_run(tmp_path, base)
    assert cli.main(["export", str(run), "--push", "foxes/fox-adapter", "--private"]) == 0
    assert capsys.readouterr().out.endswith(f"pushed to {hub.url}/foxes/fox-adapter\n")
    assert hub.taken == {"foxes/fox-adapter": True}
    assert hub.tokens == {"Bearer hf_secret_of_mira", ""}  # large files go to an address that needs none
    there = unpacked(hub.files["foxes/fox-adapter"], tmp_path / "there")
    fetched = logits(peft.PeftModel.from_pretrained(loaded(base), there))
    assert torch.equal(fetched, beside(base, run))
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert transformers.AutoTokenizer.from_pretrained(there).chat_template == tokenizer().chat_template
    assert 'PeftModel.from_pretrained(base, "foxes/fox-adapter")' in (there / "README.md").read_text()


def test_a_merged_model_is_pushed_and_pushed_again(hub: HubStandIn, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    run = lora_run(tmp_path, base)
    for name in ("first", "second"):
        assert Platform().export(str(run), merged=tmp_path / name, push="fox") == f"{hub.url}/me/fox"
    assert hub.taken == {"me/fox": False}
    there = unpacked(hub.files["me/fox"], tmp_path / "there")
    same(logits(loaded(there)), beside(base, run))
    assert 'AutoModelForCausalLM.from_pretrained("me/fox")' in (there / "README.md").read_text()
    assert {path.name for path in there.iterdir()} == {path.name for path in (tmp_path / "first").iterdir()}
    assert Platform().export(str(full_run(tmp_path)), push="whole") == f"{hub.url}/me/whole"
    assert "model.safetensors" in hub.files["me/whole"]


def test_a_push_that_cannot_be_is_said_before_anything_is_made(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lora_run(tmp_path, save_model(tmp_path / "base"))

    def refused(repo: str = "fox", *, private: bool = False) -> str:
        with pytest.raises(UserError) as caught:
            Platform().export(str(run), merged=tmp_path / "merged", push=repo, private=private)
        assert not (tmp_path / "merged").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    hub.taken["me/public"] = False
    assert "'me/public': everyone can read this repository" in refused("me/public", private=True)
    hub.refusal = (403, "You don't have the rights to create a model under the namespace foxes")
    assert "push = 'foxes/fox': the hub refuses (403: You don't have the rights" in refused("foxes/fox")
    hub.refusal = (401, "Invalid username or password.")
    assert "the hub refuses (401: Invalid username or password.)" in refused()
    assert "push = 'a/b/c': Repo id must be" in refused("a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "push = 'fox': http://127.0.0.1:9 cannot be reached" in refused()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "push: the hub wants a token: set HF_TOKEN, or run hf auth login" in refused()


def test_a_card_says_what_a_run_is_made_of_and_nothing_of_the_machine() -> None:
    run = Path("/home/mira/outputs/fox")
    local = model_card(manifest(run, "/home/mira/models/tiny"), repo="foxes/fox", adapter=True)
    assert "# fox\n" in local
    assert "A LoRA adapter for `tiny`, trained for 30 steps" in local
    assert "base_model" not in local  # the hub would look for it
    assert "Rows: `rows.jsonl`." in local
    assert "`Instruct`, of up to 1024 tokens, 10% of the rows held out" in local
    for row in ("| method | Lora |", "| method.rank | 4 |", "| optim.lr | 0.0002 |", "| train.max_steps | 30 |"):
        assert row in local
    assert "| eval_loss | 1.5 |\n| base_eval_loss | 4.125 |" in local
    assert "| lr |" not in local
    assert "/home" not in local
    assert "mira" not in local

    config = FinetuneConfig(
        name="fox", model=ModelSource("someone/base"), method=Full(), train=Train(),
        data=Data(source=Hub("someone/rows"), processor=Instruct(), validation=Hub("/home/mira/held-out")),
    )  # fmt: skip
    whole = model_card(manifest(run, "someone/base", method="full", config=plain(config)), repo="fox", adapter=False)
    assert "library_name: transformers\npipeline_tag: text-generation\nbase_model: someone/base\n" in whole
    assert "datasets:\n- someone/rows\n---" in whole
    assert "A full finetune of `someone/base`" in whole
    assert "Rows: `someone/rows`, `held-out`." in whole
    assert 'ServedModel(id="fox", source=ModelSource("fox"))' in whole
