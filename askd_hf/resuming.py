"""`ResumingTrainer`: a run goes on from a whole checkpoint of its own, and from no other."""

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from .blending import BlendingTrainer
from .callbacks import BLEND_STATE_FILE, read_blend_state
from .run_dir import checkpoint_to_resume
from .run_settings import (
    check_same_run,
    chosen_by,
    config_settings,
    data_settings,
    model_settings,
    warn_of_unknown,
)


class ResumingTrainer(BlendingTrainer):
    """Notes in every checkpoint what the run is, and compares that when one is resumed."""

    def _begin_or_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint that training is to go on from: True is the run's last whole one. Before anything is loaded.

        Raises `UserError` if it isn't whole, or of another run.
        """
        self._began_again = False
        resume_from = None
        if resume_from_checkpoint:
            name = "last" if resume_from_checkpoint is True else str(resume_from_checkpoint)
            resume_from = checkpoint_to_resume(self.args.output_dir, name)
        teacher_runs = self.args.uses_teacher and not self._teacher_is_cached
        self._settings = (
            chosen_by(self.args)
            | model_settings(
                self.model.config,
                self.adapter,
                self.teacher_digest if teacher_runs else None,
                self.train_dataset,
                self.args.uses_teacher,
            )
            | data_settings(self.train_dataset, self.data_collator, self.origin)
        )
        if resume_from is not None:
            saved = read_blend_state(Path(resume_from) / BLEND_STATE_FILE).options
            check_same_run(saved, self._settings | config_settings(self.args), resume_from)
        return resume_from

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        started = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.train_batch_size = self._train_batch_size  # a resumed state has that of its checkpoint
        options = self._settings | config_settings(self.args, self._train_batch_size)
        options["total_steps"] = max_steps
        if resume_from_checkpoint is not None:
            saved = dict(self.blend.state.options)
            if self._began_again:  # memory was out, so the batch is another one
                for name in ("batch_size", "clips_of_a_process"):
                    saved.pop(name, None)
            check_same_run(saved, options, resume_from_checkpoint)
            if not self._began_again:
                warn_of_unknown(saved, options, resume_from_checkpoint)
        self.blend.options = options
        if self.args.world_size > 1:
            # each process draws its own dropout and SpecAugment. Not before: the models are made alike. A checkpoint
            # has the states of all, which are loaded after this
            set_seed(self.args.seed, device_specific=True)
        return started
