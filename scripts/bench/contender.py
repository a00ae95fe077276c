"""What every contender shares: its arguments, and the one line of JSON that it prints last."""

import argparse
import json
import resource
import time
from pathlib import Path


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workload", type=Path, help="a directory that scripts/bench/workload.py made")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps in all")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed, the first ones")
    return parser


class Stopwatch:
    """Trained tokens of the steps after `warmup`, and the time from the first of these to the last, pauses included."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.steps = 0
        self.tokens = 0
        self.loss = 0.0
        self.began = self.ended = time.perf_counter()

    def step(self, tokens: int, loss: float) -> None:
        """A step has ended that saw `tokens` tokens, padding not counted, with the mean loss `loss`."""
        self.ended = time.perf_counter()
        self.steps += 1
        self.loss = loss
        if self.steps <= self.warmup:
            self.began = self.ended
        else:
            self.tokens += tokens

    def report(self) -> None:
        report(self.tokens / (self.ended - self.began), self.steps, self.loss, peak_rss_mib())


def report(tokens_per_s: float, steps: int, loss: float, peak_rss: float | None) -> None:
    line = {"tokens_per_s": tokens_per_s, "peak_rss_mib": peak_rss, "steps": steps, "loss": loss}
    print(json.dumps(line), flush=True)


def peak_rss_mib() -> float:
    """The most memory that this process had at any time. Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
