"""The torch engine on a GPU beside transformers' own continuous batching, in process, on models of random weights.

    scripts/bench/gpu [--shapes 1b,8b] [--sequences 1,8,64,256] [--requests 2] [--rounds 3] [--json FILE]

As in serve.py a prompt has 64 tokens, an answer 64, greedy, in bf16. So many sequences begin together, --requests times (one
alone four times as often), after as many that are not timed. Contenders take turns; what is shown is the median over the
rounds. Of one sequence alone also what its steps make of the memory's bandwidth, which is what a copy has on the same
device: each step reads every weight once. Without a GPU it runs on two cores, only to see that it does: --shapes 124m.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from plugins import hardware
from scripts.bench import load, serve_model, workload
from scripts.bench.serve import PLACE, Figures, answers_of, file_to_write, numbers, positive
from scripts.bench.train import MAIN, last_line

SHAPES: dict[str, dict[str, Any]] = {  # the larger ones as Llama 3.2 1B and 3.1 8B, with fewer tokens to choose from
    "124m": workload.SIZES[workload.MODEL],
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
PEER, OURS = "transformers", "torch"
COPIED, COPIES = 2**28, 20  # numbers of 4 bytes, and how often they are


def main() -> int:
    options = arguments().parse_args()
    gpus = int(torch.cuda.is_available())
    device = hardware.device(gpus)
    PLACE.mkdir(exist_ok=True)
    plan = PLACE / "gpu-plan.json"
    loads = load.plan(options.sequences, options.requests, mixed=False, seed=0)
    plan.write_text(json.dumps([dataclasses.asdict(one) for one in loads]))
    speed = bandwidth(device)
    about = {"device": torch.cuda.get_device_name() if gpus else "CPU", "bytes_per_s": speed}
    print(f"{about['device']}: {speed / 1e9:.0f} GB/s", flush=True)
    contenders = {PEER: [MAIN, "-m", "scripts.bench.peer_continuous"], OURS: ours(gpus, max(options.sequences))}
    if gpus:
        contenders[f"{OURS}, CUDA graphs"] = ours(gpus, max(options.sequences), cuda_graphs=True)
    everything: dict[str, Any] = {}
    for shape in options.shapes:
        model = serve_model.make(PLACE, SHAPES[shape], str(device))
        torch.cuda.empty_cache()  # the contenders have the device to themselves; without one it does nothing
        rounds: dict[str, list[dict[str, Figures]]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, command in contenders.items():
                threads = ["--threads", str(os.cpu_count() if gpus else 2)]
                answers = answers_of(last_line([*command, str(model), str(plan), *threads], dict(os.environ)))
                rounds[name].append({one: load.summary(given) for one, given in answers.items()})
        everything[shape] = rounds
        print(table(shape, rounds, weights(model) / speed), flush=True)
        if options.json:
            options.json.write_text(json.dumps(about | {"rounds": everything}, indent=2) + "\n")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the torch engine on a GPU beside transformers' continuous batching")
    parser.add_argument("--shapes", type=shapes, default=["1b", "8b"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--sequences", type=numbers, default=[1, 8, 64, 256], help="how many at once: 1,8,64,256")
    parser.add_argument("--requests", type=positive, default=2, help="answers to each of them, one after another")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--json", type=file_to_write, help="write everything here too")
    return parser


def shapes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise argparse.ArgumentTypeError(f"no shape is called {unknown[0]!r}; choose from {', '.join(SHAPES)}")
    return names


def ours(gpus: int, sequences: int, **options: Any) -> list[str]:
    spec = json.dumps({"max_batch": sequences} | options)
    return [MAIN, "-m", "scripts.bench.in_process", "--engine", "Torch", "--options", spec, "--gpus", str(gpus)]


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = (torch.zeros(COPIED, device=device) for _ in range(2))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        target[-1].item()  # waits for them
        times.append((time.perf_counter() - began) / COPIES)
    return 2 * source.nbytes / min(times)


def weights(model: Path) -> int:
    """Bytes that a step reads: all but the embedding, of which it takes a row a token."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if "embed_tokens" not in name]  # noqa: SIM118  # no dict
            total += sum(2 * torch.Size(tensors.get_slice(name).get_shape()).numel() for name in names)
    return total


def table(shape: str, rounds: dict[str, list[dict[str, Figures]]], shortest: float) -> str:
    """`shortest`: seconds that a step takes at least."""
    lines = [f"\n{shape:<30}{'tokens/s':>15}{'to ' + PEER:>20}{'of the bandwidth':>20}"]
    for one in rounds[OURS][0]:
        for name, results in rounds.items():
            made, theirs = (_median(rounds[which], one, "tokens_per_s") for which in (name, PEER))
            line = f"{one + '  ' + name:<30}{made:15.0f}{made / theirs:20.2f}"
            if one == "1" and name != PEER:  # which says only when all is done
                line += f"{shortest / _median(results, one, 'token_gap_p50_ms') * 1000:20.0%}"
            lines.append(line)
    return "\n".join(lines)


def _median(results: Sequence[dict[str, Figures]], one: str, figure: str) -> float:
    return statistics.median(result[one][figure] for result in results)


if __name__ == "__main__":
    sys.exit(main())
