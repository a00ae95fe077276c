"""What runs in an engine's own environment for test_contract.py: our endpoints over engines, on a port.

    python -m tests.engine_side ASKED

ASKED is JSON: `port`, and `engines`: for each model id its `engine` and `options` (the spec), `model`, `dtype` and `runs`.
Prints a line of JSON, why what was asked for is refused: by model id, and by `id:run`. Serves the rest until its standard
input ends.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from plugins import engines
from plugins.spec import UserError
from plugins.types import ModelSource
from serve.ingress import api


async def serve(port: int, asked: Mapping[str, Mapping[str, Any]]) -> None:
    refused: dict[str, str] = {}
    started: dict[str, engines.Engine] = {}
    served: dict[str, list[str]] = {}
    for name, one in asked.items():
        try:
            spec = getattr(engines, one["engine"])(**one["options"])
            started[name] = spec.start(ModelSource(one["model"], dtype=one["dtype"]), cpus=1)
        except UserError as error:
            refused[name] = str(error)
            continue
        served[name] = []
        for run, directory in one["runs"].items():
            try:
                await started[name].load_adapter(run, Path(directory))
                served[name].append(run)
            except UserError as error:
                refused[f"{name}:{run}"] = str(error)
    print(json.dumps(refused), flush=True)
    app = api(served, {name: engine.generate for name, engine in started.items()})
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving
    for engine in started.values():
        await engine.close()


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    asyncio.run(serve(wanted["port"], wanted["engines"]))
