"""The demo base on OpenVINO, with weights in int8. First, once: scripts/engine-env openvino-export."""

from serve import ModelSource, OpenVino, ServeConfig, ServedModel

config = ServeConfig(
    name="openvino",
    models=(ServedModel(id="demo", source=ModelSource("scripts/demo_base/model"), engine=OpenVino(weights="int8")),),
)
