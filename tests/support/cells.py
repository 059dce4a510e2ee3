"""Stand-ins for the cells of a study, in a module that its processes import quickly."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass
class Result:
    teacher: str


def run_or_die(cell: SimpleNamespace, evaluation: dict[str, Any], directory: Path, study: int) -> Result:
    """Kill this process if the cell is called `dies`, as the kernel does when memory runs out.

    Also checks that `study` is the process that started this one.
    """
    if cell.name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    assert study == os.getppid()
    time.sleep(1)  # it runs while the other one dies
    return Result(cell.name)
