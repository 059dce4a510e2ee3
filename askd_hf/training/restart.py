"""`auto_find_batch_size`: a smaller batch begins where the larger one had begun.

Trainer only calls its training loop again: the student would go on from the weights that the failed attempt had come
to, with its optimizer's state, and without a teacher if that had been released.
"""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, WhisperForConditionalGeneration
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError
from .terms import new_sums


@dataclass
class InitialState:
    """What training begins with, kept in CPU memory.

    Attributes:
        weights: those that are trained, `{name: tensor}`.
        random_states: of Python, NumPy and torch.
        checkpoints: that were there.
        teacher: itself, as it may be dropped.
        own_optimizer: whether the trainer was given one.
    """

    weights: dict[str, Tensor]
    random_states: tuple[Any, ...]
    checkpoints: set[Path]
    teacher: WhisperForConditionalGeneration | None
    own_optimizer: bool

    @classmethod
    def of(cls, trainer: Trainer, teacher: WhisperForConditionalGeneration | None) -> "InitialState":
        trained = ((name, p) for name, p in trainer.model.named_parameters() if p.requires_grad)
        return cls(
            weights={name: parameter.detach().to("cpu", copy=True) for name, parameter in trained},
            random_states=_random_states(),
            checkpoints=_checkpoints(trainer),
            teacher=teacher,
            own_optimizer=trainer.optimizer is not None,
        )

    @torch.no_grad()
    def restore(self, trainer: Trainer, resume_from_checkpoint: str | None) -> None:
        """Undo what an attempt has done to the trainer, and remove its checkpoints. The teacher is the caller's.

        Raises `UserError` if the attempt has deleted the checkpoint that it was resumed from.
        """
        if resume_from_checkpoint is not None and not Path(resume_from_checkpoint).is_dir():
            raise UserError(
                f"out of memory, and {resume_from_checkpoint}, where this run went on, was deleted meanwhile "
                "(save_total_limit): go on from the last checkpoint on a device with more memory"
            )
        for name, parameter in trainer.model.named_parameters():
            if name in self.weights:
                parameter.copy_(self.weights[name])
        _set_random_states(self.random_states)
        if not self.own_optimizer:
            trainer.optimizer = None  # it is made anew
        if trainer.args.should_save:  # or they would pass for the last ones of the run
            for directory in _checkpoints(trainer) - self.checkpoints:
                shutil.rmtree(directory)
        trainer.accelerator.wait_for_everyone()


def _checkpoints(trainer: Trainer) -> set[Path]:
    return set(Path(trainer.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def _random_states() -> tuple[Any, ...]:
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def _set_random_states(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpu)


def begin_or_restart(trainer: Any, beginning: InitialState | None, resume_from_checkpoint: str | None) -> InitialState:
    """Note what training begins with; at a later attempt, with a smaller batch, restore it.

    Args:
        trainer: an `ASKDTrainer`.
        beginning: None at the first attempt.
    """
    if beginning is None:
        return InitialState.of(trainer, trainer.teacher)
    trainer.identity.restarted = True
    beginning.restore(trainer, resume_from_checkpoint)
    trainer.skipped.count = 0
    trainer.train_sums = new_sums(trainer.args.device)
    trainer.throughput.reset()
    if resume_from_checkpoint is not None:
        trainer.blend.load(Path(resume_from_checkpoint))
        trainer.skipped.load(Path(resume_from_checkpoint), trainer.args.process_index)
    trainer.runner.restore_teacher(beginning.teacher)
    return beginning
