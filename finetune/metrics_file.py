"""What becomes of a run's reports: a line each in metrics.jsonl.

A module of its own, because Ray Train's controller imports it: with the driver's, it would take seconds more to start.
"""

import json
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from plugins.runs import METRICS, drop_metrics_from


class MetricsFile(UserCallback):
    """Writes each report of rank 0 to metrics.jsonl. Ray Train calls it in its controller, on the driver's node."""

    def __init__(self, run: str) -> None:
        self.run = Path(run)
        self.attempt_begins = True

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        line = metrics[0]
        if self.attempt_begins:
            drop_metrics_from(self.run, line["step"])
            self.attempt_begins = False
        with (self.run / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.attempt_begins = True  # the next attempt goes back to the last checkpoint
