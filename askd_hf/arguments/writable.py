"""Check that a directory is writable, before the results for it are computed."""

import os
import tempfile
from pathlib import Path

from ..errors import UserError

PROBE_SIZE = 2**20  # bytes; a full disk may still accept a few


def check_writable(directory: str | Path, option: str) -> None:
    """Raise `UserError` if files can't be written to `directory`, or if it can't be created.

    A file of 1 MiB is written there, or in the nearest existing parent, and removed. The message starts with `option`.
    """
    path = Path(directory).expanduser()
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        what = "is" if nearest == path else f"can't be created: {nearest} is"
        raise UserError(f"{option} {directory} {what} not a directory; give another one")
    try:
        with tempfile.TemporaryFile(dir=nearest, prefix=".askd-") as file:
            file.write(b"\0" * PROBE_SIZE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{option} {directory} is not writable: {error.strerror or error}. Make it writable or give another "
            "directory"
        ) from error
