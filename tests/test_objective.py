"""The objective against float64 numpy/scipy written from the formulas, and its gradient against finite differences."""

import numpy as np
import pytest
import torch
from formulas import numpy_blend, numpy_divergence
from scipy.special import log_softmax, logsumexp

from askd_hf.objective import DIVERGENCES, TopK, distillation_loss

TOKENS, VOCABULARY = 7, 11


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    student, teacher, self_ = (3.0 * rng.standard_normal((TOKENS, VOCABULARY)) for _ in range(3))
    return student, teacher, self_, rng.integers(0, VOCABULARY, TOKENS)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight_teacher_by_label_prob", [False, True])
@pytest.mark.parametrize(("a", "b"), [(0.8, 0.0), (0.0, 0.3), (0.5, 0.4), (0.0, 0.0)])
def test_the_whole_objective_is_its_formula(logits, name, temperature, weight_teacher_by_label_prob, a, b):
    student, teacher, self_, labels = logits
    options = dict(temperature=temperature, mix=0.3, weight_teacher_by_label_prob=weight_teacher_by_label_prob)
    expected = numpy_blend(student, labels, teacher, self_, a, b, temperature, name, 0.3, weight_teacher_by_label_prob)

    def ours(student_logits):
        return distillation_loss(
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
        args = (labels, teacher, self_, a, b, temperature, name, 0.3, weight_teacher_by_label_prob)
        difference = numpy_blend(student + nudge, *args).sum() - numpy_blend(student - nudge, *args).sum()
        assert logits32.grad[token, word].item() == pytest.approx(difference / (2 * step), rel=1e-3, abs=1e-4)


def test_terms_are_per_token_and_only_the_total_has_a_gradient(logits):
    student, teacher, _, labels = (torch.from_numpy(x) for x in logits)
    student = student.requires_grad_()
    terms = distillation_loss(student, labels, teacher=teacher, teacher_weight=0.5, temperature=2.0)
    measured = terms.measured()
    assert set(measured) == {"total", "ce", "teacher", "teacher_ce", "top1_agreement"}
    assert all(term.shape == (TOKENS,) and not term.requires_grad for term in measured.values())
    torch.testing.assert_close(measured["total"], 0.5 * measured["ce"] + 0.5 * measured["teacher"])
    expected = (teacher.argmax(-1) == student.argmax(-1)).float()
    torch.testing.assert_close(measured["top1_agreement"], expected)


def test_a_divergence_from_itself_is_zero(logits):
    student = torch.from_numpy(logits[0])
    for name, divergence in DIVERGENCES.items():
        log_probs = torch.log_softmax(student, -1)
        assert divergence(log_probs, log_probs, 0.3).abs().max() < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(logits, dtype):
    student, teacher, _, labels = (torch.from_numpy(x) for x in logits)
    half = distillation_loss(student.to(dtype), labels, teacher=teacher.to(dtype), teacher_weight=0.5, temperature=2.0)
    same_values = distillation_loss(
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
        distillation_loss(student, labels, teacher_weight=0.5)
    with pytest.raises(ValueError, match=r"self weight is 0\.5"):
        distillation_loss(student, labels, self_weight=0.5)


def test_trust_gives_what_it_takes_from_a_mistaken_teacher_to_the_labels():
    labels = torch.tensor([0, 0])
    sure_and_wrong, sure_and_right = torch.tensor([[0.0, 30.0], [30.0, 0.0]])
    student = torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    teacher = torch.stack([sure_and_wrong, sure_and_right])
    terms = distillation_loss(student, labels, teacher=teacher, teacher_weight=1.0, weight_teacher_by_label_prob=True)
    torch.testing.assert_close(terms.total[0], terms.ce[0])
    torch.testing.assert_close(terms.total[1], terms.teacher[1])


@pytest.mark.parametrize("soft", ["top k", "full"])
@pytest.mark.parametrize("weight_teacher_by_label_prob", [False, True])
def test_on_clips_without_speech_the_teachers_share_goes_to_the_labels(logits, weight_teacher_by_label_prob, soft):
    student, teacher, self_, labels = logits
    trusted = np.array([True, False, False, True, True, False, True])
    target, trusted_tensor = torch.from_numpy(teacher), torch.from_numpy(trusted)
    if soft == "top k":  # all but one, which is no less than all
        target = TopK.from_logits(target, torch.from_numpy(labels), VOCABULARY - 1, 2.0)

    def ours(logits, target, a, b, trusted):
        soft_targets = dict(teacher=target, self_teacher=torch.from_numpy(self_), teacher_weight=a, self_weight=b)
        options = dict(
            temperature=2.0, weight_teacher_by_label_prob=weight_teacher_by_label_prob, teacher_mask=trusted
        )
        return distillation_loss(logits, torch.from_numpy(labels), **soft_targets, **options)

    for a, b in ((1.0, 0.0), (0.5, 0.4)):
        leaf = torch.from_numpy(student).float().requires_grad_()
        terms = ours(leaf, target, a, b, trusted_tensor)
        of_speech = numpy_blend(
            student, labels, teacher, self_, a, b, 2.0, "forward_kl", 0.5, weight_teacher_by_label_prob, trusted
        )
        np.testing.assert_allclose(terms.total.detach(), of_speech, rtol=1e-4, atol=1e-5)
        # the gradient is that of the labels, and of the self-teacher, alone; elsewhere the mask changes nothing
        (gradient,) = torch.autograd.grad(terms.total.sum(), leaf)
        (without,) = torch.autograd.grad(ours(leaf, target, 0.0, b, None).total.sum(), leaf)
        (everywhere,) = torch.autograd.grad(ours(leaf, target, a, b, None).total.sum(), leaf)
        torch.testing.assert_close(gradient, torch.where(trusted_tensor[:, None], everywhere, without))
        assert (everywhere - without).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_cross_entropy_is_the_usual_one_whether_or_not_it_shares_the_log_softmax(logits, temperature, with_self):
    student, teacher, self_, labels = (torch.from_numpy(x) for x in logits)
    expected = torch.nn.functional.cross_entropy(student.float(), labels, reduction="none")
    soft = dict(self_teacher=self_, self_weight=0.3) if with_self else dict(teacher=teacher, teacher_weight=0.3)
    for targets in ({}, soft):
        terms = distillation_loss(student, labels, temperature=temperature, **targets)
        torch.testing.assert_close(terms.ce, expected, rtol=1e-6, atol=1e-6)


# ---- the most probable tokens and a rest ----


def numpy_coarse(logits, token_ids):
    """The probabilities of the chosen tokens and, last, of all others together; float64."""
    chosen = np.take_along_axis(logits, token_ids, axis=-1)
    others = logits.copy()
    np.put_along_axis(others, token_ids, -np.inf, axis=-1)
    coarse = np.concatenate([chosen, logsumexp(others, axis=-1, keepdims=True)], axis=-1)
    return coarse - logsumexp(logits, axis=-1, keepdims=True)


def divergence_from(target, student, labels, name, temperature=1.0, mix=0.3):
    terms = distillation_loss(
        student, labels, teacher=target, temperature=temperature, mix=mix, divergence=DIVERGENCES[name]
    )
    return terms.teacher


def random_pair(seed: int, vocabulary: int = 30):
    """Logits of a teacher and of a student that is near or far from it, both anything from flat to sharp."""
    rng = np.random.default_rng(seed)
    teacher, noise = rng.standard_normal((2, TOKENS, vocabulary)) * rng.choice([0.1, 1.0, 5.0, 15.0], (2, TOKENS, 1))
    student = noise + rng.choice([0.0, 1.0], (TOKENS, 1)) * teacher
    return torch.from_numpy(teacher), torch.from_numpy(student), torch.from_numpy(rng.integers(0, vocabulary, TOKENS))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1])
