"""The README's files load, and its commands do what it says."""

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cluster import ROOT, Shell, alone, cluster, home  # noqa: F401  # the fixtures

from finetune import FinetuneConfig
from plugins.loading import load_config
from serve import ServeConfig

README = (ROOT / "README.md").read_text()
FILES = {match[1]: match[0] for match in re.findall(r"```python\n((?:# (\w+\.py)\n).*?)```", README, re.DOTALL)}
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
RUN_ELSEWHERE = {"scripts/demo", "scripts/test"}  # by .ci/run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a user has it, with the README's files and rows of the user's own."""
    folder = tmp_path_factory.mktemp("readme") / "manta"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    names, places = ("Mira", "Tom", "Ada", "Ben"), ("market", "harbour", "school", "park")
    draw = random.Random(0)
    rows = []
    for _ in range(200):
        one, two, place = *draw.sample(names, 2), draw.choice(places)
        dialogue = f"{one}: Shall we meet at the {place}? {two}: Yes, at noon."
        rows.append({"dialogue": dialogue, "summary": f"{one} and {two} meet at the {place} at noon."})
    (folder / "my_rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_it_is_short_and_names_files_that_are_there() -> None:
    assert len(README.splitlines()) < 200
    named = set(re.findall(r"`((?:\w+/)+\w*(?:\.\w+)?)`", README)) - {"adapter/"}
    missing = [name for name in named if not (ROOT / name).exists() and name not in ("outputs/",)]
    assert not missing


@pytest.mark.parametrize("name", FILES)
def test_its_config_files_load(name: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    load_config(name, ServeConfig if "ServeConfig" in FILES[name] else FinetuneConfig)


@pytest.fixture
def shell(cluster: Shell, checkout: Path) -> Shell:  # noqa: F811
    environment = cluster.environment | {
        "RAY_API_SERVER_ADDRESS": cluster.environment["DASHBOARD"],
        "HF_HUB_OFFLINE": "1",
    }
    return Shell(environment, checkout)


@pytest.mark.cluster
def test_its_commands_do_what_it_says(shell: Shell, checkout: Path) -> None:
    assert set(COMMANDS) >= RUN_ELSEWHERE
    assert all(os.access(ROOT / name, os.X_OK) for name in RUN_ELSEWHERE)
    # The demo's run takes a minute, and is run in full elsewhere too.
    shorter = {command: f"{command} train.max_steps=10" for command in COMMANDS if command.endswith("demo_lora.py")}
    mine = [command for command in COMMANDS if command not in RUN_ELSEWHERE]
    outputs = {command: shell.run("bash", "-c", shorter.get(command, command)) for command in mine}

    def said(begin: str) -> str:
        return next(output for command, output in outputs.items() if command.startswith(begin))

    assert "[[" in said("manta data")  # no terminal, no colours
    assert "best: summaries" in said("manta evaluate")
    assert (checkout / "models/summaries/model.safetensors").exists()
    assert "lr=0.001" in said("manta finetune my_finetune.py --print")
    losses = [float(loss) for loss in re.findall(r"held-out loss (\d\S+)", said("manta finetune my_finetune.py"))]
    assert (checkout / "outputs/summaries/run.json").exists()
    runs = re.search(r"summaries +finished, held-out loss (\S+) \(base (\S+)\)", said("manta runs"))
    assert runs is not None
    assert float(runs[1]) < float(runs[2]) / 4, losses
    assert "demo:summaries" in said("manta models").split()
    assert "meet at the" in said("manta chat")  # drawn at temperature 1, so not the same each time
    assert '"finish_reason"' in said("curl")
    assert "serving manta: running" in said("manta status")
    assert "submitted job" in said("manta finetune my_finetune.py name=job --submit auto")
    assert "is finished" in said("RAY_AUTH_MODE=token ray job submit")


@pytest.mark.cluster
def test_its_processor_and_its_engine_run(shell: Shell, checkout: Path) -> None:
    shell.run("bash", "-c", "manta finetune my_processor.py train.epochs=0.2")
    assert json.loads((checkout / "outputs/short/run.json").read_text())["name"] == "short"
    shell.run("bash", "-c", "manta serve configs/serve/own_engine.py")
    assert shell.run("bash", "-c", "manta models").split() == ["plain"]
    assert shell.run("bash", "-c", "manta chat plain Hello").strip()
    shell.run("bash", "-c", "manta stop --all")
