"""The ASKD objective as pure functions of logits, labels and weights.

    L = sum_i [ (1 - a*g_i - b) * CE_i + a*g_i * T^2*D(teacher_i || student_i) + b * T^2*D(self_i || student_i) ] / N

over the `N` label tokens of one update. `a` is the weight on the teacher, `b` the weight on the self-teacher, `T` the
temperature, `g_i` the trust in the teacher at token `i`, `D` one of the divergences below. Everything here is per
token and in float32 whatever the models' dtype; the sum and the division by `N` are the trainer's, because `N` counts
the tokens of all accumulation steps and processes.

To add a divergence, write a function of (target log-probs, student log-probs, mix) and name it in `DIVERGENCES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, float], Tensor]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row of two `(tokens, vocabulary)` log-probabilities."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, p_share: float) -> Tensor:
    """log(p_share * p + (1 - p_share) * q), without leaving log space. `p_share` is strictly between 0 and 1."""
    log_share = log_p.new_tensor(p_share).log()
    log_rest = log_p.new_tensor(1.0 - p_share).log()
    return torch.logaddexp(log_p + log_share, log_q + log_rest)


def forward_kl(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """KL(target || student), Hinton et al. 2015: mass-covering, the student must explain all the target believes."""
    return _kl(target, student)


def reverse_kl(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """KL(student || target): mode-seeking, the student may drop what it can't afford."""
    return _kl(student, target)


def jensen_shannon(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """beta*KL(target || m) + (1-beta)*KL(student || m), m = beta*target + (1-beta)*student, beta = `mix`.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, section 2); symmetric at `mix` 0.5.
    """
    mixture = _log_mixture(target, student, mix)
    return mix * _kl(target, mixture) + (1.0 - mix) * _kl(student, mixture)


def skewed_kl(target: Tensor, student: Tensor, mix: float) -> Tensor:
    """KL(target || alpha*target + (1-alpha)*student), alpha = `mix` (DistiLLM, Ko et al. 2024, section 3.1)."""
    return _kl(target, _log_mixture(target, student, mix))


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
}
DIVERGENCES_WITH_MIX = ("jensen_shannon", "skewed_kl")


def soft_target_loss(
    target_logits: Tensor, student_logits: Tensor, temperature: float, divergence: Divergence, mix: float
) -> Tensor:
    """T^2 * D(softmax(target / T) || softmax(student / T)) for each token.

    T^2 keeps the size of the gradient when the temperature changes (Hinton et al. 2015, section 2).

    Args:
        target_logits: `(tokens, vocabulary)`, of the teacher or the self-teacher; no gradient flows into it.
        student_logits: `(tokens, vocabulary)`.

    Returns: `(tokens,)` float32.
    """
    target = F.log_softmax(target_logits.detach().float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return temperature**2 * divergence(target, student, mix)


@dataclass
class BlendTerms:
    """The terms of the objective for each label token, `(tokens,)` float32 each; None where a model wasn't run.

    Only `total` carries a gradient.
    """

    total: Tensor
    ce: Tensor
    teacher: Tensor | None = None
    """T^2 * D(teacher || student)"""
    self: Tensor | None = None
    """T^2 * D(self || student)"""
    teacher_ce: Tensor | None = None
    """the teacher's own cross-entropy on the labels, at temperature 1"""
    agreement: Tensor | None = None
    """1 where student and teacher have the same most probable token, else 0"""

    def measured(self) -> dict[str, Tensor]:
        """The terms that exist, by name, detached."""
        return {name: term.detach() for name, term in vars(self).items() if term is not None}


def blend(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    self_logits: Tensor | None = None,
    teacher_weight: float = 0.0,
    self_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
    mix: float = 0.5,
    trust_label: bool = False,
) -> BlendTerms:
    """The objective at every label token, before the sum over tokens and the division by their number.

    Args:
        student_logits: `(tokens, vocabulary)`, the positions where `labels != -100` only.
        labels: `(tokens,)`, the token that each position should predict.
        teacher_logits, self_logits: `(tokens, vocabulary)`; required where the weight isn't 0.
        teacher_weight: `a`, from 0 to 1.
        self_weight: `b`, from 0 to 1 - a.
        temperature: `T`, softens targets and student alike; the cross-entropy stays at temperature 1.
        mix: beta of the Jensen-Shannon divergence, alpha of the skewed KL.
        trust_label: `g_i` is the teacher's probability of the label rather than 1; what the teacher isn't trusted with
            goes to the labels, so a confident mistake of the teacher (a hallucination) isn't learnt.
    """
    for name, weight, logits in (("teacher", teacher_weight, teacher_logits), ("self", self_weight, self_logits)):
        if weight and logits is None:
            raise ValueError(f"the {name} weight is {weight} but there are no {name} logits")
    ce = F.cross_entropy(student_logits.float(), labels, reduction="none")
    terms = BlendTerms(total=ce, ce=ce)
    on_labels: Tensor | float = 1.0 - self_weight
    soft = torch.zeros_like(ce)
    if teacher_logits is not None:
        terms.teacher = soft_target_loss(teacher_logits, student_logits, temperature, divergence, mix)
        terms.teacher_ce = F.cross_entropy(teacher_logits.float(), labels, reduction="none").detach()
        terms.agreement = (teacher_logits.argmax(-1) == student_logits.argmax(-1)).float()
        on_teacher = teacher_weight * torch.exp(-terms.teacher_ce) if trust_label else teacher_weight
        on_labels = on_labels - on_teacher
        soft = soft + on_teacher * terms.teacher
    if self_logits is not None:
        terms.self = soft_target_loss(self_logits, student_logits, temperature, divergence, mix)
        soft = soft + self_weight * terms.self
    terms.total = on_labels * ce + soft
    return terms
