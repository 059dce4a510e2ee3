"""The hidden-state loss: the student's encoder layers against those of the teacher that they stand for.

Of a clip it is the mean over the matched layers of |s - t|^2 / |t|^2, the squared error relative to the teacher's
squares, both summed over all positions and the width: 0 where both hear the same, 1 for a student that hears nothing.
Relative, because the squares of Whisper's layers differ by orders of magnitude.

The objective has it at each label token of the clip, a * h * H, where `a` is the weight on the teacher and h
`ASKDConfig.hidden_weight`: it decays with the teacher's schedule, and a clip counts by its tokens as in all else, so
that neither batches nor processes matter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .student import evenly_spread


class LayerPairs(NamedTuple):
    """Matched layers, by their index in `hidden_states`, where 0 is the first layer's input: equally long."""

    student: list[int]
    teacher: list[int]


def matched_layers(student_layers: int, teacher_layers: int, copied: list[int] | None = None) -> LayerPairs:
    """Which hidden states of the encoders are compared.

    Each of the student's layers is matched to the teacher's that it was copied from, but the last always to the
    teacher's last: what comes out there, after the final layer norm, is what a decoder of the teacher's layers
    listens to. The teacher's last layer is matched to nothing else, as its output without the norm isn't at hand.

    Args:
        copied: the teacher's layer of each of the student's. None: spread evenly, as `init_student` does.
    """
    copied = evenly_spread(student_layers, teacher_layers) if copied is None else copied
    before = [(i + 1, layer + 1) for i, layer in enumerate(copied[:-1]) if layer < teacher_layers - 1]
    student, teacher = zip(*before, (student_layers, teacher_layers), strict=True)
    return LayerPairs(list(student), list(teacher))


def hidden_state_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The loss of each clip, `(clips,)` float32, from `(clips, positions, width)` of each matched layer.

    Sums are in float32 whatever the models' dtype. No gradient flows into the teacher.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        # by norms, which keep no squares for the backward pass and make no float32 copy of the teacher's
        error = torch.linalg.vector_norm(ours.float() - theirs.detach(), dim=(1, 2))
        size = torch.linalg.vector_norm(theirs.detach(), dim=(1, 2), dtype=torch.float32)
        losses.append((error / size).square())
    return torch.stack(losses).mean(0)
