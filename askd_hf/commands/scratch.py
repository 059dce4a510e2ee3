"""A temporary directory in place of the directories of a run, so that its steps can be tried without writing there."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datasets import disable_caching, enable_caching, is_caching_enabled

from ..errors import UserError

REPORTS = "askd_hf.data.checks"  # logger of the messages that name a list of skipped clips


class Scratch:
    """Directories in the temporary directory `root`."""

    def __init__(self, root: Path):
        self.root = root
        self._directories: dict[str, str] = {}  # directory -> that of the run

    def directory(self, stands_for: str) -> str:
        """Return the path of a directory of the same name. It isn't created."""
        path = str(self.root / str(len(self._directories)) / Path(stands_for).absolute().name)
        self._directories[path] = stands_for
        return path

    def restored(self, message: str) -> str:
        """Return a message with the directories of the run in place of the temporary ones."""
        for path, directory in self._directories.items():
            message = message.replace(path, directory)
        return message

    def without_paths(self, record: logging.LogRecord) -> bool:
        """Drop the parts of a log message that name a temporary file. A filter of `logging`: it keeps the message."""
        record.args = tuple("" if isinstance(part, str) and str(self.root) in part else part for part in record.args)
        return True


@contextlib.contextmanager
def scratch_directory() -> Iterator[Scratch]:
    """Yield a `Scratch`, which is removed at the end. Inside, `datasets` doesn't cache transformed datasets.

    Messages of a `UserError` name the directories of the run.
    """
    caching, log = is_caching_enabled(), logging.getLogger(REPORTS)
    with tempfile.TemporaryDirectory(prefix="askd-dry-run-") as root:
        scratch = Scratch(Path(root).resolve())
        log.addFilter(scratch.without_paths)
        disable_caching()
        try:
            yield scratch
        except UserError as error:
            raise UserError(scratch.restored(str(error))) from error
        finally:
            log.removeFilter(scratch.without_paths)
            if caching:
                enable_caching()
