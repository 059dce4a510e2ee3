"""The ASKD objective, as pure functions of logits, labels and weights.

    L = sum_i [ (1 - a*g_i - b) * CE_i + a*g_i * T^2*D(teacher_i || student_i) + b * T^2*D(self_i || student_i) ] / N

over the `N` label tokens of one update. `a` is the teacher weight, `b` the self-teacher weight, `T` the temperature,
`g_i` the factor of the teacher weight at token `i`, `D` one of the divergences below. `g_i` is 0 on clips without
speech: their empty labels are known to be right, and text that the teacher makes up there isn't learned. On other
clips `g_i` is 1, or the teacher's probability of the label.

All functions return values per token, in float32 for models of any dtype. The trainer computes the sum and divides by
`N`, because `N` counts the tokens of all accumulation steps and processes.

To add a divergence, write a function of (target log-probs, student log-probs, mix) and add it with its formula to
`DIVERGENCES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

DivergenceFunction = Callable[[Tensor, Tensor, float], Tensor]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of `(tokens, vocabulary)` log-probabilities, `(tokens,)`."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, p_share: float) -> Tensor:
    """Return log(p_share * p + (1 - p_share) * q), computed in log space. `p_share` is strictly between 0 and 1."""
    # numbers of Python: to copy a tensor from the CPU would wait for the GPU
    return torch.logaddexp(log_p + math.log(p_share), log_q + math.log(1.0 - p_share))


def forward_kl(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """KL(target || student) (Hinton et al. 2015). Mass-covering: the student needs mass where the target has some."""
    return _kl(target, student)


def reverse_kl(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """KL(student || target). Mode-seeking: the student may ignore some of the target's modes."""
    return _kl(student, target)


def jensen_shannon(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """beta*KL(target || m) + (1-beta)*KL(student || m), m = beta*target + (1-beta)*student, beta = `mix`.

    The generalized Jensen-Shannon divergence of GKD (Agarwal et al. 2024, section 2). Symmetric at `mix` 0.5.
    """
    mixture = _log_mixture(target, student, mix)
    return mix * _kl(target, mixture) + (1.0 - mix) * _kl(student, mixture)


def skewed_kl(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """KL(target || alpha*target + (1-alpha)*student), alpha = `mix` (DistiLLM, Ko et al. 2024, section 3.1)."""
    return _kl(target, _log_mixture(target, student, mix))


class Divergence(NamedTuple):
    """A divergence that the option can choose."""

    function: DivergenceFunction
    formula: str  # for the model card, with {target}, {student} and, if the function uses `mix`, {mix}

    @property
    def uses_mix(self) -> bool:
        return "{mix}" in self.formula

    def __call__(self, target: Tensor, student: Tensor, mix: float) -> Tensor:
        return self.function(target, student, mix)


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl, "KL({target} ‖ {student})"),
    "reverse_kl": Divergence(reverse_kl, "KL({student} ‖ {target})"),
    "jensen_shannon": Divergence(jensen_shannon, "JSD_{mix}({target} ‖ {student})"),
    "skewed_kl": Divergence(skewed_kl, "KL({target} ‖ {mix}·{target} + (1 - {mix})·{student})"),
}


class TopK(NamedTuple):
    """A soft target made of the k most probable tokens and the total probability of all other tokens.

    Every divergence above is an f-divergence, which never increases if events are merged (data-processing inequality).
    The divergence over the k + 1 events "token 1", ..., "token k", "any other token" is therefore a lower bound of the
    divergence over the vocabulary. They are equal if the other tokens have the same proportions in target and student.

    Attributes:
        token_ids: `(tokens, k)` int64, the most probable first. k is less than the size of the vocabulary.
        log_probs: `(tokens, k)`, their log-probabilities at the temperature of the objective.
        log_rest: `(tokens,)`, the log of the total probability of all other tokens, at that temperature.
        label_log_prob: `(tokens,)`, the log-probability of the label at temperature 1.
    """

    token_ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    label_log_prob: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, labels: Tensor, k: int, temperature: float) -> "TopK":
        """Return the soft target of `(tokens, vocabulary)` logits and `(tokens,)` labels."""
        logits = logits.float()
        token_ids = logits.topk(k).indices
        log_probs = _coarse_log_probs(logits, token_ids, temperature)
        return cls(token_ids, log_probs[:, :-1], log_probs[:, -1], -F.cross_entropy(logits, labels, reduction="none"))

    def rows(self, rows: slice) -> "TopK":
        return TopK(*(column[rows] for column in self))


