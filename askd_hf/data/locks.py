"""Keep two runs from writing to one directory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Create the directory, and lock it until the block ends. A killed process leaves it unlocked.

    Raises `UserError` if another run has locked it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{directory} is in use by another run: wait until it finishes, or stop it") from None
