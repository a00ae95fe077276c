"""Write a model in OpenVINO's format: a script for the environment `openvino-export`, where nothing of ours is imported.

    python -P openvino_export.py '{"model": DIRECTORY, "folder": DIRECTORY, "weights": ..., "trust_remote_code": false}'

`weights`: "fp32", "fp16", "bf16": the type they are written in; "same": the type they have. "int8", "int4": as "same", then
each matrix is compressed, with a scale and an offset for a row of it (int8), or for each GROUP of columns in a row (int4;
int8 for the table of tokens and the last product).
"""

import json
import logging
import sys
import traceback
from pathlib import Path

import nncf
import openvino
import torch
from optimum.exporters.openvino import main_export
from optimum.intel.openvino.configuration import OVConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GROUP = 64


def say(text: str) -> None:
    print(f"export: {text}", flush=True)  # noqa: T201 - what the process that started this one reads


def export(model: str, folder: str, weights: str, trust_remote_code: bool) -> None:
    say("reading the model and tracing what it computes")
    main_export(
        model,
        folder,
        task="text-generation-with-past",
        library_name="transformers",
        ov_config=OVConfig(dtype="fp32"),  # nothing is compressed on the way
        model_loading_kwargs={"torch_dtype": DTYPES.get(weights, "auto")},
        trust_remote_code=trust_remote_code,
    )
    if weights in ("int8", "int4"):
        say(f"compressing its weights to {weights}")
        compress(Path(folder) / "openvino_model.xml", weights)


def compress(path: Path, weights: str) -> None:
    whole = openvino.Core().read_model(path)
    if weights == "int8":
        made = nncf.compress_weights(whole, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        made = nncf.compress_weights(whole, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=GROUP)
    compressed = path.with_name("compressed.xml")
    openvino.save_model(made, compressed, compress_to_fp16=False)
    del whole, made  # they still read the file that is replaced now
    for suffix in (".bin", ".xml"):
        compressed.with_suffix(suffix).replace(path.with_suffix(suffix))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    try:
        export(**json.loads(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - the last line is for the user, those before it for us
        traceback.print_exc()
        sys.exit(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        )
