"""An engine of ours driven directly, without Ray and HTTP: beside its serving it tells what the platform costs.

    python -m scripts.bench.in_process MODEL PLAN --engine Torch --options '{"max_batch": 64}' --threads 2 --dtype bf16

PLAN is a JSON file with the loads of load.plan. Prints a line of JSON last: the answers of each load, and the peak RSS.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from plugins import engines
from plugins.engines import Engine
from plugins.types import GenerateRequest, ModelSource
from scripts.bench import load
from scripts.bench.contender import peak_rss_mib


def main() -> None:
    parser = argparse.ArgumentParser(description="our engine, driven directly")
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--engine", default="Torch")
    parser.add_argument("--options", type=json.loads, default={"max_batch": load.MIXED_CLIENTS}, help="of the engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    loads = [load.Load(**one) for one in json.loads(options.plan.read_text())]
    source = ModelSource(str(options.model), dtype=options.dtype)
    spec = getattr(engines, options.engine)(**options.options)
    engine = spec.start(source, cpus=options.threads, gpus=options.gpus)
    answers = asyncio.run(drive(engine, loads))
    print(json.dumps({"answers": answers, "peak_rss_mib": peak_rss_mib()}))


async def drive(engine: Engine, loads: list[load.Load]) -> dict[str, Any]:
    async def send(prompt: str) -> load.Answer:
        request = GenerateRequest(prompt=prompt, max_tokens=load.NEW_TOKENS, temperature=0, ignore_eos=True)
        chunks, known = [], 0
        sent = time.perf_counter()
        async for delta in engine.generate(request):
            if delta.text:
                chunks.append(load.Chunk(time.perf_counter(), delta.completion_tokens - known))
            known = delta.completion_tokens
        return load.Answer(sent, chunks, known)

    answers = {}
    for one in loads:
        await load.send_all(one.warm_up, send)
        answers[one.name] = await load.send_all(one.prompts, send)
    await engine.close()
    return answers


if __name__ == "__main__":
    main()
