"""Serves the same model with every contender in turn, asks the same of each, and prints what each reaches.

    scripts/bench/serve [--rounds 3] [--clients 1,8,32] [--requests 3] [--mixed] [--dtype fp32] [--only NAME,...]
        [--json FILE] [--readme]

A prompt has 64 tokens, an answer 64, greedy, in --dtype, streamed over HTTP. Every contender is started anew for every
round, is asked once by each client before anything is timed, and has the machine to itself but for the clients. They take
turns (A B C, A B C, ...); what is shown is the median over the rounds. Only the ratios mean something on another machine.

Our engines have their own names; NAME-in-process is one of them without Ray and HTTP. vllm-server and transformers-serve are
the peers' servers; openvino-genai and ipex-generate the libraries beneath two of our engines, in process, a whole batch at a
time. --mixed lets 64 clients send prompts of 16 to 1500 tokens to those that serve: how long do those who are being answered
wait when a long prompt has come? --readme writes the table and the plot of README.md.
"""

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plugins.engines.openvino_files import exported
from plugins.types import ModelSource
from scripts.bench import load, report, servers
from scripts.bench.report import YARDSTICK
from scripts.bench.train import MAIN, last_line, machine, on_cpu, output_of

Figures = dict[str, float]  # of one load
Result = dict[str, Any]

IN_PROCESS = {"torch-in-process": "Torch", "openvino-in-process": "OpenVino"}  # the specs of engines
LOCKSTEP = ("openvino-genai", "ipex-generate")
CONTENDERS = (*servers.SERVERS, *IN_PROCESS, *LOCKSTEP)
BENEATH = {  # what is without Ray and HTTP what the engine is with them
    "torch": "torch-in-process",
    "openvino": "openvino-genai",
    "ipex": "ipex-generate",
    "vllm": YARDSTICK,
}
PLACE = Path(".bench")
COLUMNS = {
    "tokens_per_s": "tokens/s",
    "first_p50_ms": "first p50",
    "first_p99_ms": "first p99",
    "gap_p50_ms": "gap p50",
    "gap_p99_ms": "gap p99",
    "token_gap_p50_ms": "token gap p50",
    "token_gap_longest_ms": "longest",
}


