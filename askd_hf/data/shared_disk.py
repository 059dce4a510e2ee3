"""Find out which processes of a distributed run share a disk, and lock a directory for all of them."""

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from random import SystemRandom
from typing import Any

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import UserError, disk_errors
from .locks import locked

logger = logging.getLogger(__name__)

PAUSE = (0.2, 1.0)  # seconds between two attempts to lock a directory, at random
LONGEST_WAIT = timedelta(days=1)


def processes_sharing(directory: Path) -> list[int]:
    """Return the indices of the processes that see the same `directory`, this one included, in ascending order.

    With one node or a shared disk these are all processes; otherwise those of this node. All processes must call it.
    The directory is created.
    """
    process = PartialState()
    if process.num_processes == 1:
        return [0]
    (token,) = broadcast_object_list([secrets.token_hex(8)])
    marker = directory / f".process-{process.process_index}-{token}"
    with disk_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
    process.wait_for_everyone()
    found = {int(file.name.split("-")[1]) for file in directory.glob(f".process-*-{token}")}
    process.wait_for_everyone()
    marker.unlink(missing_ok=True)
    return sorted(found | {process.process_index})


def is_first_on_disk(directory: Path) -> bool:
    """Return whether this process is the first of those that see the same `directory`.

    What all processes would write there in the same way, this one writes alone. All processes must call it. The
    directory is created if there are several processes.
    """
    return PartialState().process_index == processes_sharing(directory)[0]


@contextlib.contextmanager
def others_wait() -> Iterator[None]:
    """Let all processes wait at the end of the block for those that have much to do in it, up to `LONGEST_WAIT`.

    The timeout of the process group (`--ddp_timeout`) doesn't apply. All processes must enter the block.
    """
    process = PartialState()
    if process.num_processes == 1:
        yield
        return
    group = torch.distributed.new_group(timeout=LONGEST_WAIT)
    yield
    torch.distributed.barrier(group, device_ids=[process.local_process_index])


def of_main_process(value: Any) -> Any:
    """Return the value of the main process, in all processes. All must call it."""
    return value if PartialState().num_processes == 1 else broadcast_object_list([value])[0]


@contextlib.contextmanager
def locked_for(directory: Path, processes: list[int]) -> Iterator[None]:
    """Lock a directory for these processes. While another run has locked it, wait.

    All processes of the run must call it, each with those it shares its directory with. While any of the directories
    is locked, the run holds no lock, so that two runs on several nodes can't deadlock.
    """
    process, waits = PartialState(), False
    while True:
        with contextlib.ExitStack() as stack:
            is_free = process.process_index != processes[0] or _lock(directory, stack)
            if process.num_processes > 1:
                is_free = all(gather_object([is_free]))
            if is_free:
                yield
                return
        if process.is_main_process and not waits:
            logger.warning("%s is in use by another run: waiting until it has finished or is stopped", directory)
        waits = True
        time.sleep(SystemRandom().uniform(*PAUSE))


def _lock(directory: Path, stack: contextlib.ExitStack) -> bool:
    """Return whether the directory could be locked until `stack` is closed."""
    try:
        stack.enter_context(locked(directory))
    except (UserError, FileNotFoundError):  # it is locked, or was just removed
        return False
    return True
