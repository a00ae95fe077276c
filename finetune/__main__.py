"""`python -m finetune CONFIG [a.b=value ...]`: one run, from a shell or as the entry point of a Ray job."""

import argparse
import logging
import sys
from pathlib import Path

from finetune.config import FinetuneConfig
from plugins import cluster
from plugins.loading import load_config
from plugins.spec import UserError, render


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune", description="Finetune a model on Ray Train.")
    parser.add_argument("config", type=Path, help="a Python file that assigns a FinetuneConfig to `config`")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="fields to change")
    parser.add_argument("--print", action="store_true", dest="show", help="show the config with its overrides, and stop")
    options = parser.parse_args(arguments)
    cluster.authenticate()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        config = load_config(options.config, FinetuneConfig, options.overrides)
        if options.show:
            print(render(config))
            return 0
        from finetune.run import finetune  # Ray and torch load only for a config that is right

        finetune(config, config_file=options.config, overrides=options.overrides)
    except UserError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
