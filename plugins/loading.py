"""Read a config file: a Python file that assigns one spec to `config`."""

import difflib
import runpy
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from plugins.spec import UserError, override

T = TypeVar("T")


def load_config(path: str | Path, kind: type[T], overrides: Iterable[str] = ()) -> T:
    """The `config` of the file at `path`, of class `kind`, with overrides such as `optim.lr=3e-4` applied.

    Raises UserError in one line: no such file, a mistake in the file (with its line), another kind of config, or an
    override that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file at {path}{_nearby(path)}")
    try:
        # run_path names the module "<run_path>", so that what the file defines is pickled to Ray workers by value.
        names = runpy.run_path(str(path))
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"{path}:{_line(error, path)}: {_message(error)}") from error
    if "config" not in names:
        raise UserError(f"{path} assigns nothing to `config`: end it with config = {kind.__name__}(...)")
    config = names["config"]
    if not isinstance(config, kind):
        raise UserError(f"{path}: config is a {type(config).__name__}; {kind.__name__} is needed here")
    result: T = override(config, *overrides)
    return result


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _line(error: Exception, path: Path) -> int:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] or 1 if lines else 1


def _nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    configs = [str(file) for file in sorted(folder.glob("*.py"))]
    near = difflib.get_close_matches(str(path), configs, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f" ({folder} holds {', '.join(file.rsplit('/', 1)[-1] for file in configs)})" if configs else ""
