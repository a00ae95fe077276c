"""How this process meets Ray: what to hand `ray.init`, whom to authenticate as, and where relative outputs belong."""

import os
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]


def in_ray_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def init_options() -> dict[str, Any]:
    """Arguments of `ray.init`, for a cluster that runs or one that is to start.

    The project travels as the working directory, so that workers on any node, in any environment, import the same code.
    A submitted job brought it along already.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not in_ray_job():
        options["runtime_env"] = {"working_dir": str(PROJECT)}
    return options


def authenticate() -> None:
    """Let this process use the token that a cluster of this user made when it started. Entry points call this first.

    Ray reads its settings when it is imported, so afterwards it is too late. Only Ray's servers turn tokens on by
    themselves; its job client must be told. What the user has set stays.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    places = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(place in os.environ for place in places) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def output_root() -> Path:
    """What relative outputs are under: $MANTA_ROOT, else the current directory.

    The current directory of a submitted job is a copy that Ray deletes: there, runs go to ~/manta.
    """
    if root := os.environ.get("MANTA_ROOT"):
        return Path(root).expanduser().absolute()
    return Path.home() / "manta" if in_ray_job() else Path.cwd()