def main() -> int:
    options = arguments().parse_args()
    if options.readme and options.dtype != "bf16":
        sys.exit(f"bench: --readme shows what is measured in bf16, not in {options.dtype}")
    if options.readme and YARDSTICK not in options.only:
        sys.exit(f"bench: --readme compares with {YARDSTICK}, which --only leaves out")
    environment = on_cpu(options.threads)
    model = Path(output_of([MAIN, "-m", "scripts.bench.serve_model"], environment).splitlines()[-1]).absolute()
    loads = load.plan(options.clients, options.requests, mixed=options.mixed, seed=0)
    measured: dict[str, list[Result]] = {name: [] for name in options.only}
    for round_ in range(1, options.rounds + 1):
        for name in options.only:
            result = measure(name, model, loads, options, environment)
            measured[name].append(result)
            speeds = [f"{figures['tokens_per_s']:.0f} ({one})" for one, figures in result["loads"].items()]
            print(f"round {round_}/{options.rounds}  {name:<20} tokens/s: {', '.join(speeds)}", file=sys.stderr)
    medians = {name: median(results) for name, results in measured.items()}
    ratios = compare(medians)
    print(table(medians, ratios))
    if options.json:
        about = {"machine": machine(options.threads), "dtype": options.dtype, "requests": options.requests}
        everything = about | {"rounds": measured, "medians": medians, "ratios": ratios}
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
    if options.readme:
        report.write(medians)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="our serving beside that of the peers")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--clients", type=numbers, default=[1, 8, 32], help="how many at once: 1,8,32")
    parser.add_argument(
        "--requests", type=positive, default=3, help="prompts a client sends; one alone sends 4 x as many"
    )
    parser.add_argument("--mixed", action="store_true", help="also 64 clients with prompts of 16 to 1500 tokens")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--dtype", choices=tuple(servers.LONG), default="bf16", help="fp32 for CPUs that have no bf16")
    parser.add_argument("--only", type=contenders, default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--json", type=file_to_write, help="write everything here too")
    parser.add_argument("--readme", action="store_true", help="write the table and the plot of README.md")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def contenders(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"no contender is called {unknown[0]!r}; choose from {', '.join(CONTENDERS)}")
    return names


def file_to_write(text: str) -> Path:
    if not (parent := Path(text).absolute().parent).is_dir():
        raise argparse.ArgumentTypeError(f"{parent} is not a directory")
    return Path(text)


def measure(
    name: str, model: Path, loads: Sequence[load.Load], options: argparse.Namespace, environment: Mapping[str, str]
) -> Result:
    """The figures of each load, and `peak_rss_mib`. Exits where an answer is not what was asked for."""
    files = (PLACE / "servers" / name).absolute()
    files.mkdir(parents=True, exist_ok=True)
    try:
        if name in servers.SERVERS:
            answers, peak = over_http(servers.SERVERS[name], model, loads, options, files, environment)
        else:
            answers, peak = in_process(name, model, loads, options, files, environment)
    except (ValueError, ExceptionGroup) as error:  # ExceptionGroup: of the connections, when a server died
        sys.exit(f"bench: {name}: {error}; its log is {files / 'log'}")
    for one, given in answers.items():
        if wrong := [answer.tokens for answer in given if answer.tokens != load.NEW_TOKENS]:
            sys.exit(f"bench: {name}: an answer to {one} has {wrong[0]} tokens, not {load.NEW_TOKENS}")
    return {"loads": {one: load.summary(given) for one, given in answers.items()}, "peak_rss_mib": peak}


Answers = dict[str, list[load.Answer]]


def over_http(
    server: servers.Server,
    model: Path,
    loads: Sequence[load.Load],
    options: argparse.Namespace,
    files: Path,
    environment: Mapping[str, str],
) -> tuple[Answers, float]:
    with servers.running(server, model, options.threads, files, options.dtype, environment) as client:
        recordings = asyncio.run(drive(client, loads))
        peak = servers.peak_rss_mib()
    return {one: [load.read(recording) for recording in given] for one, given in recordings.items()}, peak


async def drive(client: load.Client, loads: Sequence[load.Load]) -> dict[str, list[load.Recording]]:
    recordings = {}
    for one in loads:
        for recording in await load.send_all(one.warm_up, client.send):
            load.read(recording)  # an error is known at once
        recordings[one.name] = await load.send_all(one.prompts, client.send)
    return recordings


def in_process(
    name: str,
    model: Path,
    loads: Sequence[load.Load],
    options: argparse.Namespace,
    files: Path,
    environment: Mapping[str, str],
) -> tuple[Answers, float]:
    plan = files / "plan.json"
    plan.write_text(json.dumps([dataclasses.asdict(one) for one in loads if name in IN_PROCESS or one.name != "mixed"]))
    if name in IN_PROCESS:
        what = [MAIN, "-m", "scripts.bench.in_process", "--engine", IN_PROCESS[name]]
    elif name == "openvino-genai":
        model = exported(ModelSource(str(model)), "same")
        what = [".venv-openvino-genai/bin/python", "-m", "scripts.bench.peer_openvino"]
    else:
        what = [".venv-ipex-generate/bin/python", "-m", "scripts.bench.peer_ipex"]
    command = [*what, str(model), str(plan), "--threads", str(options.threads), "--dtype", options.dtype]
    result = last_line(command, dict(environment))
    return answers_of(result), result["peak_rss_mib"]


def answers_of(result: Result) -> Answers:
    """Of each load, from the line of JSON that a contender in process prints."""
    return {
        one: [load.Answer(sent, [load.Chunk(*chunk) for chunk in chunks], tokens) for sent, chunks, tokens in given]
        for one, given in result["answers"].items()
    }


def median(results: Sequence[Result]) -> Result:
    """Of each figure of each load, and of the memory."""
    loads = {
        one: {figure: statistics.median(result["loads"][one][figure] for result in results) for figure in figures}
        for one, figures in results[0]["loads"].items()
    }
    return {"loads": loads, "peak_rss_mib": statistics.median(result["peak_rss_mib"] for result in results)}


def compare(medians: Mapping[str, Result]) -> list[Result]:
    """Each of ours to vLLM's server, and to what is beneath it: times the tokens/s, ms by which the first token is later."""
    return [
        {
            "of": ours,
            "to": other,
            "load": one,
            "tokens_per_s": mine["tokens_per_s"] / theirs["tokens_per_s"],
            "first_p50_ms_more": mine["first_p50_ms"] - theirs["first_p50_ms"],
        }
        for ours in servers.ENGINES
        if ours in medians
        for other in dict.fromkeys((YARDSTICK, BENEATH.get(ours, YARDSTICK)))
        if other in medians
        for one, mine in medians[ours]["loads"].items()
        if (theirs := medians[other]["loads"].get(one))
    ]


def table(medians: Mapping[str, Result], ratios: Sequence[Result]) -> str:
    """Every load with a line a contender; the ratios; the memory. Times are in ms."""
    lines = []
    for one in next(iter(medians.values()))["loads"]:
        what = "64 clients, prompts of 16 to 1500 tokens" if one == "mixed" else f"{one} client{'s' * (one != '1')}"
        lines.append(f"{what:<42}" + "".join(f"{title:>15}" for title in COLUMNS.values()))
        for name, result in medians.items():
            if one not in result["loads"]:
                continue
            figures = [f"{result['loads'][one][column]:15.1f}" for column in COLUMNS]
            lines.append(f"{name:<42}" + "".join(figures))
        lines.append("")
    for ratio in ratios:
        what = f"{ratio['of']} / {ratio['to']}, {ratio['load']}"
        # Who answers in lockstep has no first token.
        first = "" if ratio["to"] in LOCKSTEP else f"{ratio['first_p50_ms_more']:+15.1f} ms"
        lines.append(f"{what:<42}{ratio['tokens_per_s']:15.2f}{first}")
    for name, result in medians.items():
        if mixed := result["loads"].get("mixed"):
            longest = mixed["token_gap_longest_ms"] / mixed["token_gap_p50_ms"]
            lines.append(f"{name + ', mixed: longest / median token gap':<60}{longest:15.1f}")
    lines.append("")
    lines += [f"{name + ', peak RSS, MiB':<42}{result['peak_rss_mib']:15.0f}" for name, result in medians.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
