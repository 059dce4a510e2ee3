"""Resume a run from its own checkpoint only: compare what the run is with what the checkpoint noted."""

from pathlib import Path
from typing import Any

from ..callbacks import BLEND_STATE_FILE, read_blend_state
from ..config import ASKDConfig
from .checkpoints import checkpoint_to_resume
from .run_settings import (
    check_same_run,
    chosen_by,
    config_settings,
    data_settings,
    model_settings,
    warn_of_unknown,
)


class RunIdentity:
    """What the run is, which every checkpoint notes.

    Attributes:
        restarted: whether training has begun again with a smaller batch (`auto_find_batch_size`).
    """

    def __init__(self, args: ASKDConfig):
        self.args = args
        self.restarted = False
        self._settings: dict[str, Any] = {}

    def begin(self, trainer: Any, resume_from_checkpoint: str | bool | None) -> str | None:
        """Find the checkpoint to resume from: True is the run's last complete one. Nothing is loaded yet.

        Args:
            trainer: an `ASKDTrainer`.

        Raises `UserError` if it isn't complete, or is of another run.
        """
        self.restarted = False
        resume_from = None
        if resume_from_checkpoint:
            name = "last" if resume_from_checkpoint is True else str(resume_from_checkpoint)
            resume_from = checkpoint_to_resume(self.args.output_dir, name)
        runner, train_dataset = trainer.runner, trainer.train_dataset
        teacher_runs = self.args.uses_teacher and not runner.teacher_is_cached
        self._settings = (
            chosen_by(self.args)
            | model_settings(
                runner.student.config,
                trainer.adapter,
                runner.teacher_digest if teacher_runs else None,
                train_dataset,
                self.args.uses_teacher,
            )
            | data_settings(train_dataset, trainer.data_collator, trainer.origin)
        )
        if resume_from is not None:
            saved = read_blend_state(Path(resume_from) / BLEND_STATE_FILE).options
            check_same_run(saved, self._settings | config_settings(self.args), resume_from)
        return resume_from

    def settings(self, train_batch_size: int, total_steps: int) -> dict[str, Any]:
        """All settings, now that batch size and length of the run are known."""
        return self._settings | config_settings(self.args, train_batch_size) | {"total_steps": total_steps}

    def check(self, saved: dict[str, Any], settings: dict[str, Any], checkpoint: str) -> None:
        """Raise `UserError` if the `saved` settings of `checkpoint` are of another run; warn of unknown ones."""
        saved = dict(saved)
        if self.restarted:  # memory was out, so the batch size is another
            for name in ("batch_size", "clips_of_a_process"):
                saved.pop(name, None)
        check_same_run(saved, settings, checkpoint)
        if not self.restarted:
            warn_of_unknown(saved, settings, checkpoint)
