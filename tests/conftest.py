"""For all tests: no network, and one thread a process, since two cores are shared with the processes that tests start."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MANTA_CACHE"] = tempfile.mkdtemp(prefix="manta-cache-")  # tests neither use nor fill the user's own
