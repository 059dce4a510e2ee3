"""The disk space that a cache takes, computed before anything is written."""

import shutil
from pathlib import Path
from typing import NamedTuple


class CacheSpace(NamedTuple):
    """What a cache has and lacks for the clips of a run.

    Attributes:
        clips: number of distinct clips.
        cached: number of those in the cache.
        missing_bytes: size of the other clips on disk.
        peak_bytes: disk space that is needed while they are written.
        free_bytes: free disk space.
    """

    clips: int
    cached: int
    missing_bytes: int
    peak_bytes: int
    free_bytes: int


def free_bytes(directory: Path) -> int:
    """Return the free disk space for a directory, which doesn't have to exist."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
