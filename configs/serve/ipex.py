"""The demo base and the runs made from it on IPEX, on http://127.0.0.1:8000/v1. It needs `scripts/engine-env ipex`."""

from serve import Ipex, ModelSource, ServeConfig, ServedModel

config = ServeConfig(
    name="ipex",
    models=(
        ServedModel(
            id="demo",
            source=ModelSource("scripts/demo_base/model"),
            engine=Ipex(),
            adapters=("outputs/*",),
        ),
    ),
)
