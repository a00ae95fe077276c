"""Engines with an environment of their own: where it is looked for, what is wrong with it, and how a replica gets it."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from plugins import environments
from plugins.engines import OpenVino, Torch, Vllm
from plugins.environments import Environment
from plugins.spec import UserError
from plugins.types import ModelSource
from serve.app import build, check_environments
from serve.config import ServeConfig, ServedModel
from ui import cli

GROUPS = """[dependency-groups]
vllm = ["fast-engine>=2,<3", "ray[serve]", 'only-elsewhere; sys_platform == "no-such"']
vllm-gpu = ["fast-engine>=2,<3", "ray[serve]"]
ipex = ["old-engine==1", "ray[serve]"]
openvino-export = ["writer"]
"""
RAY = version("ray")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose environments are still to be made; none lies beside the Python that runs."""
    (tmp_path / "pyproject.toml").write_text(GROUPS)
    monkeypatch.setattr(environments, "PROJECT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "main/.venv"))
    return tmp_path


def make(folder: Path, **versions: str) -> Path:
    """A real environment with these distributions, of which only the metadata is there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name, number in versions.items():
        (packages / f"{name}-{number}.dist-info").mkdir()
        (packages / f"{name}-{number}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
    return folder


def config(**changes: object) -> ServeConfig:
    model = {"id": "m", "source": ModelSource("nobody/model"), "engine": Vllm()} | changes
    return ServeConfig(models=(ServedModel(id="t", source=ModelSource("nobody/model")), ServedModel(**model)))  # type: ignore[arg-type]


def runtime_env(served: ServeConfig) -> dict[str, object]:
    """Of the last model's replicas."""
    application = build(served, {model.id: {} for model in served.models})
    handles = application._bound_deployment.init_args[1]
    options = handles[served.models[-1].id]._bound_deployment.ray_actor_options
    return dict(options["runtime_env"])


def test_a_whole_environment_is_what_the_replica_runs_in(project: Path) -> None:
    folder = make(project / ".venv-vllm", fast_engine="2.1", ray=RAY)
    assert Environment.find("vllm").problem() is None
    check_environments(config())
    assert runtime_env(config())["py_executable"] == str(folder / "bin/python")
    assert "py_executable" not in runtime_env(config(engine=Torch()))


def test_on_gpus_it_is_the_one_for_gpus(project: Path) -> None:
    make(project / ".venv-vllm", fast_engine="2.1", ray=RAY)
    with pytest.raises(UserError, match=r"vllm-gpu is not there: scripts/engine-env vllm-gpu makes it"):
        check_environments(config(gpus=1))
    folder = make(project / ".venv-vllm-gpu", fast_engine="2.1", ray=RAY)
    assert runtime_env(config(gpus=1))["py_executable"] == str(folder / "bin/python")


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"fast_engine": "2.1", "ray": "2.1.0"}, rf"has ray 2\.1\.0, not =={RAY}"),
        ({"fast_engine": "3.0", "ray": RAY}, r"has fast-engine 3\.0, not <3,>=2"),
        ({"ray": RAY}, "has no fast-engine"),
        ({"fast_engine": "2.1"}, "has no ray"),
    ],
)
def test_a_wrong_environment_is_told_before_anything_starts(
    project: Path, versions: dict[str, str], words: str
) -> None:
    make(project / ".venv-vllm", **versions)
    with pytest.raises(UserError, match=words) as caught:
        check_environments(config())
    said = str(caught.value)
    assert said.startswith("models.1.engine = Vllm needs an environment of its own, and ")
    assert said.endswith(f": rm -r {project / '.venv-vllm'}, and scripts/engine-env vllm makes it anew")
    assert "\n" not in said


def test_a_missing_environment_is_told_with_the_command_that_makes_it(project: Path) -> None:
    with pytest.raises(UserError, match=r"\.venv-vllm is not there: scripts/engine-env vllm makes it$"):
        check_environments(config())
    check_environments(config(engine=Torch()))


def test_a_model_that_has_yet_to_be_exported_needs_what_exports_it(project: Path) -> None:
    (project / "model").mkdir()
    own = ServedModel(id="own", source=ModelSource(str(project / "model")), engine=OpenVino())
    with pytest.raises(
        UserError, match=r"^models\.0\.source\.path = '.*/model' has to be exported .*: scripts/engine-env openvino-"
    ):
        check_environments(ServeConfig(models=(own,)))
    (project / "model/openvino_model.xml").touch()  # as manta quantize writes it
    check_environments(ServeConfig(models=(own,)))


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (None, "has no Python that runs"),
        ("#!/bin/sh\nexit 1\n", "has no Python that runs"),
        ("""#!/bin/sh\necho '["3.2", {}]'\n""", r"has Python 3\.2, and this is 3\.\d+"),
    ],
)
def test_a_python_that_cannot_serve_is_told(project: Path, python: str | None, words: str) -> None:
    program = project / ".venv-vllm/bin/python"
    program.parent.mkdir(parents=True)
    if python is not None:
        program.write_text(python)
        program.chmod(0o755)
    with pytest.raises(UserError, match=words):
        check_environments(config())


@pytest.mark.parametrize("own", [{"pip": ["vllm"]}, {"py_executable": "/opt/python"}])
def test_a_config_may_say_itself_what_the_replica_runs_in(project: Path, own: dict[str, object]) -> None:
    check_environments(config(runtime_env=own))
    assert runtime_env(config(runtime_env=own)).items() >= own.items()
    with pytest.raises(UserError, match="is not there"):  # variables say nothing about the Python
        check_environments(config(runtime_env={"env_vars": {"A": "1"}}))


def test_adapters_for_an_engine_that_is_not_to_take_any_are_refused_in_the_config() -> None:
    with pytest.raises(
        UserError, match=r"adapters = \('outputs/\*',\): say how many: engine=Vllm\(max_adapters=\.\.\.\)"
    ):
        config(adapters=("outputs/*",))
    assert config(adapters=("outputs/*",), engine=Vllm(max_adapters=2)).models[1].adapters


def test_a_job_whose_code_is_a_copy_uses_the_environment_beside_the_python_that_runs(project: Path) -> None:
    folder = make(project / "main/.venv-vllm", fast_engine="2.1", ray=RAY)
    assert Environment.find("vllm").python == str(folder / "bin/python")


def test_engines_are_listed_with_what_they_need(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(project / ".venv-vllm", fast_engine="2.1", ray=RAY)
    assert cli.main(["engines"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ENGINE", "ENVIRONMENT", "NEEDS", "HERE"]
    vllm = [line for line in lines if line.startswith("Vllm ")]
    assert len(vllm) == 2
    assert "fast-engine" in vllm[0]
    assert vllm[0].endswith("yes")
    assert vllm[1].endswith("scripts/engine-env vllm-gpu makes it")
    assert any(line.startswith("Torch ") and line.endswith("yes") for line in lines)
    assert any(line.startswith("OpenVino ") and line.endswith("engine-env openvino-export makes it") for line in lines)
    assert any(line.startswith("Ipex ") and line.endswith("scripts/engine-env ipex makes it") for line in lines)
