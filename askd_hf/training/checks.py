"""Checks of the trainer's arguments, before anything is computed."""

from typing import Any

from datasets import Dataset
from transformers import WhisperForConditionalGeneration

from ..config import ASKDConfig
from ..data import SpeechCollator
from ..data.soft_labels import check_settings
from ..errors import UserError


def check_teacher(
    args: ASKDConfig,
    teacher: WhisperForConditionalGeneration | None,
    soft_labels: Dataset | None,
    vocabulary: int,
) -> None:
    """Raise `UserError` if the options require a teacher, and there is neither a teacher nor its soft labels.

    Args:
        soft_labels: the training set if it has cached soft labels, else None.
    """
    if soft_labels is not None and args.uses_teacher:
        check_settings(soft_labels, args.temperature, vocabulary)
    if args.uses_teacher and teacher is None and (soft_labels is None or args.eval_teacher_losses):
        option = "--eval_teacher_losses" if soft_labels is not None else f"--preset {args.preset}"
        raise UserError(
            f"{option} requires a teacher, and there is no teacher: give --teacher, or choose a preset without one "
            "(ps-kd, ce)"
        )
    if args.n_gpu > 1:
        raise UserError("several GPUs require one process each: start with `accelerate launch` (or torchrun)")


def check_batches(args: ASKDConfig, collator: Any, teacher_is_cached: bool) -> None:
    """Raise `UserError` if the collator changes clips at random and an option doesn't allow that."""
    if not is_random(collator):
        return
    if teacher_is_cached and args.uses_teacher and collator.changes_targets:
        raise UserError(
            "the teacher's cached labels are of the unchanged clips: --augment, --timestamp_probability and "
            "--condition_on_prev_probability are not supported with them"
        )
    if args.dataloader_persistent_workers:
        raise UserError(
            "--dataloader_persistent_workers is not supported with --augmentations, --timestamp_probability, "
            "--condition_on_prev_probability and a range of --window_seconds: the workers would repeat the random "
            "numbers of the first epoch"
        )


def is_random(collator: Any) -> bool:
    """Return whether the batch of a clip differs between epochs."""
    return isinstance(collator, SpeechCollator) and collator.is_random
