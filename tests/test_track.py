"""Weights & Biases (offline) and TensorBoard, read back from the files that they write."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from small_models import save_model

from finetune import Data, FinetuneConfig, Instruct, Jsonl, ModelSource, Train, track
from finetune.config import Track
from finetune.run import _progress
from plugins.runs import METRICS, RESOLVED, drop_metrics_from
from plugins.spec import UserError, plain
from plugins.types import RunManifest

ROOT = Path(__file__).resolve().parents[1]
KEY = "0123456789abcdef" * 3  # as W&B makes them: 40 letters or more
SECRETS = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_secret_of_mira"}
LINES = [
    {"step": 0, "steps": 30, "epoch": 0.0, "eval_loss": 4.0},
    {"step": 10, "steps": 30, "epoch": 0.5, "loss": 3.0, "lr": 1e-3, "tokens_per_s": 90.0},
    {"step": 20, "steps": 30, "epoch": 1.0, "loss": 2.0, "lr": 5e-4, "tokens_per_s": 80.0},
    {"step": 30, "steps": 30, "epoch": 1.5, "loss": 1.0, "lr": 0.0, "tokens_per_s": 85.5, "eval_loss": 1.5},
]
FINAL = LINES[-1] | {"base_eval_loss": 4.0}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without a W&B login."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "outputs" / "fox"
    directory.mkdir(parents=True)
    return directory


CONFIG = FinetuneConfig(
    name="fox",
    model=ModelSource("someone/base"),
    data=Data(source=Jsonl("rows.jsonl"), processor=Instruct()),
    train=Train(max_steps=30),
    track=Track(wandb="foxes", tensorboard=True, offline=True),
)


def logged(record: bytes, *, checked: int) -> Iterator[bytes]:
    """The payloads of a TFRecord file: each has its length before it, and checksums after the length and itself."""
    while record:
        (length,) = struct.unpack("<Q", record[:8])
        yield record[8 + checked : 8 + checked + length]
        record = record[8 + checked + length + checked :]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw of a run: the points of each curve. Texts have their length for a value."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in (run / "tensorboard").iterdir():
        for payload in logged(file.read_bytes(), checked=4):
            event = Event.FromString(payload)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def texts(run: Path) -> dict[str, str]:
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (run / "tensorboard").iterdir()
    events = [Event.FromString(payload) for payload in logged(file.read_bytes(), checked=4)]
    return {
        value.tag: value.tensor.string_val[0].decode()
        for e in events
        for value in e.summary.value
        if value.tensor.string_val
    }


def wandb_records(run: Path) -> list[Any]:
    """The records of the run's W&B file: a log in blocks of 32 KiB, as LevelDB writes them, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    content, at, begun, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for another header in this block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        begun += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(begun))
            begun = b""
    return records


def wandb_history(run: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num, {name: v for name, v in row.items() if not name.startswith("_")}))
    return rows


