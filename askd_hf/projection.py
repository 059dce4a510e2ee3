"""Compute the objective from hidden states, without the `(tokens, vocabulary)` logits of a whole batch.

The vocabulary is a hundred times as wide as the model. The label tokens are therefore projected in chunks, for
student, teacher and self-teacher together. The gradient with respect to the student's logits is computed in the
forward pass, chunk by chunk, and only the gradients of the hidden states and of the projection's weight are kept for
the backward pass. For a batch of any size, peak memory is a few chunks of logits and one gradient of the weight. As in
Liger's fused cross-entropy, and unlike recomputation in the backward pass, each token is projected once.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import WhisperForConditionalGeneration

from .objective import LossTerms, TopK, distillation_loss

# Tokens per chunk of logits. On a CPU a chunk is 26 MB: above 32 MB malloc would return new zeroed pages every time.
LOGITS_CHUNK_SIZE = {"cpu": 128, "default": 1024}
# Tokens per call of the objective. On a CPU they are few enough to stay in the cache, which is two to three times as
# fast. On a GPU it is the whole chunk, which needs fewer kernels.
LOSS_CHUNK_SIZE = {"cpu": 16, "default": 1024}


class LMHeadInputs(NamedTuple):
    """The inputs of the LM head: `hidden` `(tokens, d_model)` and its `weight` `(vocabulary, d_model)`."""

    hidden: Tensor
    weight: Tensor

    def in_compute_dtype(self) -> "LMHeadInputs":
        """Cast both to the dtype of autocast, or to that of the weight; once, rather than once per chunk."""
        device = self.hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return LMHeadInputs(self.hidden.to(dtype), self.weight.to(dtype))


def label_positions(labels: Tensor) -> Tensor:
    """Return the positions of the label tokens in the flattened labels, int64 `(tokens,)`.

    The size of the result depends on the values: a GPU has to finish its work first. `SpeechCollator` therefore
    computes it on the CPU.

    Args:
        labels: `(batch, tokens)`, -100 where there is no label.
    """
    return (labels.flatten() != -100).nonzero()[:, 0]


def at_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Return the values `(batch, tokens, ...)` at `label_positions`, `(label tokens, ...)`."""
    return values.flatten(0, 1).index_select(0, positions)


