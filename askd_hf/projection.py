"""From hidden states to the objective, without the `(tokens, vocabulary)` logits of a whole batch.

The vocabulary is a hundred times as wide as the model. So the label tokens are projected onto it a chunk at a time,
for student, teacher and self-teacher together; the objective and its gradient with respect to the student's logits are
worked out at once, and only the gradients of the hidden states and of the projection's weight are kept for the
backward pass. Peak memory is a few chunks of logits and one gradient of the weight, whatever the batch; and unlike
recomputation in the backward pass this projects the student's tokens once (as Liger's fused cross-entropy does).
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import WhisperForConditionalGeneration

from .objective import LossTerms, TopK, distillation_loss

# Tokens of a chunk. On a CPU of a Whisper vocabulary 26 MB: malloc hands out over 32 MB as new zeroed pages each time.
LOGITS_CHUNK_SIZE = {"cpu": 128, "default": 1024}
# Tokens that the objective sees at once: on a CPU so few that its many passes over them stay in the cache, which makes
# them two to three times as fast; elsewhere the whole chunk, for few kernels.
LOSS_CHUNK_SIZE = {"cpu": 16, "default": 1024}


class LMHeadInputs(NamedTuple):
    """Logits before their projection: `hidden` `(tokens, d_model)`, `weight` `(vocabulary, d_model)`."""

    hidden: Tensor
    weight: Tensor

    def in_compute_dtype(self) -> "LMHeadInputs":
        """In the dtype that autocast, if it is on here, would multiply them in; cast once and not once a chunk."""
        device = self.hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return LMHeadInputs(self.hidden.to(dtype), self.weight.to(dtype))


@contextlib.contextmanager
def capture_lm_head_inputs(
    model: WhisperForConditionalGeneration, real: Tensor, keep_logits: bool = False
) -> Iterator[list[LMHeadInputs]]:
    """Within it, `model` notes what it would project at the positions of the `(batch, tokens)` mask, and does not.

    Unless `keep_logits`, its logits are empty. As a hook it works through DDP and autocast wrappers, and notes the
    weights that `functional_call` puts in the projection's place.
    """
    captured: list[LMHeadInputs] = []

    def note(projection: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        hidden = args[0][real]
        captured.append(LMHeadInputs(hidden, projection.weight))
        return None if keep_logits else (hidden[:0],)

    hook = model.proj_out.register_forward_pre_hook(note)
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
    gradient_scale: float = 1.0,
    **options: Any,
) -> tuple[Tensor, LossTerms]:
    """`objective.distillation_loss` of logits that are never there all at once.

    Args:
        student: of the label tokens, the positions where `labels != -100` only.
        labels: `(tokens,)`.
        teacher, self_teacher: the soft targets at the same tokens.
        teacher_mask: `(tokens,)` bool; default: all.
        gradient_scale: the gradient is kept multiplied by it until the backward pass: in float16 the loss scale over
            the number of tokens, or small gradients are lost.
        options: the other arguments of `blend`.

    Returns: the objective summed over tokens, with its gradient (for one backward pass), and the terms at every token
        without one.
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
    """The objective on one chunk of logits after another. Notes the terms."""

    def __init__(
        self,
        labels: Tensor,
        targets: dict[str, LMHeadInputs | TopK],
        teacher_mask: Tensor | None,
        options: dict[str, Any],
        gradient_scale: float,
    ):
        self.labels, self.targets, self.options, self.gradient_scale = labels, targets, options, gradient_scale
        self.teacher_mask = teacher_mask
        # one tensor a term, filled row by row: small ones kept between the chunks would break up malloc's free blocks
        self.terms: dict[str, Tensor] = {}

    def slices(self, hidden: Tensor) -> Iterator[slice]:
        return _slices(len(hidden), LOGITS_CHUNK_SIZE, hidden.device)

    def loss(self, logits: Tensor, chunk: slice, with_gradient: bool = False) -> Tensor:
        """The sum over a chunk of logits, `(tokens, vocabulary)`; their place is taken by their gradient, if asked."""
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
    """The sum of `_Chunks.blend` over hidden @ weight.T, with the gradients of both worked out at once."""

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
                # here `logits` holds their gradient
                if of_hidden:
                    ctx.hidden_gradient[chunk] = (logits @ w).to(hidden.dtype)
                if of_weight and ctx.weight_gradient is None:
                    ctx.weight_gradient = (logits.T @ h[chunk]).to(weight.dtype)
                elif of_weight and w.dtype == weight.dtype:
                    ctx.weight_gradient.addmm_(logits.T, h[chunk])
                elif of_weight:  # half precision: added up in the weight's own
                    ctx.weight_gradient += logits.T @ h[chunk]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.gradient_scale is None:
            raise RuntimeError("the gradient of the objective is worked out for one backward pass only")
        # handed on and scaled in place, as the weight's is the largest tensor of the step
        gradient = gradient / ctx.gradient_scale
        both = ctx.hidden_gradient, ctx.weight_gradient
        of_hidden, of_weight = (g if g is None else g.mul_(gradient) for g in both)
        ctx.gradient_scale = ctx.hidden_gradient = ctx.weight_gradient = None
        return of_hidden, of_weight, None


def _slices(length: int, at_once: dict[str, int], device: torch.device) -> Iterator[slice]:
    size = at_once.get(device.type, at_once["default"])
    return (slice(start, start + size) for start in range(0, max(length, 1), size))
