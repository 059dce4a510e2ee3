"""Whether a checkpoint is whole: has all that a run needs to go on as if it had never stopped."""

import json
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
from ..errors import UserError
from ..models.lora import ADAPTER_WEIGHTS
from ..schedule import BlendState
from .skipped_rows import SKIPPED_FILE

logger = logging.getLogger(__name__)

DAMAGED = "is damaged or cut off"


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """Those of a run, whole or not, by their steps."""
    found = (directory for directory in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if directory.is_dir())
    return sorted(
        (directory for directory in found if directory.name.rpartition("-")[2].isdecimal()),
        key=lambda directory: int(directory.name.rpartition("-")[2]),
    )


def problems(directory: Path) -> list[str]:
    """What keeps a run from going on from a checkpoint, each naming a file; empty if nothing does.

    Files are opened and not read through: a process that is killed, or a full disk, cuts them off.
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
    for name in _of_training(directory, state):
        check(name, _open_archive)
    if state is not None and state.snapshot_epoch is not None:
        check(SELF_TEACHER_FILE, _open_tensors)
    if (directory / SKIPPED_FILE).is_file():
        check(SKIPPED_FILE, _read_json)
    return found


def is_finished(directory: Path) -> bool:
    """Whether a checkpoint was saved to its end: Trainer writes `trainer_state.json` last. Files may be missing."""
    try:
        read_trainer_state(directory / TRAINER_STATE_NAME)
    except (OSError, ValueError, TypeError):
        return False
    return True


def check_whole(directory: Path) -> None:
    """Raise `UserError` unless a run can go on from this checkpoint."""
    found = problems(directory)
    if not found:
        return
    if f"no {BLEND_STATE_FILE}" in found:
        raise UserError(f"{directory} has no {BLEND_STATE_FILE}: it isn't a checkpoint of a distillation run")
    raise UserError(f"{directory} can't be resumed: {'; '.join(found)}. {advice(directory, found)}")


def advice(directory: Path, found: list[str]) -> str:
    """What to do about a checkpoint with these `problems`."""
    more = "Resume from another checkpoint"
    if any(name in problem for name in (SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS) for problem in found):
        return f"{more}, or start the run again"
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        more += f", or start a new run from its student: --student {directory}, with another --output_dir"
    if f"no {OPTIMIZER_NAME}" in found:
        more += ". (With --save_only_model no checkpoint can be resumed)"
    return more


def read_trainer_state(file: Path) -> TrainerState:
    """Raises what `json` raises, and TypeError for JSON of something else."""
    return TrainerState.load_from_json(str(file))


def _weights(directory: Path) -> list[str]:
    """The files that must be there of the student, or of the adapter."""
    if (directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
        try:
            return sorted(set(_read_json(directory / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            return [SAFE_WEIGHTS_NAME]
    return [ADAPTER_WEIGHTS if (directory / ADAPTER_WEIGHTS).is_file() else SAFE_WEIGHTS_NAME]


def _of_training(directory: Path, state: BlendState | None) -> list[str]:
    """The files that must be there of the optimizer, the schedule and the random states."""
    options = {} if state is None else state.options
    names = [OPTIMIZER_NAME, SCHEDULER_NAME]
    if options.get("fp16"):
        names.append(SCALER_NAME)
    processes = options.get("processes")
    if processes is None:  # of an earlier version
        there = sorted(file.name for file in directory.glob("rng_state*.pth"))
        return names + (there or ["rng_state.pth"])
    return names + random_state_files(processes)


def random_state_files(processes: int) -> list[str]:
    """As Trainer names them: one a process."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{process}.pth" for process in range(processes)]


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _open_archive(file: Path) -> None:
    """Of `torch.save`: a zip, whose directory stands at its end."""
    if not zipfile.is_zipfile(file):
        raise ValueError(file)


def _open_tensors(file: Path) -> None:
    """Of safetensors, whose header says how long the file must be."""
    with safe_open(file, "pt"):
        pass


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run from which it can go on, oldest first."""
    return [directory for directory in checkpoint_directories(output_dir) if not problems(directory)]


def how_to_go_on(run: Path) -> str:
    """After a checkpoint that couldn't be saved: what is complete on the disk, and what to do."""
    complete = [directory.name for directory in checkpoints(run)]
    free = "Free some space, or make it possible to write there"
    if not complete:
        return f"No checkpoint is complete. {free}, and start again"
    return f"Complete in {run}: {', '.join(complete)}. {free}, and go on with --resume_from_checkpoint last"


def checkpoint_to_resume(output_dir: str, resume_from_checkpoint: str | None) -> str | None:
    """The checkpoint meant by `--resume_from_checkpoint`: a directory, or `last` for the run's last whole one.

    Raises `UserError` if there is none, or if it isn't whole; and, without the option, if `output_dir` holds another
    run, which would be overwritten.
    """
    run = Path(output_dir)
    if resume_from_checkpoint in (None, "", "False", "false"):
        finished = [directory for directory in checkpoint_directories(run) if is_finished(directory)]
        if finished or any((run / name).is_file() for name in ("model.safetensors", ADAPTER_WEIGHTS)):
            whole = [directory for directory in finished if not problems(directory)]
            last = f" (last checkpoint: {whole[-1].name})" if whole else ""
            go_on = "Continue it with --resume_from_checkpoint last, or give" if whole else "Give"
            raise UserError(f"{output_dir} already holds a run{last}. {go_on} another --output_dir")
        return None
    if resume_from_checkpoint in ("last", "True", "true"):
        return str(_last_whole(run))
    directory = Path(resume_from_checkpoint)
    if not directory.is_dir():
        raise UserError(f"--resume_from_checkpoint {resume_from_checkpoint}: there is no such checkpoint")
    check_whole(directory)
    return resume_from_checkpoint


def _last_whole(run: Path) -> Path:
    passed_over: list[str] = []
    for directory in reversed(checkpoint_directories(run)):
        found = problems(directory)
        if not found:
            if passed_over:
                logger.warning("passed over, as no run can go on from them: %s", "; ".join(passed_over))
            return directory
        passed_over.append(f"{directory.name} ({', '.join(found)})")
    if not passed_over:
        raise UserError(f"{run} has no complete checkpoint to resume from")
    newest = checkpoint_directories(run)[-1]
    raise UserError(
        f"{run} has no complete checkpoint to resume from: {'; '.join(passed_over)}. "
        f"{advice(newest, problems(newest))}"
    )
