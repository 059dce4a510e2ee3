"""Restore the initial state before `auto_find_batch_size` retries with a smaller batch.

Trainer only calls its training loop again. The student would keep the weights of the failed attempt and the state of
its optimizer, and would have no teacher if that had been freed.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError
from .loss_sums import new_sums


class InitialState:
    """The state before the first update, in CPU memory."""

    def __init__(self, trainer: Any):
        trained = ((name, p) for name, p in trainer.model.named_parameters() if p.requires_grad)
        self.weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained}
        self.random_states = random_states()
        self.checkpoints = _checkpoints(trainer)
        self.teacher = trainer.teacher  # the trainer may free it
        self.had_optimizer = trainer.optimizer is not None

    @torch.no_grad()
    def restore(self, trainer: Trainer, resume_from_checkpoint: str | None) -> None:
        """Undo a failed attempt and remove its checkpoints. The caller restores the teacher.

        Raises `UserError` if the attempt has deleted the checkpoint that it was resumed from.
        """
        if resume_from_checkpoint is not None and not Path(resume_from_checkpoint).is_dir():
            raise UserError(
                f"out of memory, and {resume_from_checkpoint}, from which this run was resumed, has since been "
                "deleted (--save_total_limit): resume from the last checkpoint on a device with more memory"
            )
        for name, parameter in trainer.model.named_parameters():
            if name in self.weights:
                parameter.copy_(self.weights[name])
        set_random_states(self.random_states)
        if not self.had_optimizer:
            trainer.optimizer = None  # Trainer creates another
        if trainer.args.should_save:  # a resumed run would take them for its last ones
            for directory in _checkpoints(trainer) - self.checkpoints:
                shutil.rmtree(directory)
        trainer.accelerator.wait_for_everyone()


def _checkpoints(trainer: Trainer) -> set[Path]:
    return set(Path(trainer.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def random_states() -> tuple[Any, ...]:
    """Return the states of all random number generators."""
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def set_random_states(states: tuple[Any, ...]) -> None:
    """Restore what `random_states` returned."""
    python, numpy, cpu, gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpu)


def save_or_restore(trainer: Any, initial: InitialState | None, resume_from_checkpoint: str | None) -> InitialState:
    """Return the state before the first update: taken from the trainer, or at a later attempt restored in it.

    Args:
        trainer: an `ASKDTrainer`.
        initial: None at the first attempt.
    """
    if initial is None:
        return InitialState(trainer)
    trainer.identity.restarted = True
    initial.restore(trainer, resume_from_checkpoint)
    trainer.skipped.count = 0
    trainer.train_sums = new_sums(trainer.args.device)
    trainer.throughput.reset()
    if resume_from_checkpoint is not None:
        trainer.blend.load(Path(resume_from_checkpoint))
        trainer.skipped.load(Path(resume_from_checkpoint), trainer.args.process_index)
    trainer.runner.restore_teacher(initial.teacher)
    return initial
