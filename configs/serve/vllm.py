"""The demo base and the runs made from it on vLLM, on http://127.0.0.1:8000/v1. It needs `scripts/engine-env vllm`."""

from serve import ModelSource, ServeConfig, ServedModel, Vllm

config = ServeConfig(
    name="vllm",
    models=(
        ServedModel(
            id="demo",
            source=ModelSource("scripts/demo_base/model", dtype="fp32"),
            engine=Vllm(max_adapters=4),
            adapters=("outputs/*",),
        ),
    ),
)
