"""From the sum of the objective over a batch to the loss of the backward pass."""

import torch
from accelerate import Accelerator
from torch import Tensor


def gradient_scale(accelerator: Accelerator, num_items_in_batch: Tensor | int | None) -> float:
    """Return the factor of the gradient in the backward pass; not 1 in float16 only, which has a gradient scaler."""
    if accelerator.scaler is None:
        return 1.0
    return float(accelerator.scaler.get_scale() / (num_items_in_batch or 1))


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
