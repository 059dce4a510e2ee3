"""Self-teachers: averaged or earlier weights of the student give the soft target.

A self-teacher stores a copy of the trained parameters only. To run it, the student is called with this copy in place
of its parameters. A frozen encoder thus exists only once in memory.

To add a self-teacher, subclass `SelfTeacher` and add it to `SELF_TEACHERS`.
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

    @torch.no_grad()
    def copy_to(self, student: nn.Module) -> None:
        """Copy the self-teacher's parameters into the student."""
        trained = dict(student.named_parameters())
        for name, parameter in self.parameters.items():
            trained[name].copy_(parameter)

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Load the parameters of a checkpoint, in the dtypes and on the devices of the current ones."""
        if parameters.keys() != self.parameters.keys():
            raise UserError(
                "the self-teacher of the checkpoint has other parameters than those trained now: resume with the same "
                "--freeze_encoder and --lora_* options"
            )
        self.parameters = {
            name: parameters[name].to(present.device, present.dtype) for name, present in self.parameters.items()
        }

    def after_update(self, student: nn.Module) -> None:
        """Update the parameters. Called after every optimizer step."""

    def at_new_epoch(self, student: nn.Module) -> None:
        """Update the parameters. Called before the first step of later epochs if `snapshot_strategy` is `epoch`."""

    @torch.no_grad()
    def __call__(self, student: nn.Module, inputs: dict[str, Any]) -> Any:
        """Return `student(**inputs)` in evaluation mode, with the parameters of the self-teacher."""
        training = student.training
        student.eval()
        try:
            return torch.func.functional_call(student, self.parameters, kwargs=inputs)
        finally:
            student.train(training)


class EMASelfTeacher(SelfTeacher):
    """Exponential moving average of the student since the self phase began (Mean Teacher, Tarvainen et al. 2017)."""

    @torch.no_grad()
    def after_update(self, student: nn.Module) -> None:
        trained = dict(student.named_parameters())
        averages = list(self.parameters.values())
        torch._foreach_lerp_(averages, [trained[name] for name in self.parameters], 1.0 - self.decay)


class SnapshotSelfTeacher(SelfTeacher):
    """The student at the start of the self phase; copied again every epoch it is PS-KD (Kim et al. 2021)."""

    def at_new_epoch(self, student: nn.Module) -> None:
        self.copy_from(student)


SELF_TEACHERS: dict[str, type[SelfTeacher]] = {"ema": EMASelfTeacher, "snapshot": SnapshotSelfTeacher}
