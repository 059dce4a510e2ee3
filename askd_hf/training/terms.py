"""The objective's terms on their way to the log: checked, then summed over label tokens."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..objective import LossTerms

# the terms that are logged, as columns of the sums: each a sum over label tokens, then how many tokens it sums
LOG_NAMES = {
    "total": "blend_loss",
    "ce": "ce_loss",
    "teacher": "teacher_loss",
    "self": "self_loss",
    "teacher_ce": "teacher_ce",
    "agreement": "agreement",
    "hidden": "hidden_loss",
}


def new_sums(device: torch.device) -> Tensor:
    """`(2 * terms,)` zeros."""
    # float64, so that the logged means are exact to the digits shown; Apple's GPUs have none
    return torch.zeros(
        2 * len(LOG_NAMES), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )


def sums(terms: LossTerms) -> Tensor:
    """`(2 * terms,)`: the terms' sums over tokens, then how many tokens each sums; 0 for a term that isn't there."""
    measured = terms.measured()
    tokens = float(len(terms.total))
    values = [measured[t].sum() if t in measured else terms.total.new_zeros(()) for t in LOG_NAMES]
    counts = [terms.total.new_tensor(tokens if t in measured else 0.0) for t in LOG_NAMES]
    return torch.stack(values + counts)


def sums_by_clip(terms: LossTerms, labels: Tensor) -> Tensor:
    """`sums` for each clip of `(batch, tokens)` labels: `(batch, 2 * terms)`."""
    measured = terms.measured()
    real = labels != -100
    columns = []
    for term in LOG_NAMES:
        column = terms.total.new_zeros(labels.shape)
        if term in measured:
            column[real] = measured[term]
        columns.append(column.sum(1))
    columns += [real.sum(1).to(columns[0].dtype) * (term in measured) for term in LOG_NAMES]
    return torch.stack(columns, dim=1)


def means(summed: Tensor) -> dict[str, float]:
    """By name in the log: the mean of each term over the tokens where it was measured; the others are left out."""
    values, counts = summed.view(2, -1).tolist()
    return {name: v / n for name, v, n in zip(LOG_NAMES.values(), values, counts, strict=True) if n}


def eval_metrics(summed: Tensor, prefix: str, all_terms: bool) -> dict[str, float]:
    """The terms of an evaluation by their names in the log, as means over its label tokens; empty without any.

    The `loss` is the cross-entropy: the weights of the objective change from step to step.

    Args:
        prefix: of the names, such as eval.
        all_terms: False for the cross-entropy alone.
    """
    terms = means(summed)
    if not terms:
        return {}
    terms = terms if all_terms else {"ce_loss": terms["ce_loss"]}
    return {f"{prefix}_{name}": value for name, value in {"loss": terms["ce_loss"], **terms}.items()}


class NonFiniteLossError(UserError):
    """The loss or the gradient is NaN or infinite. The weights are those of the last update and still finite."""


def check_finite(terms: LossTerms, labels: Tensor, clips: list[str], step: int) -> None:
    """Raise `NonFiniteLossError`, with the names of the clips, if the objective isn't finite at every token.

    Args:
        labels: `(batch, tokens)`, of which `terms` are those at label tokens.
        clips: the names of the batch's clips; may be empty.
    """
    if torch.isfinite(terms.total.sum()):
        return
    rows = (labels != -100).nonzero()[:, 0][~torch.isfinite(terms.total)].unique().tolist()
    names = [clips[row] if row < len(clips) else f"row {row} of the batch" for row in rows]
    raise NonFiniteLossError(
        f"the loss is not finite at step {step}, in {len(names)} of {len(labels)} clips: "
        f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}. Lower the learning rate, or look at these clips. "
        "Checkpoints are from before"
    )


def check_gradient(grad_norm: Any, clips: list[str], step: int) -> None:
    """Raise `NonFiniteLossError` if the norm of the gradient, if there is one, is NaN or infinite."""
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise NonFiniteLossError(
            f"the gradient is not finite at step {step}, last clips: {', '.join(clips[:8])}. Lower the learning rate. "
            "Checkpoints are from before"
        )
