"""Errors that a user can fix, and their messages.

No library is imported at the top: `askd-hf --help` doesn't wait for one, and `askd-hf env` runs where one is broken.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# parts of the messages of torch.save when the disk is full
TORCH_CANT_WRITE = ("PytorchStreamWriter failed", "inline_container.cc", "file write failed")
# errors of the disk, for any file
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

NONE_FITS = "No executable batch size found"  # message of Trainer with auto_find_batch_size
EVALUATION_MEMORY = "out of memory in evaluation: lower --per_device_eval_batch_size"
LABELS_MEMORY = (
    "out of memory while the labels of held-out clips are measured (--teacher_schedule adaptive): lower "
    "--per_device_eval_batch_size"
)


class UserError(ValueError):
    """An error whose message says what is wrong, where (file, row, field) and what to do.

    Scripts print the message as one line and exit with status 2.
    """


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a failed write (full or read-only disk) into a `UserError` whose message starts with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what}: {error.strerror or error}. Make the directory writable or give another one; earlier results are "
            "kept"
        ) from error


@contextlib.contextmanager
def saving_errors(directory: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Turn a failed save of a model (full or read-only disk) into a `UserError`.

    torch and safetensors raise other exceptions than `OSError`.

    Args:
        kept: returns the end of the message: what is complete on the disk, and how to resume.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        if number is None and not any(sign in str(error) for sign in TORCH_CANT_WRITE):
            raise
        reason = os.strerror(number) if number else "the disk is full or read-only"
        raise UserError(f"{directory} couldn't be saved: {reason}. {kept()}") from error


def training_memory_message(batch_size: int, processes: int, searched: bool = False) -> str:
    """Return the message of `memory_errors` about a training batch: the options that need less memory.

    Args:
        batch_size: the one that the run began with.
        searched: whether smaller ones were tried (`auto_find_batch_size`, which requires one process).
    """
    options = (
        "--bf16, --teacher_cache_dir (no teacher in memory), --teacher_dtype int8, --teacher_offload and --lora_r"
    )
    if searched:
        return f"out of memory with every batch size from {batch_size} down to 1. {options} save memory"
    search = ", or give --auto_find_batch_size True" if processes == 1 else ""
    return (
        f"out of memory with a batch size of {batch_size}. Halve --per_device_train_batch_size and double "
        f"--gradient_accumulation_steps, which gives the same result{search}. {options} also save memory"
    )


@contextlib.contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turn out of memory into a `UserError` that begins with `message`: what to do."""
    try:
        yield
    except RuntimeError as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not (should_reduce_batch_size(error) or str(error).startswith(NONE_FITS)):
            raise
        raise UserError(f"{message}. ({error})") from error


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one message and status 2 on a `UserError` or a full disk, with status 130 on Ctrl-C."""
    try:
        yield
    except UserError as error:
        # an error of a DataLoader worker has the worker's traceback before its message
        message = str(error).rpartition("UserError: ")[2].strip()
        sys.exit(_fail(f"error: {message}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        advice = "free some space, or set HF_HOME to move the caches of datasets and models to another disk"
        sys.exit(_fail(f"error: {error.strerror}{where}: {advice}", 2))


def _fail(message: str, status: int) -> int:
    print(f"\n{message}", file=sys.stderr, flush=True)
    return status


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per process, even if several splits of a dataset are read."""
    logger.warning(message)
