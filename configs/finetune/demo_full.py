"""The demo task with every weight trained: a variant of demo_lora.py. The run holds a whole model."""

import runpy
from dataclasses import replace
from pathlib import Path

from finetune import Full, Optim

lora = runpy.run_path(str(Path(__file__).with_name("demo_lora.py")))["config"]

config = replace(lora, name="demo_full", method=Full(), optim=Optim(lr=1e-3, weight_decay=0.01))
