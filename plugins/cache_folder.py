"""Where files are kept that can be made again: ~/.cache/manta, or what MANTA_CACHE names."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder of that name, which need not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MANTA_CACHE") or Path(home) / "manta") / name
