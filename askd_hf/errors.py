"""Errors that a user can cause and mend."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError

# how torch's writer of checkpoints says that the disk takes no more
TORCH_CANT_WRITE = ("PytorchStreamWriter failed", "inline_container.cc", "file write failed")
# of the disk, and not of the software, whatever file it was
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# what Trainer says with auto_find_batch_size: no batch fits in training; evaluation's, which it leaves alone, doesn't
NONE_FITS, EVALUATION_NEEDS_MORE = "No executable batch size found", "Evaluation hit an out-of-memory error"


class UserError(ValueError):
    """Says what is wrong, where (file, row, field) and what to do. Scripts print it as one line and exit with 2."""


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Around writing: a full or unwritable disk becomes a `UserError` that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what}: {error.strerror or error}. Make it possible to write there, or name another directory; what was "
            "computed before is kept"
        ) from error


@contextlib.contextmanager
def saving_errors(directory: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Around saving a model: a disk that is full, or can't be written any more, becomes a `UserError`.

    torch and safetensors don't raise `OSError` then.

    Args:
        directory: what is being written, for the message.
        kept: says what is complete on the disk, and how to go on from there.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        if number is None and not any(sign in str(error) for sign in TORCH_CANT_WRITE):
            raise
        reason = os.strerror(number) if number else "the disk is full, or can't be written any more"
        raise UserError(f"{directory} couldn't be saved: {reason}. {kept()}") from error


@contextlib.contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Around training with so many clips a batch: memory that doesn't suffice becomes a `UserError` with advice."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith(EVALUATION_NEEDS_MORE):
            raise UserError("out of memory in evaluation: lower --per_device_eval_batch_size") from error
        if not (should_reduce_batch_size(error) or str(error).startswith(NONE_FITS)):
            raise
        raise UserError(
            f"out of memory with {batch_size} clips a batch. Halve --per_device_train_batch_size and double "
            "--gradient_accumulation_steps, which gives the same result, or let --auto_find_batch_size True look for "
            "one that fits. --bf16, --teacher_cache_dir (no teacher in memory), --teacher_dtype int8, --teacher_offload "
            "and --lora_r take less as well. "
            f"({error})"
        ) from error


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around a script's `main()`: a `UserError` ends it with one message and status 2, Ctrl-C with status 130."""
    try:
        yield
    except UserError as error:
        # one from a DataLoader's worker process carries that worker's traceback before its message
        message = str(error).rpartition("UserError: ")[2].strip()
        sys.exit(_fail(f"error: {message}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        caches = "free some, or put the caches of datasets and models on another disk by HF_HOME"
        sys.exit(_fail(f"error: {error.strerror}{where}: {caches}", 2))


def _fail(message: str, status: int) -> int:
    print(f"\n{message}", file=sys.stderr, flush=True)
    return status
