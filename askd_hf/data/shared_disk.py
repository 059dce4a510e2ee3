"""Find out which processes of a distributed run share a disk, and lock a directory for all of them."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import UserError, disk_errors
from .locks import locked


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


@contextlib.contextmanager
def locked_for(directory: Path, processes: list[int]) -> Iterator[None]:
    """Lock a directory for these processes. All processes of the run must call it, each with those it shares it with.

    Raises `UserError` in all processes if another run has locked one of the directories.
    """
    process = PartialState()
    with contextlib.ExitStack() as stack:
        problem = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if process.process_index == processes[0]:
                stack.enter_context(locked(directory))
        except UserError as error:
            problem = str(error)
        problems = [problem] if process.num_processes == 1 else gather_object([problem])
        if found := next(filter(None, problems), None):
            raise UserError(found)
        yield
