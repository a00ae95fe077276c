"""What a model is worth as an engine serves it: its perplexity and its tokens/s, found in a process of its own.

    python -m plugins.measure < JOB       in the engine's environment, the project's root the current directory

There it has the machine to itself, as a replica has; an engine's threads and memory are gone when it ends.
"""

import asyncio
import json
import logging
import math
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

from plugins.cluster import PROJECT
from plugins.engines import Engine, EngineSpec, OwnEnvironment
from plugins.environments import SHORT_WAITS, Environment
from plugins.spec import UserError
from plugins.types import GenerateRequest, ModelSource

Text = tuple[int, ...]  # its tokens
PROMPT, ANSWER, TIMES = 32, 64, 5  # tokens of each, and answers that are timed


@dataclass(frozen=True)
class Measured:
    """`perplexity` of a token of the texts; `tokens_per_s` of an answer to one client who is alone."""

    perplexity: float
    tokens_per_s: float


def python_of(spec: EngineSpec) -> str:
    """What runs its engine. Raises UserError where that is an environment that is not as it should be."""
    if not isinstance(spec, OwnEnvironment):
        return sys.executable
    environment = Environment.find(spec.environment)
    environment.check(f"engine = {type(spec).__name__}")
    return environment.python


def measure(spec: EngineSpec, source: ModelSource, texts: Sequence[Text]) -> Measured:
    """What `source` is worth as served by `spec` on all CPUs. Blocks. Raises UserError for what cannot be served so."""
    command = [python_of(spec), "-m", "plugins.measure"]
    job = pickle.dumps((spec, source, texts))
    variables = os.environ | SHORT_WAITS
    done = subprocess.run(command, input=job, stdout=subprocess.PIPE, cwd=PROJECT, env=variables, check=False)
    if done.returncode:
        raise UserError(f"measuring {source.path} has failed (exit code {done.returncode}); what it said is above")
    told = json.loads(done.stdout.splitlines()[-1])
    if "mistake" in told:
        raise UserError(told["mistake"])
    return Measured(**told)


def _main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    spec, source, texts = pickle.loads(sys.stdin.buffer.read())
    try:
        told = asdict(asyncio.run(_measure(spec, source, texts)))
    except UserError as error:
        told = {"mistake": str(error)}
    except KeyboardInterrupt:  # who started this one is told too, and says so
        sys.exit(130)
    sys.stdout.write(f"\n{json.dumps(told)}\n")


async def _measure(spec: EngineSpec, source: ModelSource, texts: Sequence[Text]) -> Measured:
    engine = spec.start(source, os.cpu_count() or 1, 0)
    try:
        said = [found for one in await asyncio.gather(*(_logprobs(engine, text) for text in texts)) for found in one]
        await _seconds(engine, texts[0])  # what is slow only the first time
        seconds = [await _seconds(engine, texts[0]) for _ in range(TIMES)]
    finally:
        await engine.close()
    return Measured(math.exp(-statistics.fmean(said)), ANSWER / statistics.median(seconds))


async def _logprobs(engine: Engine, text: Text) -> list[float]:
    """Of each token but the first, which nothing predicts."""
    request = GenerateRequest(prompt=text, max_tokens=0, prompt_logprobs=0)
    tokens = [token async for delta in engine.generate(request) for token in delta.prompt_logprobs]
    return [cast(float, token.logprob) for token in tokens[1:]]


async def _seconds(engine: Engine, text: Text) -> float:
    """That an answer of ANSWER tokens takes."""
    started = time.perf_counter()
    request = GenerateRequest(prompt=text[:PROMPT], max_tokens=ANSWER, ignore_eos=True, temperature=0)
    async for _ in engine.generate(request):
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    _main()