SoftTarget = Tensor | TopK
"""`(tokens, vocabulary)` logits, or their k most probable tokens."""


class _CoarseLogits(torch.autograd.Function):
    """Reduce `(tokens, vocabulary)` logits to `(tokens, k + 1)`: logits / T of `token_ids`, logsumexp of the others.

    The others are summed directly: 1 - sum(probabilities of `token_ids`) would lose precision if they are improbable.
    Custom backward: autograd would need five more passes over the vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
        peak = logits.amax(-1, keepdim=True)
        others = (logits - peak).div_(temperature).exp_().scatter_(-1, token_ids, 0.0)
        # the others underflow to 0 if they are 100 nats below the peak; the clamp keeps the log finite
        mass = others.sum(-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).tiny)
        ctx.save_for_backward(others, mass, token_ids)
        ctx.temperature = temperature
        return torch.cat([logits.gather(-1, token_ids), peak + temperature * mass.log()], dim=-1) / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        others, mass, token_ids = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        return (others * (gradient[:, -1:] / mass)).scatter_(-1, token_ids, gradient[:, :-1]), None, None


def _coarse_log_probs(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of `token_ids`, then of all other tokens together, `(tokens, k + 1)`."""
    return F.log_softmax(_CoarseLogits.apply(logits, token_ids, temperature), dim=-1)


