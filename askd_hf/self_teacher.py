"""The self-teachers: the student's own averaged or earlier weights as a soft target.

A self-teacher keeps a copy of the trained parameters only. To run it, the student itself is called with these in
place of its own, so that a frozen encoder exists once, and the copy costs no more memory than the trained part.

To add a self-teacher, subclass `SelfTeacher` and name it in `SELF_TEACHERS`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError


class SelfTeacher:
    """A frozen copy of the student's trained parameters, `{name: tensor}`, in their dtype and on their device."""

    def __init__(self, student: nn.Module, decay: float):
        self.decay = decay
        self.parameters: dict[str, Tensor] = {}
        self.copy_from(student)

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.parameters = {name: parameter.detach().clone() for name, parameter in trained}

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Take the parameters of a checkpoint, onto the devices of the present ones."""
        if parameters.keys() != self.parameters.keys():
            raise UserError(
                "the checkpoint's self-teacher has other parameters than are trained now (freeze_encoder?)"
            )
        self.parameters = {
            name: parameters[name].to(present.device, present.dtype) for name, present in self.parameters.items()
        }

    def after_update(self, student: nn.Module) -> None:
        """Called after every optimizer step."""

    def at_new_epoch(self, student: nn.Module) -> None:
        """Called before the first step of every later epoch, when `snapshot_strategy` asks for it."""

    @torch.no_grad()
    def __call__(self, student: nn.Module, inputs: dict[str, Any]) -> Any:
        """`student(**inputs)` in evaluation mode, with the self-teacher's parameters."""
        training = student.training
        student.eval()
        try:
            return torch.func.functional_call(student, self.parameters, kwargs=inputs)
        finally:
            student.train(training)


class EMASelfTeacher(SelfTeacher):
    """The exponential moving average of the student since it entered the self phase (Mean Teacher, Tarvainen 2017)."""

    @torch.no_grad()
    def after_update(self, student: nn.Module) -> None:
        trained = dict(student.named_parameters())
        averages = list(self.parameters.values())
        torch._foreach_lerp_(averages, [trained[name] for name in self.parameters], 1.0 - self.decay)


class SnapshotSelfTeacher(SelfTeacher):
    """The student as it entered the self phase; renewed every epoch, it is PS-KD's teacher (Kim et al. 2021)."""

    def at_new_epoch(self, student: nn.Module) -> None:
        self.copy_from(student)


SELF_TEACHERS: dict[str, type[SelfTeacher]] = {"ema": EMASelfTeacher, "snapshot": SnapshotSelfTeacher}