def test_the_most_probable_tokens_are_kept_with_their_probabilities(logits, temperature, k):
    _, teacher, _, labels = logits
    target = TopK.from_logits(torch.from_numpy(teacher), torch.from_numpy(labels), k, temperature)
    token_ids = np.argsort(-teacher, axis=-1)[:, :k]
    np.testing.assert_array_equal(target.token_ids, token_ids)
    coarse = numpy_coarse(teacher / temperature, token_ids)
    np.testing.assert_allclose(target.log_probs, coarse[:, :-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target.log_rest, coarse[:, -1], rtol=1e-5, atol=1e-6)
    # at temperature 1, and also of labels that aren't among the k
    expected = log_softmax(teacher, axis=-1)[np.arange(TOKENS), labels]
    np.testing.assert_allclose(target.label_log_prob, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9])
def test_the_divergence_of_k_tokens_is_a_lower_bound_that_rises_with_k(name, mix):
    for seed in range(20):
        teacher, student, labels = random_pair(seed)
        temperature = 1.0 + seed % 2
        full = divergence_from(teacher, student, labels, name, temperature, mix)
        below = torch.zeros(TOKENS)
        rises = 0
        for k in (1, 2, 5, 12, 28, 29):
            target = TopK.from_logits(teacher, labels, k, temperature)
            divergence = divergence_from(target, student, labels, name, temperature, mix)
            slack = 1e-5 + 1e-5 * full
            assert (divergence <= full + slack).all() and (divergence >= below - slack).all(), (seed, k)
            rises += (divergence > below + slack).sum()
            below = divergence
        torch.testing.assert_close(divergence, full, rtol=1e-5, atol=1e-5)  # a rest of one token
        assert rises > TOKENS


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_bound_is_tight_where_the_rest_is_shared_out_alike(name):
    teacher, student, labels = random_pair(3)
    target = TopK.from_logits(teacher, labels, 4, 2.0)
    rest = torch.ones_like(teacher).scatter(-1, target.token_ids, 0.0).bool()
    student = torch.where(rest, teacher - 1.7, student)
    full = divergence_from(teacher, student, labels, name, 2.0)
    torch.testing.assert_close(divergence_from(target, student, labels, name, 2.0), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("rest", [0.5, 1e-3, 1e-9], ids=lambda mass: f"the student's rest {mass}")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_and_gradient_of_k_tokens_are_those_of_finite_differences(name, rest, temperature):
    """Also where 1 - (the sum of the k) would be nothing but rounding."""
    k, mix = 3, 0.3
    rng = np.random.default_rng(7)
    teacher, student = 2.0 * rng.standard_normal((2, TOKENS, VOCABULARY))
    labels = rng.integers(0, VOCABULARY, TOKENS)
    target = TopK.from_logits(torch.from_numpy(teacher), torch.from_numpy(labels), k, temperature)
    ids = target.token_ids.numpy()
    # the student's probability of all others is `rest`
    coarse = numpy_coarse(student / temperature, ids)
    shift = np.log(rest / (1 - rest)) - (coarse[:, -1:] - np.log1p(-np.exp(coarse[:, -1:])))
    moved = student + temperature * shift
    np.put_along_axis(moved, ids, np.take_along_axis(student, ids, axis=-1), axis=-1)
    student = moved.astype(np.float32).astype(np.float64)
    assert np.exp(numpy_coarse(student / temperature, ids)[:, -1]) == pytest.approx(rest, rel=1e-4)

    def plain(logits):
        p, q = (np.exp(numpy_coarse(x / temperature, ids)) for x in (teacher, logits))
        return temperature**2 * numpy_divergence(name, p, q, mix)

    ours = torch.from_numpy(student).float().requires_grad_()
    terms = distillation_loss(
        ours,
        torch.from_numpy(labels),
        teacher=target,
        teacher_weight=1.0,
        temperature=temperature,
        divergence=DIVERGENCES[name],
        mix=mix,
    )
    np.testing.assert_allclose(terms.teacher.detach(), plain(student), rtol=2e-5, atol=1e-6)
    terms.total.sum().backward()
    step = 1e-5
    differences = np.zeros_like(student)
    for word in range(VOCABULARY):
        nudge = step * np.eye(VOCABULARY)[word]
        differences[:, word] = (plain(student + nudge) - plain(student - nudge)) / (2 * step)
    np.testing.assert_allclose(ours.grad, differences, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("soft", ["top k", "full"])
def test_extreme_logits_give_no_nan(name, soft):
    sharp = torch.zeros(6, VOCABULARY)
    sharp[0, 3] = 200.0
    sharp[1] = -200.0 * torch.arange(VOCABULARY)
    sharp[2, 0], sharp[2, 1] = 1e4, -1e4
    sharp[3] = 1e4
    sharp[4] = -1e4
    sharp[5, :5], sharp[5, 5:] = 100.0, -100.0
    labels = torch.arange(6)
    for teacher in (sharp, sharp.flip(-1), sharp.roll(1, 0), torch.zeros_like(sharp)):
        target = TopK.from_logits(teacher, labels, 4, 1.0) if soft == "top k" else teacher
        student = sharp.clone().requires_grad_()
        options = dict(teacher=target, teacher_weight=0.5, divergence=DIVERGENCES[name], mix=0.5)
        for weight_teacher_by_label_prob in (False, True):
            terms = distillation_loss(
                student, labels, weight_teacher_by_label_prob=weight_teacher_by_label_prob, **options
            )
            assert all(term.isfinite().all() for term in terms.measured().values())
            (gradient,) = torch.autograd.grad(terms.total.sum(), student)
            assert gradient.isfinite().all()
        full = divergence_from(teacher, sharp, labels, name, mix=0.5)
        # float32 has a step of 0.001 at 1e4
        assert (terms.teacher <= full * (1 + 1e-5) + 1e-3).all() and (terms.teacher >= -1e-6).all()


def test_cached_log_probs_are_normalized_anew():
    """Half precision takes the sum of the probabilities away from 1, which a divergence would see as a difference."""
    for seed in range(10):
        teacher, student, labels = random_pair(seed)
        exact = TopK.from_logits(teacher, labels, 8, 2.0)
        half = exact._replace(log_probs=exact.log_probs.half())
        higher = exact._replace(log_probs=exact.log_probs + 0.7, log_rest=exact.log_rest + 0.7)
        expected = divergence_from(exact, student, labels, "forward_kl", 2.0)
        torch.testing.assert_close(
            divergence_from(higher, student, labels, "forward_kl", 2.0), expected, rtol=1e-5, atol=1e-5
        )
        rounded = divergence_from(half, student, labels, "forward_kl", 2.0)
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, expected, rtol=5e-3, atol=5e-3)
        of_itself = divergence_from(half, teacher, labels, "forward_kl", 2.0)
        assert (of_itself > -1e-5).all() and (of_itself < 1e-4).all()


@pytest.mark.parametrize("weight_teacher_by_label_prob", [False, True])
def test_k_tokens_take_the_place_of_logits_in_the_whole_objective(logits, weight_teacher_by_label_prob):
    """Trust, the teacher's cross-entropy and the agreement need no more than is kept."""
    student, teacher, self_, labels = (torch.from_numpy(x) for x in logits)
    options = dict(
        self_teacher=self_,
        teacher_weight=0.5,
        self_weight=0.3,
        temperature=2.0,
        weight_teacher_by_label_prob=weight_teacher_by_label_prob,
    )
    full = distillation_loss(student, labels, teacher=teacher, **options).measured()
    all_but_one = TopK.from_logits(teacher, labels, VOCABULARY - 1, 2.0)
    torch.testing.assert_close(distillation_loss(student, labels, teacher=all_but_one, **options).measured(), full)
    one = distillation_loss(student, labels, teacher=TopK.from_logits(teacher, labels, 1, 2.0), **options).measured()
    for name in ("ce", "self", "teacher_ce", "top1_agreement"):
        torch.testing.assert_close(one[name], full[name])
    assert (one["teacher"] < full["teacher"]).all()
