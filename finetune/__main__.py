"""`python -m finetune CONFIG [a.b=value ...]`: one run, from a shell or as the entry point of a Ray job."""

import argparse
import sys
from collections.abc import Sequence

from finetune.config import FinetuneConfig
from plugins import entry


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune", description="Finetune a model on Ray Train.")
    entry.add_config_arguments(parser, "FinetuneConfig")
    options = entry.parse(parser, arguments)

    def act(config: FinetuneConfig) -> None:
        from finetune.run import finetune  # Ray and torch load only for a config that is right

        finetune(config, config_file=options.config, overrides=options.overrides)

    return entry.run(lambda: entry.with_config(options, FinetuneConfig, act), name="finetune")


if __name__ == "__main__":
    sys.exit(main())
