"""Sum the terms of the objective over label tokens, for the log."""

import torch
from torch import Tensor

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


def new_sums(device: torch.device) -> Tensor:
    """Return zeros, `(2 * terms,)`."""
    # float64, so that the logged means are exact to the digits shown; MPS has no float64
    return torch.zeros(
        2 * len(LOG_NAMES), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )


def sums_by_clip(terms: LossTerms, labels: Tensor) -> Tensor:
    """Return the sum of each term over the label tokens of each clip, then the number of tokens in each sum.

    Both are 0 for a term that wasn't computed.

    Args:
        labels: `(batch, tokens)`, -100 where there is no label.

    Returns:
        `(batch, 2 * terms)`.
    """
    measured = terms.measured()
    label_mask = labels != -100
    columns = []
    for term in LOG_NAMES:
        column = terms.total.new_zeros(labels.shape)
        if term in measured:
            column[label_mask] = measured[term]
        columns.append(column.sum(1))
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
