"""For all tests: no network, and one thread a process, since two cores are shared with the processes that tests start.

Tests that need an engine's own environment say which: `pytest.mark.environment("vllm")`. Where it is not there they are
reported as not run, with the command that makes it; so are those that need a C++ compiler.
"""

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from plugins.environments import Environment

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "disabled"
CACHE = Path(tempfile.mkdtemp(prefix="manta-cache-"))  # tests neither use nor fill the user's own
os.environ["MANTA_CACHE"] = str(CACHE)
# What takes seconds to compile is kept from run to run.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "native"
COMPILED.mkdir(parents=True, exist_ok=True)
(CACHE / "native").symlink_to(COMPILED)

NOT_RUN = pytest.StashKey[Counter[str]]()


@pytest.hookimpl(trylast=True)  # after -m has taken its part
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needs = {item: [mark.args[0] for mark in item.iter_markers("environment")] for item in items}
    problems = {name: Environment.find(name).problem() for name in {name for names in needs.values() for name in names}}
    missing = {item: problem for item in items for name in needs[item] if (problem := problems[name])}
    if not shutil.which(os.environ.get("CXX", "g++")):
        missing |= {item: "no C++ compiler (g++)" for item in items if item.get_closest_marker("compiler")}
    config.stash[NOT_RUN] = Counter(missing.values())
    if missing:
        config.hook.pytest_deselected(items=list(missing))
        items[:] = [item for item in items if item not in missing]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for problem, count in config.stash.get(NOT_RUN, Counter()).items():
        terminalreporter.write_line(f"NOT RUN: {count} tests: {problem}", yellow=True)
