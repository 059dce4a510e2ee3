"""The objective against float64 numpy/scipy written from the formulas, and its gradient against finite differences."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from askd_hf.objective import DIVERGENCES, blend

TOKENS, VOCABULARY = 7, 11


def numpy_divergence(name, p, q, mix):
    if name == "forward_kl":
        return rel_entr(p, q).sum(-1)
    if name == "reverse_kl":
        return rel_entr(q, p).sum(-1)
    m = mix * p + (1 - mix) * q
    if name == "jensen_shannon":
        return mix * rel_entr(p, m).sum(-1) + (1 - mix) * rel_entr(q, m).sum(-1)
    return rel_entr(p, m).sum(-1)


def numpy_blend(student, labels, teacher, self_, a, b, temperature, name, mix, trust_label):
    rows = np.arange(len(labels))
    ce = -log_softmax(student, axis=-1)[rows, labels]
    g = softmax(teacher, axis=-1)[rows, labels] if trust_label else 1.0
    q = softmax(student / temperature, axis=-1)
    d_teacher = temperature**2 * numpy_divergence(name, softmax(teacher / temperature, axis=-1), q, mix)
    d_self = temperature**2 * numpy_divergence(name, softmax(self_ / temperature, axis=-1), q, mix)
    return (1 - a * g - b) * ce + a * g * d_teacher + b * d_self


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    student, teacher, self_ = (3.0 * rng.standard_normal((TOKENS, VOCABULARY)) for _ in range(3))
    return student, teacher, self_, rng.integers(0, VOCABULARY, TOKENS)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("trust_label", [False, True])
@pytest.mark.parametrize(("a", "b"), [(0.8, 0.0), (0.0, 0.3), (0.5, 0.4), (0.0, 0.0)])
def test_the_whole_objective_is_its_formula(logits, name, temperature, trust_label, a, b):
    student, teacher, self_, labels = logits
    options = dict(temperature=temperature, mix=0.3, trust_label=trust_label)
    expected = numpy_blend(student, labels, teacher, self_, a, b, temperature, name, 0.3, trust_label)

    def ours(student_logits):
        return blend(
            student_logits,
            torch.from_numpy(labels),
            teacher=torch.from_numpy(teacher),
            self_teacher=torch.from_numpy(self_),
            teacher_weight=a,
            self_weight=b,
            divergence=DIVERGENCES[name],
            **options,
        ).total

    logits32 = torch.from_numpy(student).float().requires_grad_()
    total = ours(logits32)
    assert total.dtype == torch.float32
    np.testing.assert_allclose(total.detach().numpy(), expected, rtol=1e-4, atol=1e-5)

    total.sum().backward()
    step = 1e-5
    for token, word in [(0, 0), (3, int(labels[3])), (6, 10)]:
        nudge = np.zeros_like(student)
        nudge[token, word] = step
        args = (labels, teacher, self_, a, b, temperature, name, 0.3, trust_label)
        difference = numpy_blend(student + nudge, *args).sum() - numpy_blend(student - nudge, *args).sum()
        assert logits32.grad[token, word].item() == pytest.approx(difference / (2 * step), rel=1e-3, abs=1e-4)


def test_terms_are_per_token_and_only_the_total_has_a_gradient(logits):
    student, teacher, _, labels = (torch.from_numpy(x) for x in logits)
    student = student.requires_grad_()
    terms = blend(student, labels, teacher=teacher, teacher_weight=0.5, temperature=2.0)
    measured = terms.measured()
    assert set(measured) == {"total", "ce", "teacher", "teacher_ce", "agreement"}
    assert all(term.shape == (TOKENS,) and not term.requires_grad for term in measured.values())
    torch.testing.assert_close(measured["total"], 0.5 * measured["ce"] + 0.5 * measured["teacher"])
    expected = (teacher.argmax(-1) == student.argmax(-1)).float()
    torch.testing.assert_close(measured["agreement"], expected)


def test_a_divergence_from_itself_is_zero(logits):
    student = torch.from_numpy(logits[0])
    for name, divergence in DIVERGENCES.items():
        log_probs = torch.log_softmax(student, -1)
        assert divergence(log_probs, log_probs, 0.3).abs().max() < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(logits, dtype):
    student, teacher, _, labels = (torch.from_numpy(x) for x in logits)
    half = blend(student.to(dtype), labels, teacher=teacher.to(dtype), teacher_weight=0.5, temperature=2.0)
    same_values = blend(
        student.to(dtype).double(),
        labels,
        teacher=teacher.to(dtype).double(),
        teacher_weight=0.5,
        temperature=2.0,
    )
    assert half.total.dtype == torch.float32
    torch.testing.assert_close(half.total, same_values.total, rtol=1e-6, atol=1e-6)


def test_a_weight_without_logits_is_refused(logits):
    student, _, _, labels = (torch.from_numpy(x) for x in logits)
    with pytest.raises(ValueError, match=r"teacher weight is 0\.5"):
        blend(student, labels, teacher_weight=0.5)
    with pytest.raises(ValueError, match=r"self weight is 0\.5"):
        blend(student, labels, self_weight=0.5)


def test_trust_gives_what_it_takes_from_a_mistaken_teacher_to_the_labels():
    labels = torch.tensor([0, 0])
    sure_and_wrong, sure_and_right = torch.tensor([[0.0, 30.0], [30.0, 0.0]])
    student = torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    teacher = torch.stack([sure_and_wrong, sure_and_right])
    terms = blend(student, labels, teacher=teacher, teacher_weight=1.0, trust_label=True)
    torch.testing.assert_close(terms.total[0], terms.ce[0])
    torch.testing.assert_close(terms.total[1], terms.teacher[1])
