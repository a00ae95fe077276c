"""Scores a model by lm-evaluation-harness twice: in its own process, and through our server's /v1/completions.

    scripts/bench/lm_eval [--model scripts/demo_base/model]

The tasks are files of this repository: multiple choice, and the perplexity of short texts. The server is asked as the
harness asks any: token ids as prompts, echoed with their log-probabilities (its `local-completions`). Both in fp32. Prints
both scores and their difference, and the largest difference of a log-likelihood; exit code 1 if they are not the same.
"""

import argparse
import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.bench import servers
from scripts.bench.serve import PLACE
from scripts.bench.train import last_line, on_cpu

LM_EVAL = ".venv-lm-eval/bin/python"
ALLOWED = 1e-4  # of a score, as a part of it; of a log-likelihood, for each token of the longest text: see SUMMED
SUMMED = 100  # tokens, about


def main() -> int:
    parser = argparse.ArgumentParser(description="lm-evaluation-harness in process and through our server")
    parser.add_argument("--model", type=Path, default=Path("scripts/demo_base/model"), help="a directory")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: there is no model (no config.json)")
    if not Path(LM_EVAL).exists():
        parser.error(f"{LM_EVAL} is not there: scripts/bench/peers lm-eval makes it")
    environment = on_cpu(options.threads)
    model = options.model.absolute()
    files = (PLACE / "servers" / "lm-eval").absolute()
    files.mkdir(parents=True, exist_ok=True)
    side = [LM_EVAL, "-m", "scripts.bench.lm_eval_side", str(model)]
    in_process = last_line(side, environment)
    server = servers.Server(functools.partial(servers.ours(servers.ENGINES["torch"]), dtype="fp32"), {})
    with servers.running(server, model, options.threads, files, environment) as client:
        served = last_line([*side, "--port", str(client.port), "--served-as", client.model], environment)
    lines, same = compare(in_process, served)
    print("\n".join(lines))
    return 0 if same else 1


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[list[str], bool]:
    """A table of both, and whether they are the same. Both are what lm_eval_side.py prints."""
    lines = [f"{'':<34}{'in process':>14}{'served':>14}{'difference':>14}"]
    for score, value in one["scores"].items():
        served = other["scores"][score]
        lines.append(f"{score:<34}{value:>14.6f}{served:>14.6f}{served - value:>14.1e}")
    pairs = list(zip(one["loglikelihoods"], other["loglikelihoods"], strict=True))
    largest = max(abs(a - b) for a, b in pairs)
    lines.append(f"{len(pairs)} log-likelihoods; the largest difference is {largest:.1e}")
    scores = all(math.isclose(value, other["scores"][score], rel_tol=ALLOWED) for score, value in one["scores"].items())
    return lines, scores and largest <= ALLOWED * SUMMED


if __name__ == "__main__":
    sys.exit(main())
