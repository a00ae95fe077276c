"""What runs in the IPEX engine's environment for test_ipex.py, and beside it for the torch engine: jobs -> answers.

    python -m tests.ipex_side JOBS

JOBS is a JSON list of jobs; prints the list of what came of them, as JSON, on the last line.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plugins import engines
from plugins.spec import UserError
from plugins.types import Delta, GenerateRequest, ModelSource, TokenLogprob

Job = Mapping[
    str, Any
]  # model, dtype, options, runs: name -> directory, asked: several requests together, one after another
DEFAULTS = {"temperature": 0.0, "max_tokens": 24}


def answers(spec: str, job: Job) -> Any:
    """What an engine of `spec` says to what is `asked`, in the same order; where it cannot serve at all, why."""
    try:
        source = ModelSource(job["model"], dtype=job.get("dtype", "fp32"))
        room = {"max_batch": 4, "kv_memory": "16MiB"}
        engine = getattr(engines, spec)(**room | job.get("options", {})).start(source, cpus=1)
    except UserError as error:
        return str(error)

    async def main() -> Any:
        refused = {name: await _refusal(engine, name, run) for name, run in job.get("runs", {}).items()}
        said = [await asyncio.gather(*(_answer(engine, one) for one in group)) for group in job["asked"]]
        await engine.close()
        return {"refused": {name: why for name, why in refused.items() if why}, "said": said}

    return asyncio.run(main())


async def _refusal(engine: engines.Engine, name: str, run: str) -> str | None:
    try:
        await engine.load_adapter(name, Path(run))
    except UserError as error:
        return str(error)
    return None


async def _answer(engine: engines.Engine, asked: Mapping[str, Any]) -> Any:
    try:
        deltas = [delta async for delta in engine.generate(GenerateRequest(**DEFAULTS | asked))]
    except UserError as error:
        return str(error)
    whole = Delta.joined(deltas)
    return {
        "text": whole.text,
        "usage": [whole.prompt_tokens, whole.completion_tokens],
        "end": [whole.finish_reason, whole.stop_reason],
        "logprobs": _numbers(whole.logprobs),
        "prompt_logprobs": _numbers(whole.prompt_logprobs),
    }


def _numbers(tokens: Sequence[TokenLogprob]) -> list[Any]:
    return [[one.token, one.logprob, [[top.token, top.logprob] for top in one.top]] for one in tokens]


if __name__ == "__main__":
    print(json.dumps([answers("Ipex", job) for job in json.loads(sys.argv[1])]))
