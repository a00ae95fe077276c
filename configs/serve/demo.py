"""The demo base and every finished LoRA run that was made from it, on http://127.0.0.1:8000/v1."""

from serve import ModelSource, ServeConfig, ServedModel

config = ServeConfig(
    name="demo",
    models=(
        ServedModel(
            id="demo",
            source=ModelSource("scripts/demo_base/model", dtype="fp32"),
            adapters=("outputs/*",),
        ),
    ),
)
