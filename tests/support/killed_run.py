"""examples/distill.py, which kills itself when it is about to change a file for the Nth time: N OPTIONS.

With N = 0 it isn't killed. The number of changes is left in the file `changes`. Changes are those of files and
directories in the working directory that Python knows of: opened to be written, made, renamed, linked and removed. The
teacher cache and the checks save small parts, so that a kill has some of them done.
"""

import atexit
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from scripts import DISTILL

from askd_hf.data import audio_checks, teacher_cache

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
PART_CLIPS = 8


class Changes:
    """Counts the changes, and kills the process group at the last one."""

    def __init__(self, last: int):
        self.last, self.made, self.folder = last, 0, os.getcwd()

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in EVENTS) or not isinstance(args[0], str | os.PathLike):
            return
        if os.path.abspath(os.fspath(args[0])).startswith(self.folder):
            self.made += 1
            if self.made == self.last:
                os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    os.setsid()
    audio_checks.PART_CLIPS = teacher_cache.PART_CLIPS = PART_CLIPS
    changes = Changes(int(sys.argv.pop(1)))
    atexit.register(lambda: Path("changes").write_text(str(changes.made)))
    sys.argv[0] = str(DISTILL)
    sys.path.insert(0, str(DISTILL.parent))
    sys.addaudithook(changes)
    runpy.run_path(str(DISTILL), run_name="__main__")
