"""Check that a checkpoint is complete, so that a run can be resumed from it exactly."""

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..callbacks import BLEND_STATE_FILE, SELF_TEACHER_FILE, read_blend_state
from ..data.json_files import read_json
from ..errors import UserError
from ..models.lora import ADAPTER_WEIGHTS
from ..schedule import BlendState
from .skipped_rows import SKIPPED_FILE

logger = logging.getLogger(__name__)

DAMAGED = "is damaged or truncated"


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, complete or not, sorted by step."""
    found = (directory for directory in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if directory.is_dir())
    return sorted(
        (directory for directory in found if directory.name.rpartition("-")[2].isdecimal()),
        key=lambda directory: int(directory.name.rpartition("-")[2]),
    )


def problems(directory: Path) -> list[str]:
    """Return the reasons why a run can't be resumed from a checkpoint, one per file; empty if it can.

    The files are opened but not read to the end, which detects the truncation by a killed process or a full disk.
    """
    found = []

    def check(name: str, read: Callable[[Path], Any]) -> Any:
        file = directory / name
        try:
            if not file.is_file():
                found.append(f"no {name}")
            else:
                return read(file)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError):
            found.append(f"{name} {DAMAGED}")
        return None

    check(TRAINER_STATE_NAME, read_trainer_state)
    state = check(BLEND_STATE_FILE, read_blend_state)
    for name in _weights(directory):
        check(name, _open_tensors)
    for name in _training_files(directory, state):
        check(name, _open_archive)
    if state is not None and state.snapshot_epoch is not None:
        check(SELF_TEACHER_FILE, _open_tensors)
    if (directory / SKIPPED_FILE).is_file():
        check(SKIPPED_FILE, read_json)
    return found


def is_finished(directory: Path) -> bool:
    """Return whether saving the checkpoint finished: Trainer writes `trainer_state.json` last.

    Other files may have been deleted since.
    """
    try:
        read_trainer_state(directory / TRAINER_STATE_NAME)
    except (OSError, ValueError, TypeError):
        return False
    return True


def check_complete(directory: Path) -> None:
    """Raise `UserError` if a run can't be resumed from this checkpoint."""
    found = problems(directory)
    if not found:
        return
    if f"no {BLEND_STATE_FILE}" in found:
        raise UserError(f"{directory} has no {BLEND_STATE_FILE}: it is not a checkpoint of `ASKDTrainer`")
    raise UserError(f"{directory} can't be resumed: {'; '.join(found)}. {advice(directory, found)}")


def advice(directory: Path, found: list[str]) -> str:
    """Return what to do about a checkpoint with these `problems`."""
    more = "Resume from another checkpoint"
    if any(name in problem for name in (SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS) for problem in found):
        return f"{more}, or start the run again"
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        more += f", or start a new run from its student: --student {directory} and another --output_dir"
    if f"no {OPTIMIZER_NAME}" in found:
        more += ". (Checkpoints of --save_only_model can't be resumed)"
    return more


def read_trainer_state(file: Path) -> TrainerState:
    """Read `trainer_state.json`. Raises ValueError or TypeError for other contents."""
    return TrainerState.load_from_json(str(file))


def _weights(directory: Path) -> list[str]:
    """Return the required files of the student or the adapter."""
    if (directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
        try:
            return sorted(set(read_json(directory / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            return [SAFE_WEIGHTS_NAME]
    return [ADAPTER_WEIGHTS if (directory / ADAPTER_WEIGHTS).is_file() else SAFE_WEIGHTS_NAME]


def _training_files(directory: Path, state: BlendState | None) -> list[str]:
    """Return the required files of the optimizer, the schedule and the random states."""
    options = {} if state is None else state.options
    names = [OPTIMIZER_NAME, SCHEDULER_NAME]
    if options.get("fp16"):
        names.append(SCALER_NAME)
    processes = options.get("processes")
    if processes is None:  # saved by an earlier version
        present = sorted(file.name for file in directory.glob("rng_state*.pth"))
        return names + (present or ["rng_state.pth"])
    return names + random_state_files(processes)


def random_state_files(processes: int) -> list[str]:
    """Return Trainer's names of these files, one per process."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{process}.pth" for process in range(processes)]


def _open_archive(file: Path) -> None:
    """Raise ValueError if a file of `torch.save` is truncated: it is a zip file, with its directory at the end."""
    if not zipfile.is_zipfile(file):
        raise ValueError(file)


def _open_tensors(file: Path) -> None:
    """Raise an error if a safetensors file is truncated: its header contains the length of the file."""
    with safe_open(file, "pt"):
        pass


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [directory for directory in checkpoint_directories(output_dir) if not problems(directory)]


def recovery_advice(run: Path) -> str:
    """Return which checkpoints are complete and how to resume, for the message about a failed save."""
    complete = [directory.name for directory in checkpoints(run)]
    free = "Free some disk space or make the directory writable"
    if not complete:
        return f"No checkpoint is complete. {free}, then start again"
    return f"Complete in {run}: {', '.join(complete)}. {free}, then resume with --resume_from_checkpoint last"


def checkpoint_to_resume(output_dir: str, resume_from_checkpoint: str | None) -> str | None:
    """Return the checkpoint to resume from, or None.

    Args:
        resume_from_checkpoint: a directory, or `last` for the last complete checkpoint in `output_dir`.

    Raises:
        UserError: the checkpoint doesn't exist or is incomplete. Or nothing is resumed, and `output_dir` contains
            another run, which would be overwritten.
    """
    run = Path(output_dir)
    if resume_from_checkpoint in (None, "", "False", "false"):
        finished = [directory for directory in checkpoint_directories(run) if is_finished(directory)]
        if finished or any((run / name).is_file() for name in ("model.safetensors", ADAPTER_WEIGHTS)):
            complete = [directory for directory in finished if not problems(directory)]
            last = f" (last checkpoint: {complete[-1].name})" if complete else ""
            hint = "Resume it with --resume_from_checkpoint last, or give" if complete else "Give"
            raise UserError(f"{output_dir} already contains a run{last}. {hint} another --output_dir")
        return None
    if resume_from_checkpoint in ("last", "True", "true"):
        return str(_last_complete(run))
    directory = Path(resume_from_checkpoint)
    if not directory.is_dir():
        raise UserError(f"--resume_from_checkpoint {resume_from_checkpoint}: no such directory")
    check_complete(directory)
    return resume_from_checkpoint


def _last_complete(run: Path) -> Path:
    incomplete: list[str] = []
    for directory in reversed(checkpoint_directories(run)):
        found = problems(directory)
        if not found:
            if incomplete:
                logger.warning("skipped checkpoints that can't be resumed: %s", "; ".join(incomplete))
            return directory
        incomplete.append(f"{directory.name} ({', '.join(found)})")
    if not incomplete:
        raise UserError(f"{run} has no complete checkpoint to resume from")
    newest = checkpoint_directories(run)[-1]
    raise UserError(
        f"{run} has no complete checkpoint to resume from: {'; '.join(incomplete)}. {advice(newest, problems(newest))}"
    )
