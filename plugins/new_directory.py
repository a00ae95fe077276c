"""A directory that is written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plugins.spec import UserError


def check_free(directory: Path, field: str) -> None:
    """Raise UserError, naming `field`, where a new `directory` cannot be made: something is there, or no way to write."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{field} = {str(directory)!r}: there are files already; name a directory that is new or empty")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory.parent).close()
    except OSError as error:
        raise UserError(f"{field} = {str(directory)!r}: cannot be written ({error.strerror})") from error


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` when the block ends well, and is gone when it does not."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        partial = Path(scratch) / directory.name
        partial.mkdir()
        yield partial
        partial.rename(directory)
