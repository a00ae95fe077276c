"""One model on three engines, each with half a CPU, and a fourth on another server, all behind http://127.0.0.1:8000/v1.

First, once: scripts/engine-env ipex and scripts/engine-env openvino-export.
"""

from serve import Ipex, ModelSource, OpenVino, ServeConfig, ServedModel, Torch, Upstream

base = ModelSource("scripts/demo_base/model")
elsewhere = Upstream(url="http://127.0.0.1:8001/v1")

config = ServeConfig(
    name="engines",
    models=(
        ServedModel(id="demo-torch", source=base, engine=Torch(), cpus=0.5),
        ServedModel(id="demo-openvino", source=base, engine=OpenVino(weights="int8"), cpus=0.5),
        ServedModel(id="demo-ipex", source=base, engine=Ipex(), cpus=0.5),
        ServedModel(id="demo-upstream", source=ModelSource("demo"), engine=elsewhere, cpus=0.1),
    ),
)