@dataclass
class LossTerms:
    """The terms of the objective at each label token, `(tokens,)` float32 each. None if the model wasn't run.

    Only `total` has a gradient.
    """

    total: Tensor
    ce: Tensor
    teacher: Tensor | None = None
    """T^2 * D(teacher || student)"""
    self: Tensor | None = None
    """T^2 * D(self || student)"""
    teacher_ce: Tensor | None = None
    """the teacher's cross-entropy on the labels, at temperature 1"""
    top1_agreement: Tensor | None = None
    """1 where student and teacher have the same most probable token, else 0"""
    hidden: Tensor | None = None
    """the hidden-state loss of the token's clip (`hidden_state_loss`), added by the trainer"""

    def measured(self) -> dict[str, Tensor]:
        """Return the terms that aren't None, by name and detached."""
        return {name: term.detach() for name, term in vars(self).items() if term is not None}


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher: SoftTarget | None = None,
    self_teacher: SoftTarget | None = None,
    teacher_weight: float = 0.0,
    self_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: DivergenceFunction = forward_kl,
    mix: float = 0.5,
    weight_teacher_by_label_prob: bool = False,
    teacher_mask: Tensor | None = None,
) -> LossTerms:
    """Return the objective at every label token, before the sum over tokens and the division by their number.

    The factor T^2 keeps the gradient of a soft target at the same scale for every temperature (Hinton et al. 2015,
    section 2). The targets get no gradient.

    Args:
        student_logits: `(tokens, vocabulary)`, at the positions with a label only.
        labels: `(tokens,)`, without -100.
        teacher, self_teacher: the soft targets. Required if their weight isn't 0.
        teacher_weight: `a`, 0 to 1.
        self_weight: `b`, 0 to 1 - a.
        temperature: `T`, of targets and student. The cross-entropy has temperature 1.
        mix: beta of the Jensen-Shannon divergence, alpha of the skewed KL.
        weight_teacher_by_label_prob: True if `g_i` is the teacher's probability of the label rather than 1. The rest
            of the teacher weight is added to the label's, so that a hallucination of the teacher isn't learned.
        teacher_mask: `(tokens,)` bool, False on clips without speech. `g_i` is multiplied by it. Default: all True.

    Raises `ValueError` if a weight isn't 0, and its target is None.
    """
    for name, weight, target in (("teacher", teacher_weight, teacher), ("self", self_weight, self_teacher)):
        if weight and target is None:
            raise ValueError(f"the {name} weight is {weight}, but the {name} target is None")
    student_logits = student_logits.float()
    log_probs = None  # shared by the terms that need the whole vocabulary
    if isinstance(teacher, Tensor) or isinstance(self_teacher, Tensor):
        log_probs = F.log_softmax(student_logits / temperature, dim=-1)

    def loss(target: SoftTarget) -> Tensor:
        if isinstance(target, TopK):
            # normalize again: half precision has rounded them
            top_k = F.log_softmax(torch.cat([target.log_probs, target.log_rest[:, None]], dim=-1).float(), dim=-1)
            coarse = _coarse_log_probs(student_logits, target.token_ids, temperature)
            return temperature**2 * divergence(top_k, coarse, mix)
        assert log_probs is not None  # this target is a Tensor
        target_log_probs = F.log_softmax(target.detach().float() / temperature, dim=-1)
        return temperature**2 * divergence(target_log_probs, log_probs, mix)

    if temperature == 1.0 and log_probs is not None:
        ce = F.nll_loss(log_probs, labels, reduction="none")
    else:
        ce = F.cross_entropy(student_logits, labels, reduction="none")
    terms = LossTerms(total=ce, ce=ce)
    on_labels: Tensor | float = 1.0 - self_weight
    soft = torch.zeros_like(ce)
    if teacher is not None:
        terms.teacher = loss(teacher)
        terms.teacher_ce, best = _teacher_on_labels(teacher, labels)
        # amax is several times faster than argmax
        on_best = student_logits.detach().gather(-1, best[:, None])[:, 0]
        terms.top1_agreement = (on_best == student_logits.detach().amax(-1)).float()
        on_teacher = teacher_weight * torch.exp(-terms.teacher_ce) if weight_teacher_by_label_prob else teacher_weight
        if teacher_mask is not None:
            on_teacher = on_teacher * teacher_mask
        on_labels = on_labels - on_teacher
        soft = soft + on_teacher * terms.teacher
    if self_teacher is not None:
        terms.self = loss(self_teacher)
        soft = soft + self_weight * terms.self
    terms.total = on_labels * ce + soft
    return terms


@torch.no_grad()
def _teacher_on_labels(teacher: SoftTarget, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's cross-entropy on the labels and its most probable token, `(tokens,)` each."""
    if isinstance(teacher, TopK):
        return -teacher.label_log_prob.float(), teacher.token_ids[:, 0]
    return F.cross_entropy(teacher.float(), labels, reduction="none"), teacher.argmax(-1)


def hidden_state_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Return the relative squared error of the student's hidden states per clip, `(clips,)` float32.

    It is ||student - teacher||^2 / ||teacher||^2, averaged over layers: 0 for identical hidden states, 1 if the
    student's are all zero. Sums are in float32 for models of any dtype. The teacher gets no gradient.

    Args:
        student, teacher: the hidden states of each matched layer, `(clips, positions, width)`.
    """
    losses = []
    for student_states, teacher_states in zip(student, teacher, strict=True):
        # norms save no squares for the backward pass, and need no float32 copy of the teacher's states
        error = torch.linalg.vector_norm(student_states.float() - teacher_states.detach(), dim=(1, 2))
        size = torch.linalg.vector_norm(teacher_states.detach(), dim=(1, 2), dtype=torch.float32)
        losses.append((error / size).square())
    return torch.stack(losses).mean(0)