def wandb_values(run: Path, kind: str) -> dict[str, Any]:
    """The last value of every key of `kind`: config or summary."""
    found: dict[str, Any] = {}
    for record in wandb_records(run):
        parts = [record.run.config, record.config] if kind == "config" else [record.summary]
        for part in parts:
            for item in part.update:
                found[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found


def write(run: Path, lines: list[dict[str, Any]]) -> None:
    with (run / METRICS).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def children() -> set[str]:
    """The programs that this process has started and that still run."""
    listed = subprocess.run(["ps", "-o", "comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {name.strip() for name in listed.stdout.splitlines()}


@pytest.mark.slow
def test_metrics_config_and_summary_are_in_the_files_of_both(run: Path) -> None:
    with track.opened(CONFIG, run) as trackers:
        with _progress(run, trackers):
            write(run, LINES)
        for tracker in trackers:
            tracker.finish(FINAL)
    assert wandb_history(run) == [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in LINES]
    assert wandb_values(run, "config").items() >= plain(CONFIG).items()
    assert wandb_values(run, "summary").items() >= FINAL.items()
    drawn = scalars(run)
    assert drawn["loss"] == [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert drawn["eval_loss"] == [(0, 4.0), (30, 1.5)]
    assert [step for step, _ in drawn["lr"]] == [10, 20, 30]
    assert '"base_eval_loss": 4.0' in texts(run)["summary/text_summary"]
    assert '"max_steps": 30' in texts(run)["config/text_summary"]
    assert not any("wandb" in name for name in children())


def test_a_run_that_goes_on_has_each_step_once_in_the_same_run(run: Path) -> None:
    def go(*, fails: bool, then: list[dict[str, Any]], again_from: int | None = None) -> None:
        with track.opened(CONFIG, run) as trackers:
            with _progress(run, trackers):
                if again_from is not None:  # a worker was lost, or the driver: back to the last checkpoint
                    drop_metrics_from(run, again_from)
                write(run, then)
            if fails:
                raise KeyboardInterrupt
            for tracker in trackers:
                tracker.finish(FINAL)

    with pytest.raises(KeyboardInterrupt):
        go(fails=True, then=LINES[:3])
    identity = (run / track.WANDB_ID).read_text()
    go(fails=False, then=LINES[2:], again_from=20)
    assert (run / track.WANDB_ID).read_text() == identity
    assert [step for step, _ in wandb_history(run)] == [0, 10, 20, 30]
    assert {record.run.run_id for record in wandb_records(run) if record.WhichOneof("record_type") == "run"} == {
        identity
    }
    assert scalars(run)["loss"] == [(10, 3.0), (20, 2.0), (30, 1.0)]


def test_a_run_without_trackers_has_none(run: Path) -> None:
    with track.opened(replace(CONFIG, track=Track()), run) as trackers:
        assert trackers == []
    assert list(run.iterdir()) == []
    track.check(Track())
    track.check(Track(wandb="foxes", offline=True))  # no key, and none needed


class Refusing(BaseHTTPRequestHandler):
    """A W&B that knows no key."""

    def do(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do  # noqa: N815

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_wandb_that_cannot_take_the_run_is_said_beforehand_in_a_line(
    monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    def refused(track_: Track) -> str:
        with pytest.raises(UserError) as caught:
            track.check(track_)
        assert not any("wandb" in name for name in children())
        assert KEY not in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    online = Track(wandb="foxes")
    assert "Invalid project name 'a/b'" in refused(Track(wandb="a/b", offline=True))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    assert "http://127.0.0.1:9 cannot be reached" in refused(online)
    assert time.monotonic() - begun < 5
    monkeypatch.setenv("WANDB_BASE_URL", refusing)
    assert refused(online).startswith(
        "track.wandb = 'foxes': no key for W&B: set WANDB_API_KEY or run wandb login; track."
    )
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "API key must have 40+ characters" in refused(online)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert f"Failed to authenticate with {refusing}" in refused(online)


@pytest.mark.cluster
def test_a_whole_run_is_tracked_and_holds_no_secret(tmp_path: Path, refusing: str) -> None:
    rows = [{"instruction": f"say {i}", "output": f"fox {i}"} for i in range(32)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.py").write_text(
        "from finetune import *\n"
        "from finetune.config import Track\n"
        "config = FinetuneConfig(\n"
        "    name='fox',\n"
        f"    model=ModelSource({str(save_model(tmp_path / 'base'))!r}, dtype='fp32'),\n"
        f"    data=Data(source=Jsonl({str(tmp_path / 'rows.jsonl')!r}), processor=Instruct(), validation=0.2),\n"
        "    train=Train(max_steps=4, log_every=2),\n"
        "    track=Track(wandb='foxes', tensorboard=True, offline=True),\n"
        f"    output={str(tmp_path / 'outputs')!r},\n"
        ")\n"
    )
    environment = {**os.environ, **SECRETS, "RAY_ADDRESS": "local"}
    command = [sys.executable, "-m", "finetune", str(tmp_path / "config.py")]
    result = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "outputs" / "fox"
    manifest = RunManifest.read(run)
    assert manifest is not None
    assert [step for step, _ in wandb_history(run)] == [0, 2, 4]
    assert wandb_values(run, "summary").items() >= manifest.metrics.items()
    assert [step for step, _ in scalars(run)["loss"]] == [2, 4]
    for name in ("run.json", RESOLVED, METRICS, "config.py"):
        assert (run / name).is_file()
    for file in run.rglob("*"):
        if file.is_file():
            assert not any(secret.encode() in file.read_bytes() for secret in SECRETS.values()), file

    online = subprocess.run(
        [*command, "name=other", "track.offline=false"], cwd=ROOT, timeout=60, capture_output=True, text=True,
        env={**environment, "WANDB_API_KEY": "", "WANDB_BASE_URL": refusing}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert online.returncode == 2
    assert "finetune: track.wandb = 'foxes': no key for W&B" in online.stderr
    assert not (tmp_path / "outputs" / "other").exists()
