"""What entry points share: a config with overrides on the command line, logging, and exit codes."""

import argparse
import atexit
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from plugins import cluster
from plugins.loading import load_config
from plugins.spec import UserError, render

T = TypeVar("T")


def add_config_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help=f"a Python file that assigns a {kind} to `config`")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="fields to change")
    parser.add_argument("--print", action="store_true", dest="show", help="show the resolved config and stop")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may also follow the options."""
    options, late = parser.parse_known_args(arguments)
    if late:
        if any(word.startswith("-") or "=" not in word for word in late) or not hasattr(options, "overrides"):
            parser.error(f"unrecognized arguments: {' '.join(late)}")
        options.overrides += late
    return options


def with_config(options: argparse.Namespace, kind: type[T], act: Callable[[T], None]) -> None:
    """Load the config that the options name, and show it or act on it."""
    config = load_config(options.config, kind, options.overrides)
    if options.show:
        print(render(config))
    else:
        act(config)


def run(act: Callable[[], None], *, name: str) -> int:
    """Do what a command is for. Exit code 2 and one line for a user's mistake; 130 when interrupted."""
    # Importing torch and transformers makes millions of objects that stay: to look through them for garbage again and again
    # took a fifth of the time, and at the end, when nobody needs it, more than a second.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    cluster.prepare()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for package in ("finetune", "serve", "plugins", "ui"):
        logging.getLogger(package).setLevel(logging.INFO)
    for chatty, level in {"ray": logging.WARNING, "ray.serve": logging.WARNING, "bitsandbytes": logging.ERROR}.items():
        logging.getLogger(chatty).setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # between transformers and peft
    try:
        act()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
