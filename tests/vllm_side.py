"""What runs in vLLM's environment for test_vllm.py: a server of our endpoints over the engine, or starts that must fail."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvicorn

from plugins.engines import Engine, Vllm
from plugins.spec import UserError
from plugins.types import ModelSource
from serve.ingress import api


def start(model: str, **options: Any) -> Engine:
    return Vllm(**({"kv_memory": "64MiB"} | options)).start(ModelSource(model, dtype="fp32"), cpus=1)


async def serve(model: str, port: int, length: int, runs: dict[str, str], refused: dict[str, str]) -> None:
    """Serve `model` and its `runs`; "gone" is an adapter that is routed and not loaded. Prints why others are refused."""
    engine = start(model, max_batch=4, max_length=length, max_adapters=2, max_rank=8)
    for name, run in runs.items():
        await engine.load_adapter(name, Path(run))
    print(json.dumps({name: await _refusal(engine, run) for name, run in refused.items()}), flush=True)
    app = api({"tiny": [*runs, "gone"]}, {"tiny": engine.generate})

    @app.get("/answering")
    async def answering() -> int:
        return int(engine._engine.get_num_unfinished_requests())  # type: ignore[attr-defined]

    @app.get("/check")
    async def check() -> str:
        engine.check()
        return "well"

    await uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning")).serve()
    await engine.close()


async def _refusal(engine: Engine, run: str) -> str | None:
    try:
        await engine.load_adapter("refused", Path(run))
    except UserError as error:
        return str(error)
    return None


def failures(*starts: list[Any]) -> list[str | None]:
    """Why each (model, options) cannot be served."""
    said: list[str | None] = []
    for model, options in starts:
        try:
            start(model, **options)
            said.append(None)
        except UserError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    if sys.argv[1] == "serve":
        asyncio.run(serve(**asked))
    else:
        print(json.dumps(failures(*asked)))
