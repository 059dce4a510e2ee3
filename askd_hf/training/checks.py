"""Checks of the trainer's arguments against each other, before anything is computed."""

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
    """Raise `UserError` unless there is a teacher, or its soft labels, wherever the options need it.

    Args:
        soft_labels: the training set if it has cached soft labels, else None.
        vocabulary: the student's number of tokens.
    """
    if soft_labels is not None and args.uses_teacher:
        check_settings(soft_labels, args.temperature, vocabulary)
    if args.uses_teacher and teacher is None and (soft_labels is None or args.eval_teacher_losses):
        raise UserError(
            f"preset {args.preset!r} has a teacher phase"
            f"{' and --eval_teacher_losses evaluates it, ' if args.eval_teacher_losses else ' '}but there is no teacher: give it "
            "with --teacher, or choose a preset without one (ps-kd, ce)"
        )
    if args.n_gpu > 1:
        raise UserError("several GPUs need one process each: start with `accelerate launch` (or torchrun)")


def check_batches(args: ASKDConfig, collator: Any, teacher_is_cached: bool) -> None:
    """Raise `UserError` if the collator changes clips at random where that can't be."""
    if not draws_at_random(collator):
        return
    if teacher_is_cached and args.uses_teacher:
        raise UserError("the teacher's cached labels are of the clips as they are: the collator may change none")
    if args.dataloader_persistent_workers:
        raise UserError(
            "dataloader_persistent_workers: the workers would draw the same in every epoch; leave it off with "
            "--augmentations, --timestamp_probability and --condition_on_prev_probability"
        )


def draws_at_random(collator: Any) -> bool:
    """Whether a clip's batch isn't the same in every epoch."""
    return isinstance(collator, SpeechCollator) and collator.is_random
