"""Whether a directory can be written, found out before the work that is to be kept there."""

import os
import tempfile
from pathlib import Path

from ..errors import UserError

PROBE = 2**20  # bytes: a full disk may still take some


def check_writable(directory: str | Path, option: str) -> None:
    """Raise `UserError` unless `directory` is one that files can be written to, or can be made.

    Nothing stays: a file of 1 MiB is written there, or in the nearest parent that exists, and removed.

    Args:
        option: what the message begins with, as in `--output_dir`.
    """
    path = Path(directory).expanduser()
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        what = "is" if nearest == path else f"can't be made: {nearest} is"
        raise UserError(f"{option} {directory} {what} no directory; name another one")
    try:
        with tempfile.TemporaryFile(dir=nearest, prefix=".askd-") as file:
            file.write(b"\0" * PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{option} {directory} can't be written: {error.strerror or error}. Make it possible to write there, or "
            "name another directory"
        ) from error
