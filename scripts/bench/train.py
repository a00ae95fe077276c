"""Trains the same model on the same rows with every contender in turn, and prints what each of them reaches.

    scripts/bench/train [--rows FILE] [--rounds 3] [--steps 10] [--warmup 3] [--only NAME,...] [--json FILE]

Every contender is a process of its own, on the CPU, with the same number of threads. They take turns (A B C, A B C, ...), so
that a machine that is slower for a while is so for all; what is shown is the median over the rounds. Only the ratios mean
something on another machine. The speed is that of trained tokens: padding does not count.

This process stays small, without torch: Linux counts the memory of a process that starts another as the other's too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

Result = dict[str, Any]

MAIN, TRL = sys.executable, ".venv-trl/bin/python"
CONTENDERS = {
    "loop": [MAIN, "-m", "scripts.bench.peer_loop"],
    "trainer": [MAIN, "-m", "scripts.bench.peer_trainer"],
    "ours-full-rows": [MAIN, "-m", "scripts.bench.ours", "--mode", "full-rows"],
    "ours-full-rows-ray": [MAIN, "-m", "scripts.bench.ours", "--mode", "full-rows", "--ray"],
    "trl-padded": [TRL, "-m", "scripts.bench.peer_trl"],
    "ours-rows": [MAIN, "-m", "scripts.bench.ours", "--mode", "rows"],
    "ours-padded": [MAIN, "-m", "scripts.bench.ours", "--mode", "padded"],
    "trl-packed": [TRL, "-m", "scripts.bench.peer_trl", "--packing"],
    "ours-packed": [MAIN, "-m", "scripts.bench.ours", "--mode", "packed"],
}
# Whose speed and memory are divided by whose.
RATIOS = (
    ("ours-full-rows", "loop"),
    ("ours-full-rows", "trainer"),
    ("ours-full-rows-ray", "ours-full-rows"),
    ("ours-rows", "trl-padded"),
    ("ours-packed", "trl-packed"),
    ("ours-padded", "trl-padded"),
    ("ours-packed", "ours-padded"),
    ("ours-rows", "ours-padded"),
)
MEASURES = ("tokens_per_s", "peak_rss_mib")


def main() -> int:
    parser = argparse.ArgumentParser(description="our training beside that of the peers")
    parser.add_argument(
        "--rows", type=Path, help="JSON lines with the fields dialogue and summary (default: invented ones)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps of a contender in a round")
    parser.add_argument("--warmup", type=int, default=3, help="of these, the first ones, which are not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--json", type=Path, help="write everything here too")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"--only: no contender is called {unknown[0]!r}; choose from {', '.join(CONTENDERS)}")
    if not 0 < options.warmup < options.steps:
        parser.error(f"--warmup {options.warmup}: at least 1, and below --steps {options.steps}")
    if options.rows and not options.rows.is_file():
        parser.error(f"--rows {options.rows}: there is no such file")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: {options.json.absolute().parent} is not a directory")
    if any(CONTENDERS[name][0] == TRL for name in names) and not Path(TRL).exists():
        parser.error(f"{TRL} is not there: scripts/bench/peers trl makes it")

    environment = on_cpu(options.threads)
    workload = made(options.rows, environment)
    measured: dict[str, list[Result]] = {name: [] for name in names}
    for round_ in range(1, options.rounds + 1):
        for name in names:
            command = [*CONTENDERS[name], workload, "--steps", str(options.steps), "--warmup", str(options.warmup)]
            if ".ours" in command[2]:
                command += ["--threads", str(options.threads)]
            result = last_line(command, environment)
            measured[name].append(result)
            print(f"round {round_}/{options.rounds}  {name:<20}{result['tokens_per_s']:8.0f} tokens/s", file=sys.stderr)
    medians = {name: median(results) for name, results in measured.items()}
    ratios = compare(medians)
    print(table(medians, ratios))
    if options.json:
        about = {"machine": machine(options.threads), "steps": options.steps, "warmup": options.warmup}
        everything = about | {"rounds": measured, "medians": medians, "ratios": ratios}
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
    return 0


def on_cpu(threads: int) -> dict[str, str]:
    """The environment of every contender: the same threads, no GPU, no network, a Ray cluster of its own."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "RAY_ADDRESS": "local",
    }


def made(rows: Path | None, environment: dict[str, str]) -> str:
    """The directory of the workload, which is made if it is not there yet."""
    command = [MAIN, "-m", "scripts.bench.workload", *(["--rows", str(rows)] if rows else [])]
    return output_of(command, environment).splitlines()[-1]


def last_line(command: list[str], environment: dict[str, str]) -> Result:
    result: Result = json.loads(output_of(command, environment).splitlines()[-1])
    return result


def output_of(command: list[str], environment: dict[str, str]) -> str:
    """What the command prints. It talks on stderr as well, which is shown only if it fails."""
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{ran.stderr}\nbench: {' '.join(command)} ended with exit code {ran.returncode}")
    return ran.stdout


def median(results: list[Result]) -> Result:
    """Of each measure; None where a contender does not know it."""
    columns = {measure: [result[measure] for result in results] for measure in MEASURES}
    return {measure: None if None in column else statistics.median(column) for measure, column in columns.items()}


def compare(medians: dict[str, Result]) -> list[Result]:
    """The ratios of those pairs of which both have been measured."""
    ratios = []
    for one, other in RATIOS:
        if one in medians and other in medians:
            pairs = {measure: (medians[one][measure], medians[other][measure]) for measure in MEASURES}
            quotients = {measure: a / b if a and b else None for measure, (a, b) in pairs.items()}
            ratios.append({"of": one, "to": other} | quotients)
    return ratios


def table(medians: dict[str, Result], ratios: list[Result]) -> str:
    def figure(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [f"{'':<40}{'trained tokens/s':>18}{'peak RSS, MiB':>16}"]
    for name, result in medians.items():
        speed, memory = figure(result["tokens_per_s"], ".0f"), figure(result["peak_rss_mib"], ".0f")
        lines.append(f"{name:<40}{speed:>18}{memory:>16}")
    lines.append("")
    for ratio in ratios:
        speed, memory = figure(ratio["tokens_per_s"], ".2f"), figure(ratio["peak_rss_mib"], ".2f")
        lines.append(f"{ratio['of'] + ' / ' + ratio['to']:<40}{speed:>18}{memory:>16}")
    return "\n".join(lines)


def machine(threads: int) -> Result:
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": processor[0].partition(": ")[2] if processor else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


if __name__ == "__main__":
    sys.exit(main())
