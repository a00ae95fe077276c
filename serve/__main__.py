"""`python -m serve CONFIG [a.b=value ...]`: deploy, from a shell or as the entry point of a Ray job."""

import argparse
import sys
from collections.abc import Sequence

from plugins import entry
from serve.config import ServeConfig


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve", description="Serve models on Ray Serve.")
    entry.add_config_arguments(parser, "ServeConfig")
    options = entry.parse(parser, arguments)

    def act(config: ServeConfig) -> None:
        from serve.app import serve_until_interrupted  # Ray loads only for a config that is right

        serve_until_interrupted(config)

    return entry.run(lambda: entry.with_config(options, ServeConfig, act), name="serve")


if __name__ == "__main__":
    sys.exit(main())
