"""Stop training when the loss or the gradient is NaN or infinite."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..objective import LossTerms

SHOWN = 8  # clips that a message names


class NonFiniteLossError(UserError):
    """The loss or the gradient is NaN or infinite. The weights are those of the last update and still finite."""


def check_finite(terms: LossTerms, labels: Tensor, clips: list[str], step: int) -> None:
    """Raise `NonFiniteLossError`, which names the clips, if the objective isn't finite at every label token.

    Args:
        terms: of the label tokens.
        labels: `(batch, tokens)`, -100 where there is no label.
        clips: the names of the batch's clips; may be empty.
        step: the number of updates so far.
    """
    if torch.isfinite(terms.total.sum()):
        return
    rows = (labels != -100).nonzero()[:, 0][~torch.isfinite(terms.total)].unique().tolist()
    names = [clips[row] if row < len(clips) else f"row {row} of the batch" for row in rows]
    raise NonFiniteLossError(
        f"the loss is not finite at step {step}, in {len(names)} of {len(labels)} clips: "
        f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}. Lower the learning rate or check these "
        "clips. All checkpoints are from before this step"
    )


def check_gradient(grad_norm: Any, clips: list[str], step: int) -> None:
    """Raise `NonFiniteLossError` if the norm of the gradient is NaN or infinite. None passes."""
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise NonFiniteLossError(
            f"the gradient is not finite at step {step}, last clips: {', '.join(clips[:SHOWN])}. Lower the learning "
            "rate. All checkpoints are from before this step"
        )
