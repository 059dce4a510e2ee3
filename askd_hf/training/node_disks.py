"""Checkpoints of runs on several nodes that share no disk: the first process has them, the other nodes get copies."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

from ..config import ASKDConfig
from ..data.shared_disk import of_main_process, processes_sharing
from ..errors import UserError, disk_errors
from .checkpoint_lookup import checkpoint_directories, checkpoint_to_resume, checkpoints
from .encoder_recovery import RECOVERY_DIR, is_recovering

RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # of torchrun
# file in the output directory: the first start of this torchrun launch passed its checks
LAUNCHED = ".launched-by-torchrun"
CHUNK_BYTES = 64 * 2**20  # sent at a time


def find_checkpoint(config: ASKDConfig) -> str | None:
    """Return the checkpoint to resume from; None if there is none, or the encoder is to be recovered first.

    Sets `resume_from_checkpoint` if it is `auto`, or torchrun has started the processes again. All processes must call
    it.

    Raises `UserError` as `checkpoint_to_resume` does.
    """
    run = Path(config.output_dir)
    config.resume_from_checkpoint = last_if_exists(run, config.resume_from_checkpoint)
    if config.resume_from_checkpoint:
        copy_to_other_nodes(run / RECOVERY_DIR)
        if of_main_process(is_recovering(config)):
            return None
    checkpoint = checkpoint_on_all_nodes(config.output_dir, config.resume_from_checkpoint)
    if checkpoint is not None:
        copy_to_other_nodes(Path(checkpoint).parent / RECOVERY_DIR)  # of another run, if its checkpoint is resumed
    if RESTARTS in os.environ and PartialState().is_main_process:
        with disk_errors(str(run)):
            run.mkdir(parents=True, exist_ok=True)
            (run / LAUNCHED).touch()
    return checkpoint


def checkpoint_on_all_nodes(output_dir: str, resume_from_checkpoint: str | None) -> str | None:
    """Return `checkpoint_to_resume` of the first process, and copy it to the nodes that don't share its disk.

    All processes must call it.

    Raises `UserError` in all processes as `checkpoint_to_resume` does in the first.
    """
    process = PartialState()
    if process.num_processes == 1:
        return checkpoint_to_resume(output_dir, resume_from_checkpoint)
    found: list[Any] = [None, None]
    if process.is_main_process:
        try:
            found[0] = checkpoint_to_resume(output_dir, resume_from_checkpoint)
        except UserError as error:
            found[1] = str(error)
    checkpoint, problem = broadcast_object_list(found)
    if problem is not None:
        raise UserError(problem)
    if checkpoint is not None:
        copy_to_other_nodes(Path(checkpoint))
    return checkpoint


def last_if_exists(run: Path, resume_from_checkpoint: str | None) -> str | None:
    """Return `last` for `auto`, or None if there is nothing to resume yet. Return other values as they are.

    After a restart by torchrun (`--max-restarts`), an unset value is treated as `auto`, unless the first start failed
    its checks, such as for an earlier run in the directory. All processes must call it.

    Raises `UserError` if another process has a checkpoint and the first has none.
    """
    process, restarts = PartialState(), int(os.environ.get(RESTARTS, "0"))
    if process.num_processes > 1:  # torchrun counts on the node of the process that ended
        restarts = max(gather_object([restarts]))
    if not restarts and process.is_main_process:
        (run / LAUNCHED).unlink(missing_ok=True)
    if not resume_from_checkpoint and restarts and of_main_process((run / LAUNCHED).exists()):
        resume_from_checkpoint = "auto"
    if resume_from_checkpoint != "auto":
        return resume_from_checkpoint
    has_checkpoint = bool(checkpoints(run))
    have = gather_object([has_checkpoint]) if process.num_processes > 1 else [has_checkpoint]
    if any(have) and not have[0]:  # another node has become the first
        raise UserError(
            f"--resume_from_checkpoint auto: process {have.index(True)} has a checkpoint in {run}, and the first "
            "process, on another disk, has none. Copy it to that disk, or remove it to start anew"
        )
    found = has_checkpoint or ((run / RECOVERY_DIR).is_dir() and not checkpoint_directories(run))
    return "last" if of_main_process(found) else None


def copy_to_other_nodes(directory: Path) -> None:
    """Copy a directory of the first process to the nodes that don't share its disk, unless they have it already.

    All processes must call it. Nothing is copied if the first process has no such directory.
    """
    process = PartialState()
    if process.num_processes == 1:
        return
    own = _sizes(directory)
    sizes = of_main_process(own)
    if not sizes or all(gather_object([own == sizes])):
        return
    sharing = processes_sharing(directory.absolute().parent)
    receives = 0 not in sharing and process.process_index == sharing[0] and own != sizes
    copying = directory.with_name(f"{directory.name}.copying")
    with disk_errors(str(directory)):
        if receives:
            shutil.rmtree(copying, ignore_errors=True)
        for name in sizes:
            _send(directory / name, copying / name if receives else None)
        if receives:
            shutil.rmtree(directory, ignore_errors=True)
            copying.rename(directory)
    process.wait_for_everyone()


def _send(source: Path, target: Path | None) -> None:
    """Send a file of the first process. Write it to `target` in the processes that have one."""
    chunks = _chunks(source) if PartialState().is_main_process else iter(())
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")
    while True:
        (chunk,) = broadcast_object_list([next(chunks, b"")])
        if not chunk:
            return
        if target is not None:
            with target.open("ab") as file:
                file.write(chunk)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            yield chunk


def _sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of the files in a directory by relative path; empty if it doesn't exist."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}


def collect_files(file: Path) -> None:
    """Write a small file of each process, which has the same directory, to the first process where it lacks them.

    All processes must call it, each with a name of its own.
    """
    sent = gather_object([(file.name, file.read_bytes())])
    if PartialState().is_main_process:
        for name, content in sent:
            if not file.with_name(name).exists():
                file.with_name(name).write_bytes(content)


def broadcast_weights(model: nn.Module) -> None:
    """Overwrite the trained weights of all processes with those of the first. All processes must call it."""
    if PartialState().num_processes == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(broadcast(parameter.data))
