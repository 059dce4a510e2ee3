"""Find out which processes of a distributed run share a disk, and lock a directory for all of them."""

import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from random import SystemRandom
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import UserError, disk_errors
from .locks import locked

logger = logging.getLogger(__name__)

PAUSE = (0.2, 1.0)  # seconds between two attempts to lock a directory, at random
POLLING = 0.2  # seconds between two looks at whether the other processes are done

_waits = itertools.count()  # of `others_wait`, the same in all processes


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
    """Let all processes wait at the end of the block for those that have much to do in it, however long they take.

    The timeout of the process group (`--ddp_timeout`) doesn't apply. All processes must enter the block.
    """
    yield
    process = PartialState()
    if process.num_processes == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    # A barrier of a group with a longer timeout would still wait for NCCL's communicator no longer than usual. `wait`
    # of the store would keep NCCL's threads from the store
    store, key = _get_default_store(), f"askd_hf/others_wait-{next(_waits)}"
    store.add(key, 1)
    while store.add(key, 0) < process.num_processes:
        time.sleep(POLLING)
    process.wait_for_everyone()  # the process that has the store may end soon


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
