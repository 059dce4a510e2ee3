"""The objective in chunks of tokens against the same on all logits at once, by autograd."""

import pytest
import torch
from models import make_whisper
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import Clips, collate

from askd_hf import projection
from askd_hf.objective import DIVERGENCES, TopK, distillation_loss
from askd_hf.projection import LMHeadInputs, capture_lm_head_inputs, chunked_distillation_loss, label_positions

CHUNK, ROWS = 4, 3  # tokens projected, and of these given to the objective, at once; 3 doesn't divide 4
VOCABULARY, WIDTH = 23, 6
TARGETS = {
    "labels": {},
    "top k": dict(teacher="top k"),
    "teacher": dict(teacher="full"),
    "self": dict(self_teacher="full"),
    "both": dict(teacher="full", self_teacher="full"),
    "top k and self": dict(teacher="top k", self_teacher="full"),
}
WEIGHTS = {"teacher": dict(teacher_weight=0.5), "self_teacher": dict(self_weight=0.3)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(projection.LOGITS_CHUNK_SIZE, "cpu", CHUNK)
    monkeypatch.setitem(projection.LOSS_CHUNK_SIZE, "cpu", ROWS)


class Case:
    """Random hidden states, labels and targets of so many tokens."""

    def __init__(self, tokens: int, targets: str = "both", dtype=torch.float32, seed: int = 0, **options):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = random(tokens, WIDTH).requires_grad_()
        self.weight = random(VOCABULARY, WIDTH).requires_grad_()
        self.labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
        self.options = dict(temperature=2.0, mix=0.3) | options
        self.targets = {}
        for name, kind in TARGETS[targets].items():
            # wider than the student, and of other weights
            target = LMHeadInputs(random(tokens, WIDTH + 2), random(VOCABULARY, WIDTH + 2))
            if kind == "top k":
                logits = target.hidden @ target.weight.T
                target = TopK.from_logits(logits, self.labels, 5, self.options["temperature"])
            self.targets[name] = target
            self.options |= WEIGHTS[name]

    def in_chunks(self):
        return chunked_distillation_loss(
            LMHeadInputs(self.hidden, self.weight), self.labels, **self.targets, **self.options
        )

    def at_once(self):
        targets = {n: t if isinstance(t, TopK) else t.hidden @ t.weight.T for n, t in self.targets.items()}
        terms = distillation_loss(self.hidden @ self.weight.T, self.labels, **targets, **self.options)
        return terms.total.sum(), terms

    def gradients(self, compute, scale: float = 1.0):
        self.hidden.grad = self.weight.grad = None
        total, terms = compute()
        (scale * total).backward()
        return total.detach(), terms.measured(), self.hidden.grad, self.weight.grad


def assert_same(case: Case, **tolerance):
    for got, expected in zip(case.gradients(case.in_chunks), case.gradients(case.at_once), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("targets", TARGETS)
def test_sum_terms_and_gradients_are_those_of_the_plain_computation(targets, temperature, divergence):
    options = dict(temperature=temperature, divergence=DIVERGENCES[divergence])
    for weight_teacher_by_label_prob in (False, True):
        for tokens in (1, CHUNK, CHUNK + 1, 5 * CHUNK + 2):
            case = Case(
                tokens, targets, weight_teacher_by_label_prob=weight_teacher_by_label_prob, seed=tokens, **options
            )
            total, terms, of_hidden, of_weight = case.gradients(case.in_chunks)
            names = {"total", "ce"} | {"self" for name in case.targets if name == "self_teacher"}
            names |= {name for name in ("teacher", "teacher_ce", "top1_agreement") if "teacher" in case.targets}
            assert set(terms) == names and all(term.shape == (tokens,) for term in terms.values())
            assert terms["total"].dtype == torch.float32 and not total.requires_grad
            assert of_hidden.abs().max() > 1e-3 and of_weight.abs().max() > 1e-3
            assert_same(case, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("weight_teacher_by_label_prob", [False, True])
def test_tokens_without_speech_stay_with_their_labels_in_any_chunk(targets, weight_teacher_by_label_prob):
    for tokens in (1, CHUNK + 1, 5 * CHUNK + 2):
        trusted = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens)) < 0.5
        case = Case(
            tokens,
            targets,
            weight_teacher_by_label_prob=weight_teacher_by_label_prob,
            seed=tokens,
            teacher_mask=trusted,
        )
        assert_same(case, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(case.in_chunks()[1].total, case.at_once()[1].total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", TARGETS)
def test_in_float64_only_the_order_of_the_sum_differs(targets):
    """The objective is float32 a token, the same in any chunk; what surrounds it is float64."""
    for tokens in (1, CHUNK + 1, 40):
        case = Case(tokens, targets, torch.float64)
        ours, plain = case.gradients(case.in_chunks), case.gradients(case.at_once)
        assert ours[2].dtype == ours[3].dtype == torch.float64
        torch.testing.assert_close(ours[1], plain[1], rtol=0, atol=0)
        torch.testing.assert_close(ours[2:], plain[2:], rtol=1e-12, atol=1e-12)


def test_the_sizes_of_the_chunks_change_nothing(monkeypatch):
    case = Case(11, "top k and self")
    expected = case.gradients(case.in_chunks)
    for projected, blended in ((1, 1), (2, 5), (11, 11), (12, 2), (1000, 1000)):
        monkeypatch.setitem(projection.LOGITS_CHUNK_SIZE, "cpu", projected)
        monkeypatch.setitem(projection.LOSS_CHUNK_SIZE, "cpu", blended)
        torch.testing.assert_close(case.gradients(case.in_chunks), expected, rtol=1e-5, atol=1e-6)


def test_no_tokens_at_all_are_a_sum_of_zero():
    total, terms, of_hidden, of_weight = (case := Case(0)).gradients(case.in_chunks)
    assert total == 0.0 and len(terms["total"]) == 0
    assert of_hidden.shape == (0, WIDTH) and torch.equal(of_weight, torch.zeros(VOCABULARY, WIDTH))


def test_the_gradient_is_scaled_by_what_comes_from_above():
    case = Case(10)
    once, scaled = (case.gradients(case.in_chunks, scale) for scale in (1.0, 0.37))
    for whole, part in zip(once[2:], scaled[2:], strict=True):
        torch.testing.assert_close(part, 0.37 * whole)


def test_two_batches_add_up_in_grad():
    """The gradients are scaled in place: those of the first batch must not change with the second's."""
    first, second = Case(10), Case(7, seed=1)
    second.weight = first.weight
    expected = sum(scale * case.gradients(case.at_once)[3] for scale, case in ((0.25, first), (0.75, second)))
    first.weight.grad = None
    totals = [case.in_chunks()[0] for case in (first, second)]
    (0.25 * totals[0]).backward()
    alone = first.hidden.grad.clone()
    (0.75 * totals[1]).backward()
    torch.testing.assert_close(first.weight.grad, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.hidden.grad, alone)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(trained):
    case = Case(10)
    expected = case.gradients(case.at_once)[2 if trained == "hidden" else 3]
    frozen = case.weight if trained == "hidden" else case.hidden
    frozen.requires_grad_(False)
    case.hidden.grad = case.weight.grad = None
    case.in_chunks()[0].backward()
    assert frozen.grad is None
    torch.testing.assert_close(getattr(case, trained).grad, expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_goes_to_the_targets():
    case = Case(10)
    for target in case.targets.values():
        for tensor in target:
            tensor.requires_grad_()
    case.in_chunks()[0].backward()
    assert all(tensor.grad is None for target in case.targets.values() for tensor in target)


class Largest(TorchDispatchMode):
    """Notes how large the tensors are that operations make, and how many products of matrices there are."""

    def __init__(self):
        super().__init__()
        self.elements, self.products, self.names = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.products += func.overloadpacket.__name__ in ("mm", "addmm_", "addmm")
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize("targets", TARGETS)
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight(targets):
    case = Case(50 * CHUNK, targets, weight_teacher_by_label_prob="teacher" in TARGETS[targets])
    most = max(CHUNK * VOCABULARY, case.weight.numel(), case.hidden.numel())
    with Largest() as seen:
        case.gradients(case.in_chunks)
    assert "_log_softmax_backward_data" in seen.names  # the gradient has been seen too
    assert CHUNK * VOCABULARY <= seen.elements <= most < 50 * CHUNK * VOCABULARY / 3
    with Largest() as seen:
        case.gradients(case.at_once)
    assert seen.elements == 50 * CHUNK * VOCABULARY


@pytest.mark.parametrize("targets", TARGETS)
def test_without_gradients_only_the_terms_are_computed(targets):
    case = Case(3 * CHUNK, targets)
    expected, terms = case.at_once()
    with torch.no_grad(), Largest() as seen:
        total, ours = case.in_chunks()
    assert total.grad_fn is None and not total.requires_grad
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(ours.measured(), terms.measured(), rtol=1e-5, atol=1e-6)
    projected = 1 + sum(isinstance(target, LMHeadInputs) for target in case.targets.values())
    assert seen.products == 3 * projected and "_log_softmax_backward_data" not in seen.names
    assert seen.elements < 3 * CHUNK * VOCABULARY


def test_the_terms_have_no_gradient_and_a_second_backward_pass_raises():
    case = Case(10)
    total, terms = case.in_chunks()
    assert not any(term.requires_grad for term in vars(terms).values() if term is not None)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


@pytest.mark.parametrize("targets", TARGETS)
def test_under_autocast_it_is_bfloat16_up_to_its_rounding_and_gradients_keep_their_dtype(targets):
    case = Case(30, targets)
    expected = case.gradients(case.in_chunks)
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = case.in_chunks()
        plain = case.at_once()[1].measured()
    case.hidden.grad = case.weight.grad = None
    total.backward()
    assert case.hidden.grad.dtype == case.weight.grad.dtype == torch.float32
    assert total.dtype == torch.float32
    # the same products in the same dtype
    torch.testing.assert_close(terms.measured(), plain, rtol=1e-5, atol=1e-6)
    assert not torch.equal(terms.ce, expected[1]["ce"])
    # 8 bits of logits up to 8
    torch.testing.assert_close(terms.total, expected[1]["total"], rtol=0.03, atol=0.05)
    for got, exact in zip((case.hidden.grad, case.weight.grad), expected[2:], strict=True):
        assert (got - exact).norm() < 0.02 * exact.norm()


def test_under_autocast_the_weights_gradient_is_added_up_in_float32():
    case = Case(300 * CHUNK, "labels")
    exact = case.gradients(case.at_once)[3]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = case.in_chunks()
    case.weight.grad = None
    total.backward()
    assert (case.weight.grad - exact).norm() < 0.01 * exact.norm()


def test_a_gradient_kept_scaled_is_the_same_and_in_float16_not_lost():
    case = Case(10)
    expected = case.gradients(case.in_chunks, 0.37)
    for scale in (1024.0, torch.tensor(1024.0)):
        case.options["gradient_scale"] = scale
        torch.testing.assert_close(case.gradients(case.in_chunks, 0.37), expected)

    case = Case(10, "labels")
    with torch.no_grad():  # the last token is very improbable everywhere
        case.hidden[:, 0] = 1.0
        case.weight[-1] = torch.tensor([-22.0, *([0.0] * (WIDTH - 1))])
    case.labels.clamp_(max=VOCABULARY - 2)
    exact = case.gradients(case.at_once, 2.0**24)[3][-1]
    for scale, is_kept in ((1.0, False), (2.0**20, True)):
        case.options["gradient_scale"] = scale
        case.weight.grad = None
        with torch.autocast("cpu", torch.float16):
            total, _ = case.in_chunks()
        (2.0**24 * total).backward()
        got = case.weight.grad[-1]
        assert (got.abs().max() > 0) == is_kept and ((got - exact).norm() < 0.1 * exact.norm()) == is_kept


# ---- the hook ----


@pytest.fixture
def model(processor):
    return make_whisper(processor).eval()


@pytest.fixture
def inputs(model):
    return {name: value for name, value in collate(Clips(model.config, clips=3).rows).items() if name != "clip"}


def test_the_hidden_states_of_the_label_tokens_are_noted_and_not_projected(model, inputs):
    labels = inputs.pop("labels")
    inputs["decoder_input_ids"] = labels.clamp_min(0)
    real, positions = labels != -100, label_positions(labels)
    expected = model(**inputs).logits
    with capture_lm_head_inputs(model, positions) as captured:
        outputs = model(**inputs)
    ((hidden, weight),) = captured
    assert outputs.logits.numel() == 0 and hidden.shape == (real.sum(), 16) and 0 < real.sum() < real.numel()
    assert weight is model.proj_out.weight
    torch.testing.assert_close(hidden @ weight.T, expected[real])
    with capture_lm_head_inputs(model, positions, keep_logits=True) as captured:
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(captured[0].hidden, hidden)


def test_gradients_of_the_whole_model_are_those_of_its_own_logits(model, inputs):
    real, positions = inputs["labels"] != -100, label_positions(inputs["labels"])
    labels = inputs["labels"][real]
    gradients = []
    for chunked in (False, True):
        model.zero_grad()
        with capture_lm_head_inputs(model, positions, keep_logits=not chunked) as captured:
            outputs = model(**inputs | ({"labels": None, "decoder_input_ids": inputs["labels"].clamp_min(0)}))
        loss = (
            chunked_distillation_loss(captured[0], labels)[0]
            if chunked
            else distillation_loss(outputs.logits[real], labels).total.sum()
        )
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # the projection's weight is the token embeddings' too: it has both gradients
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_weights_of_a_functional_call_are_noted(model, inputs):
    real, positions = inputs["labels"] != -100, label_positions(inputs["labels"])
    inputs["decoder_input_ids"] = inputs.pop("labels").clamp_min(0)
    others = {name: 0.5 * parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad(), capture_lm_head_inputs(model, positions) as captured:
        functional_call(model, others, kwargs=inputs, tie_weights=True)
    assert torch.equal(captured[0].weight, 0.5 * model.proj_out.weight)
    with torch.no_grad():
        expected = functional_call(model, others, kwargs=inputs, tie_weights=True).logits[real]
    torch.testing.assert_close(captured[0].hidden @ captured[0].weight.T, expected)


def test_the_model_projects_again_afterwards_even_after_an_exception(model, inputs):
    real, positions = inputs["labels"] != -100, label_positions(inputs["labels"])
    with capture_lm_head_inputs(model, positions):
        model(**inputs | {"labels": None, "decoder_input_ids": inputs["labels"].clamp_min(0)})
    assert model(**inputs).logits.shape == (*real.shape, model.config.vocab_size)
    with pytest.raises(ZeroDivisionError), capture_lm_head_inputs(model, positions) as captured:
        raise ZeroDivisionError
    assert model(**inputs).logits.shape == (*real.shape, model.config.vocab_size)
    assert captured == []
