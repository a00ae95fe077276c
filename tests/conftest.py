"""For all tests: no network, and one thread a process, since two cores are shared with the processes that tests start.

Tests that need an engine's own environment say which: `pytest.mark.environment("vllm")`. Where it is not there they are
reported as not run, with the command that makes it.
"""

import os
import tempfile
from collections import Counter

import pytest

from plugins.environments import Environment

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MANTA_CACHE"] = tempfile.mkdtemp(prefix="manta-cache-")  # tests neither use nor fill the user's own

NOT_RUN = pytest.StashKey[Counter[str]]()


@pytest.hookimpl(trylast=True)  # after -m has taken its part
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needs = {item: mark.args[0] for item in items if (mark := item.get_closest_marker("environment"))}
    problems = {name: Environment.find(name).problem() for name in set(needs.values())}
    missing = [item for item in items if item in needs and problems[needs[item]]]
    config.stash[NOT_RUN] = Counter(str(problems[needs[item]]) for item in missing)
    if missing:
        config.hook.pytest_deselected(items=missing)
        items[:] = [item for item in items if item not in set(missing)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for problem, count in config.stash[NOT_RUN].items():
        terminalreporter.write_line(f"NOT RUN: {count} tests: {problem}", yellow=True)
