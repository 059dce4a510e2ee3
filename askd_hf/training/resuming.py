"""Compare the settings of a resumed run with those of its checkpoint. Make the evaluation that is still due."""

from pathlib import Path
from typing import Any

from ..callbacks import BLEND_STATE_FILE, read_blend_state
from ..config import ASKDConfig
from ..errors import UserError
from .node_disks import checkpoint_on_all_nodes
from .run_settings import (
    best_model_settings,
    check_same_run,
    config_settings,
    data_settings,
    model_settings,
    warn_of_unknown,
)
from .smaller_batch import random_states


def settings_of(args: ASKDConfig, trainer: Any, clips: Any) -> dict[str, Any]:
    """Return the settings of the models and the data of a run.

    Args:
        trainer: an `ASKDTrainer`. Its training set has soft labels if that of the run has.
        clips: the training set of the run.
    """
    runner = trainer.runner
    teacher_runs = args.uses_teacher and not runner.teacher_is_cached
    teacher = runner.teacher_digest if teacher_runs else None
    return (
        best_model_settings(args)
        | model_settings(runner.student.config, trainer.adapter, teacher, trainer.train_dataset, args.uses_teacher)
        | data_settings(clips, trainer.data_collator, trainer.origin)
    )


def check_checkpoint(checkpoint: str, settings: dict[str, Any]) -> None:
    """Raise `UserError` if the checkpoint is of a run with other settings."""
    check_same_run(read_blend_state(Path(checkpoint) / BLEND_STATE_FILE).options, settings, checkpoint)


class RunIdentity:
    """The settings of the run (`run_settings`), which every checkpoint contains.

    Attributes:
        restarted: whether training was started again with a smaller batch (`auto_find_batch_size`).
    """

    def __init__(self, args: ASKDConfig):
        self.args = args
        self.restarted = False
        self._settings: dict[str, Any] = {}

    def begin(self, trainer: Any, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, or None. It isn't loaded yet.

        Raises `UserError` if the checkpoint is incomplete, or if it is of a run with other settings.

        Args:
            trainer: an `ASKDTrainer`.
            resume_from_checkpoint: a directory, or True for the run's last complete checkpoint.
        """
        self.restarted = False
        resume_from = None
        if resume_from_checkpoint:
            name = "last" if resume_from_checkpoint is True else str(resume_from_checkpoint)
            resume_from = checkpoint_on_all_nodes(self.args.output_dir, name)
        self._settings = settings_of(self.args, trainer, trainer.train_dataset)
        if resume_from is not None:
            check_checkpoint(resume_from, self._settings | config_settings(self.args))
        return resume_from

    def settings(
        self, train_batch_size: int, total_steps: int, saved: dict[str, Any] | None, checkpoint: str | None
    ) -> dict[str, Any]:
        """Return all settings, once the batch size and the number of steps are known.

        Raises `UserError` if the run would differ from that of the checkpoint, and warns of settings that can't be
        compared.

        Args:
            saved: the settings that the checkpoint contains. None if the run isn't resumed.
        """
        settings = self._settings | config_settings(self.args, train_batch_size) | {"total_steps": total_steps}
        if saved is None:
            return settings
        if self.restarted:  # with a smaller batch, as memory was too small
            if saved.get("total_steps") != total_steps:
                raise UserError(
                    f"out of memory with the batch size of {checkpoint}, and a smaller one changes the number of "
                    "steps of the epochs: resume on a device with more memory"
                )
            saved = {name: value for name, value in saved.items() if name not in ("batch_size", "clips_of_a_process")}
        check_same_run(saved, settings, checkpoint)
        if not self.restarted:
            warn_of_unknown(saved, settings, checkpoint)
        return settings


def make_due_evaluation(trainer: Any, checkpoint: str, trial: Any, ignore_keys: list[str] | None) -> tuple[Any, ...]:
    """Make the evaluation that was due when a signal stopped the run, as Trainer's loop would have made it.

    The checkpoint isn't written anew: a run that is resumed from it once more evaluates again.

    Args:
        trainer: an `ASKDTrainer` that has loaded the checkpoint.

    Returns:
        The `random_states` after the evaluation, with which training goes on.
    """
    trainer._load_rng_state(checkpoint)
    metrics = trainer._evaluate(trial, ignore_keys)
    if trainer.stop.stopped:  # by another signal; the checkpoint still says that the evaluation is due
        trainer.control.should_save = False
        return random_states()
    trainer.blend.state.evaluation_due = False
    improved = trainer._determine_best_metric(metrics, trial)
    if improved and trainer.state.best_global_step == trainer.state.global_step:
        trainer.state.best_model_checkpoint = checkpoint
    return random_states()
