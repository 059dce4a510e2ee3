"""From the terms of the objective to the loss of the backward pass and the log, and the check that they are finite."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import UserError
from ..objective import LossTerms

# field of `LossTerms` -> key in the log. Each has two columns in the sums: its sum over label tokens, and the number
# of tokens in that sum.
LOG_NAMES = {
    "total": "total_loss",
    "ce": "ce_loss",
    "teacher": "teacher_loss",
    "self": "self_loss",
    "teacher_ce": "teacher_ce",
    "top1_agreement": "top1_agreement",
    "hidden": "hidden_loss",
}
SHOWN = 8  # clips that a message names


def gradient_scale(accelerator: Accelerator, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Return the factor of the gradient in the backward pass; not 1 in float16 only, which has a gradient scaler.

    In float16 it is a tensor on the device, `()`: `get_scale` of the scaler would wait for the GPU.
    """
    if accelerator.scaler is None:
        return 1.0
    scale = accelerator.scaler.scale(torch.ones((), device=accelerator.device))
    return scale if num_items_in_batch is None else scale / torch.as_tensor(num_items_in_batch).clamp(min=1)


def mean_over_tokens(
    total: Tensor, tokens: int, num_items_in_batch: Tensor | int | None, processes: int = 1
) -> Tensor:
    """Return `total`, the sum over the label tokens of a batch, divided by the label tokens of the whole update.

    A batch of a stream may have no label tokens, if all its rows were skipped. The loss is 0 then, not NaN.

    Args:
        tokens: the number of label tokens of the batch.
        num_items_in_batch: the number of label tokens of the whole update. None for `tokens`.
        processes: the factor that undoes DDP's mean over processes, where each has divided by the tokens of all.
    """
    if num_items_in_batch is None:
        return total / max(tokens, 1)
    return total / torch.as_tensor(num_items_in_batch).clamp(min=1) * processes


# ---- logging ----


def new_sums(device: torch.device) -> Tensor:
    """Return zeros, `(2 * terms,)`."""
    # float64, so that the logged means are exact to the digits shown; MPS has no float64
    return torch.zeros(
        2 * len(LOG_NAMES), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )


def sums_by_clip(terms: LossTerms, labels: Tensor, positions: Tensor) -> Tensor:
    """Return the sum of each term over the label tokens of each clip, then the number of tokens in each sum.

    Both are 0 for a term that wasn't computed. The first is the sum of the total.

    Args:
        labels: `(batch, tokens)`, -100 where there is no label.
        positions: the `label_positions` of `labels`.

    Returns:
        `(batch, 2 * terms)`.
    """
    measured = terms.measured()
    label_mask = labels != -100
    columns = []
    for term in LOG_NAMES:
        column = terms.total.new_zeros(labels.numel())
        if term in measured:
            column.index_copy_(0, positions, measured[term].to(column.dtype))
        columns.append(column.view(labels.shape).sum(1))
    columns += [label_mask.sum(1).to(columns[0].dtype) * (term in measured) for term in LOG_NAMES]
    return torch.stack(columns, dim=1)


def _means(summed: Tensor) -> dict[str, float]:
    values, counts = summed.view(2, -1).tolist()
    return {name: v / n for name, v, n in zip(LOG_NAMES.values(), values, counts, strict=True) if n}


def train_metrics(summed: Tensor) -> dict[str, float]:
    """Return the mean of each computed term over label tokens, by its key in the log; empty without label tokens.

    Without the total, which is Trainer's `loss`.
    """
    return {name: value for name, value in _means(summed).items() if name != "total_loss"}


def eval_metrics(summed: Tensor, prefix: str, all_terms: bool) -> dict[str, float]:
    """Return the means of an evaluation over its label tokens, by their keys in the log; empty without label tokens.

    The cross-entropy is the `loss`, because the weights of the objective change from step to step.

    Args:
        prefix: of the keys, such as eval.
        all_terms: False for the cross-entropy alone.
    """
    terms = {"loss" if name == "ce_loss" else name: value for name, value in _means(summed).items()}
    return {f"{prefix}_{name}": value for name, value in terms.items() if all_terms or name == "loss"}


# ---- NaN and infinity ----


class NonFiniteLossError(UserError):
    """The loss or the gradient is NaN or infinite. The weights are those of the last update and still finite."""


class ClipLosses(NamedTuple):
    """The losses of the clips of a micro-batch."""

    losses: Tensor  # `(batch,)`
    names: list[str]  # of the clips; may be empty


def check_finite(update: list[ClipLosses], grad_norm: Any, step: int) -> None:
    """Raise `NonFiniteLossError`, which names the clips, if a loss or the gradient of an update isn't finite.

    The GPU is waited for once.

    Args:
        update: of all micro-batches.
        grad_norm: the norm of the gradient. None if it isn't to be checked.
        step: the number of updates so far.
    """
    losses = torch.cat([part.losses for part in update]) if update else torch.zeros(0)
    if torch.isfinite(losses.sum() + (0.0 if grad_norm is None else grad_norm)):
        return
    names = [
        part.names[row] if row < len(part.names) else f"row {row} of the batch"
        for part in update
        for row in (~part.losses.isfinite()).nonzero()[:, 0].tolist()
    ]
    if not names:
        last = update[-1].names[:SHOWN] if update else []
        raise NonFiniteLossError(
            f"the gradient is not finite at step {step}, last clips: {', '.join(last)}. Lower the learning rate. All "
            "checkpoints are from before this step"
        )
    raise NonFiniteLossError(
        f"the loss is not finite at step {step}, in {len(names)} of {len(losses)} clips: "
        f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}. Lower the learning rate or check these "
        "clips. All checkpoints are from before this step"
    )