@contextlib.contextmanager
def capture_lm_head_inputs(
    model: WhisperForConditionalGeneration, positions: Tensor, keep_logits: bool = False
) -> Iterator[list[LMHeadInputs]]:
    """Capture the inputs of the LM head at some positions, and skip the projection.

    A hook works through the wrappers of DDP and autocast, and captures the weight that `functional_call` substitutes.

    Args:
        positions: of the flattened batch, see `label_positions`.
        keep_logits: True to compute the logits of all positions. Else the model's logits are empty.
    """
    captured: list[LMHeadInputs] = []

    def capture(projection: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        hidden = at_positions(args[0], positions)
        captured.append(LMHeadInputs(hidden, projection.weight))
        return None if keep_logits else (hidden[:0],)

    hook = model.proj_out.register_forward_pre_hook(capture)
    try:
        yield captured
    finally:
        hook.remove()


def chunked_distillation_loss(
    student: LMHeadInputs,
    labels: Tensor,
    *,
    teacher: LMHeadInputs | TopK | None = None,
    self_teacher: LMHeadInputs | TopK | None = None,
    teacher_mask: Tensor | None = None,
    gradient_scale: Tensor | float = 1.0,
    **options: Any,
) -> tuple[Tensor, LossTerms]:
    """Compute `objective.distillation_loss` in chunks of tokens.

    Args:
        student: at the positions with a label only.
        labels: `(tokens,)`, without -100.
        teacher, self_teacher: the soft targets at the same tokens.
        teacher_mask: `(tokens,)` bool. Default: all True.
        gradient_scale: the factor of the gradient in the backward pass, as a number or a tensor `()`. The gradient is
            stored multiplied by it, or float16 would lose small gradients.
        options: the other arguments of `distillation_loss`.

    Returns:
        The objective summed over tokens, with its gradient (for one backward pass), and the terms at every token
        without gradient.
    """
    targets = {
        name: target.in_compute_dtype() if isinstance(target, LMHeadInputs) else target
        for name, target in {"teacher": teacher, "self_teacher": self_teacher}.items()
        if target is not None
    }
    chunks = _Chunks(labels, targets, teacher_mask, options, gradient_scale)
    if torch.is_grad_enabled():
        total = _ProjectInChunks.apply(student.hidden, student.weight, chunks)
    else:
        hidden, weight = student.in_compute_dtype()
        with torch.autocast(hidden.device.type, enabled=False):
            total = sum(chunks.loss(hidden[chunk] @ weight.T, chunk) for chunk in chunks.slices(hidden))
    return total, LossTerms(**chunks.terms)


class _Chunks:
    """Compute the objective chunk by chunk, and collect the terms."""

    def __init__(
        self,
        labels: Tensor,
        targets: dict[str, LMHeadInputs | TopK],
        teacher_mask: Tensor | None,
        options: dict[str, Any],
        gradient_scale: Tensor | float,
    ):
        self.labels, self.targets, self.options, self.gradient_scale = labels, targets, options, gradient_scale
        self.teacher_mask = teacher_mask
        # one tensor per term, filled chunk by chunk: many small ones would fragment the memory between the chunks
        self.terms: dict[str, Tensor] = {}

    def slices(self, hidden: Tensor) -> Iterator[slice]:
        return _slices(len(hidden), LOGITS_CHUNK_SIZE, hidden.device)

    def loss(self, logits: Tensor, chunk: slice, with_gradient: bool = False) -> Tensor:
        """Return the sum over a chunk of logits `(tokens, vocabulary)`.

        If `with_gradient`, overwrite the logits with their gradient.
        """
        targets = {
            name: target.rows(chunk) if isinstance(target, TopK) else target.hidden[chunk] @ target.weight.T
            for name, target in self.targets.items()
        }
        total = logits.new_zeros((), dtype=torch.float32)
        for rows in _slices(len(logits), LOSS_CHUNK_SIZE, logits.device):
            row_targets: dict[str, Any] = {
                name: target.rows(rows) if isinstance(target, TopK) else target[rows]
                for name, target in targets.items()
            }
            if self.teacher_mask is not None:
                row_targets["teacher_mask"] = self.teacher_mask[chunk][rows]
            with torch.set_grad_enabled(with_gradient):
                row_logits = logits[rows].detach().requires_grad_(with_gradient)
                terms = distillation_loss(row_logits, self.labels[chunk][rows], **row_targets, **self.options)
                if with_gradient:
                    scaled = terms.total.sum() * self.gradient_scale
                    (logits[rows],) = torch.autograd.grad(scaled, row_logits)
            for name, term in terms.measured().items():
                if name not in self.terms:
                    self.terms[name] = term.new_empty(len(self.labels))
                self.terms[name][chunk][rows] = term
            total += terms.total.detach().sum()
        return total


class _ProjectInChunks(torch.autograd.Function):
    """Sum `_Chunks.loss` over hidden @ weight.T. The gradients of both are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunks: _Chunks) -> Tensor:
        of_hidden, of_weight, _ = ctx.needs_input_grad
        ctx.gradient_scale = chunks.gradient_scale
        ctx.hidden_gradient = torch.empty_like(hidden) if of_hidden else None
        ctx.weight_gradient = None
        h, w = LMHeadInputs(hidden, weight).in_compute_dtype()
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks.slices(h):
                logits = h[chunk] @ w.T
                total += chunks.loss(logits, chunk, with_gradient=of_hidden or of_weight)
                # `logits` contains their gradient now
                if of_hidden:
                    ctx.hidden_gradient[chunk] = (logits @ w).to(hidden.dtype)
                if of_weight and ctx.weight_gradient is None:
                    ctx.weight_gradient = (logits.T @ h[chunk]).to(weight.dtype)
                elif of_weight and w.dtype == weight.dtype:
                    ctx.weight_gradient.addmm_(logits.T, h[chunk])
                elif of_weight:  # computed in half precision, summed in the dtype of the weight
                    ctx.weight_gradient += logits.T @ h[chunk]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.gradient_scale is None:
            raise RuntimeError("the objective supports one backward pass only")
        # scaled in place, as the gradient of the weight is the largest tensor of the step
        gradient = gradient / ctx.gradient_scale
        both = ctx.hidden_gradient, ctx.weight_gradient
        of_hidden, of_weight = (g if g is None else g.mul_(gradient) for g in both)
        ctx.gradient_scale = ctx.hidden_gradient = ctx.weight_gradient = None
        return of_hidden, of_weight, None


def _slices(length: int, sizes: dict[str, int], device: torch.device) -> Iterator[slice]:
    size = sizes.get(device.type, sizes["default"])
    return (slice(start, start + size) for start in range(0, max(length, 1), size))
