"""The hidden-state loss of a compressed encoder: its numbers, when it is there, what it may not depend on."""

import copy
import logging

import pytest
import torch
from models import make_whisper
from training import Clips, collate, history, make_trainer, options
from transformers import TrainerCallback

from askd_hf.config import ASKDConfig
from askd_hf.errors import UserError
from askd_hf.hub.provenance import Provenance
from askd_hf.models.layers import COPIED_LAYERS, matched_layers
from askd_hf.models.lora import LoraArguments, with_lora
from askd_hf.models.student import init_student
from askd_hf.objective import distillation_loss, hidden_state_loss
from askd_hf.trainer import ASKDTrainer
from askd_hf.training.run_dir import DEFAULT_HIDDEN_WEIGHT, prepare_hidden_loss

# ---- the loss ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_the_relative_squared_error_of_each_clip(dtype):
    torch.manual_seed(0)
    student = [torch.randn(3, 7, 5, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(3, 7, 5).to(dtype).requires_grad_() for _ in range(2)]
    losses = hidden_state_loss(student, teacher)
    for clip in range(3):
        expected = 0.0
        for ours, theirs in zip(student, teacher, strict=True):
            error = size = 0.0
            for position in range(7):
                for i in range(5):
                    s, t = ours[clip, position, i].item(), theirs[clip, position, i].item()
                    error, size = error + (s - t) ** 2, size + t**2
            expected += error / size / 2
        assert losses[clip].item() == pytest.approx(expected, rel=1e-5)
    losses.sum().backward()
    for ours, theirs in zip(student, teacher, strict=True):
        t = theirs.detach().float()
        gradient = (ours.detach() - t) / t.square().sum((1, 2), keepdim=True)  # 2 of the square, 1/2 of the mean
        torch.testing.assert_close(ours.grad, gradient)
        assert theirs.grad is None


def test_it_is_0_with_a_finite_gradient_where_both_are_equal_and_1_for_silence():
    teacher = [torch.randn(2, 4, 3)]
    same = [teacher[0].clone().requires_grad_()]
    loss = hidden_state_loss(same, teacher)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and torch.equal(same[0].grad, torch.zeros(2, 4, 3))
    torch.testing.assert_close(hidden_state_loss([torch.zeros(2, 4, 3)], teacher), torch.ones(2))


@pytest.mark.parametrize(
    ("student", "teacher", "copied", "expected"),
    [
        (2, 4, None, ([1, 2], [1, 4])),  # spread evenly: 0 and 3
        (4, 32, None, ([1, 2, 3, 4], [1, 11, 22, 32])),
        (1, 4, None, ([1], [4])),
        (3, 4, [0, 1, 2], ([1, 2, 3], [1, 2, 4])),  # the last one's output is what the decoder hears
        (2, 4, [3, 0], ([2], [4])),
        (4, 2, None, ([1, 2, 4], [1, 1, 2])),
    ],
)
def test_layers_are_matched_to_those_they_are_from_and_the_last_to_the_last(student, teacher, copied, expected):
    assert matched_layers(student, teacher, copied) == expected


# ---- the trainer's ----


def by_hand(trainer, batch, pairs, weight):
    """The first step's loss, its terms and the student's gradients, from plain forward passes and autograd."""
    student, teacher = copy.deepcopy(trainer.model).train(), trainer.teacher
    inputs = {"input_features": batch["input_features"], "labels": batch["labels"], "output_hidden_states": True}
    with torch.no_grad():
        theirs = teacher(**inputs)
    ours = student(**inputs)
    real = batch["labels"] != -100
    terms = distillation_loss(
        ours.logits[real], batch["labels"][real], teacher=theirs.logits[real], teacher_weight=0.8, temperature=2.0
    )
    total, hidden = terms.total.sum(), 0.0
    for clip, tokens in enumerate(real.sum(1).tolist()):
        for i, k in pairs:
            s, t = ours.encoder_hidden_states[i][clip], theirs.encoder_hidden_states[k][clip]
            hidden = hidden + tokens * ((s - t) ** 2).sum() / (t**2).sum() / len(pairs)
    loss = (total + 0.8 * weight * hidden) / real.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return loss.item(), (hidden / real.sum()).item(), gradients


@pytest.mark.parametrize("pairs", [[(1, 1), (2, 4)], [(1, 2), (2, 4)]], ids=str)
def test_loss_and_gradient_are_those_of_plain_forward_passes(tmp_path, deep_teacher, pairs):
    """Of a student of the teacher's layers 0 and 2, and of 1 and 3."""
    student = init_student(deep_teacher, 2, encoder_layers=[pairs[0][1] - 1, 2])
    trainer = make_trainer(tmp_path, deep_teacher, student, max_steps=1, hidden_weight=3.0, max_grad_norm=0.0)
    seen = {}
    step = trainer.compute_loss

    def note(model, inputs, *args, **kwargs):
        batch = {name: value.clone() for name, value in inputs.items() if name != "clip"}
        seen["expected"] = by_hand(trainer, batch, pairs, 3.0)
        seen["before"] = copy.deepcopy(dict(model.named_parameters()))
        return step(model, inputs, *args, **kwargs)

    trainer.compute_loss = note
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update(
            gradients={n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        )
    )
    trainer.train()
    loss, hidden, gradients = seen["expected"]
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["hidden_loss"] == pytest.approx(hidden, rel=1e-5)
    encoder = {name for name in gradients if ".encoder." in name}
    assert encoder and gradients.keys() == seen["gradients"].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_by_default_a_compressed_encoder_is_trained_towards_the_layers_it_has(tmp_path, deep_teacher, compressed):
    trainer = make_trainer(tmp_path, deep_teacher, compressed, max_steps=2)
    assert (trainer.args.freeze_encoder, trainer.args.hidden_weight) == (False, 10.0)
    assert trainer.origin.copied_encoder_layers == [0, 2] and trainer.runner.layer_pairs == ([1, 2], [1, 4])
    # as in half precision; and a whole encoder stays frozen, also one that isn't the teacher's
    half = make_trainer(tmp_path, copy.deepcopy(deep_teacher).to(torch.bfloat16), compressed)
    assert half.args.hidden_weight == 10.0
    for student in (init_student(deep_teacher), make_whisper_like(compressed)):
        whole = make_trainer(tmp_path, deep_teacher, student)
        assert (whole.args.freeze_encoder, whole.args.hidden_weight, whole.runner.layer_pairs) == (True, None, None)
        assert not any(p.requires_grad for p in whole.model.model.encoder.parameters())


def make_whisper_like(model):
    """Of the same shape, with other weights: a student that `init_student` didn't make."""
    other = copy.deepcopy(model)
    if hasattr(other.config, COPIED_LAYERS):
        delattr(other.config, COPIED_LAYERS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def test_it_falls_with_the_teachers_weight_and_ends_with_the_teacher(tmp_path, deep_teacher, compressed):
    trainer = make_trainer(tmp_path, deep_teacher, compressed, max_steps=10, hidden_weight=2.0)
    calls = []
    trainer.teacher.model.encoder.register_forward_pre_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    assert calls == list(range(6)) and trainer.teacher is None
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["hidden_loss" in row for row in rows] == [True] * 6 + [False] * 4
    for row in rows[:6]:
        a = row["teacher_weight"]
        blended = (1 - a) * row["ce_loss"] + a * row["teacher_loss"] + a * 2.0 * row["hidden_loss"]
        assert row["loss"] == pytest.approx(blended, rel=1e-5) and a == pytest.approx(
            0.8 * (1 - row["step"] / 6 + 1 / 6)
        )
    assert rows[5]["hidden_loss"] < rows[0]["hidden_loss"]


def test_a_student_of_all_layers_begins_with_0(tmp_path, deep_teacher):
    student = init_student(deep_teacher, 4)
    changes = dict(preset="kd", max_steps=2, freeze_encoder=False, hidden_weight=1.0)
    trainer = make_trainer(tmp_path, deep_teacher, student, **changes)
    trainer.train()
    first, second = history(trainer, "hidden_loss").flatten().tolist()
    assert first == pytest.approx(0.0, abs=1e-10) and second > 1e-6


def note_arguments(model) -> list[set[str]]:
    """The names of the arguments of every call, as they come."""
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(set(kwargs)), with_kwargs=True)
    return calls


def test_without_a_weight_nothing_is_asked_for_and_nothing_changes(tmp_path, deep_teacher, compressed):
    runs = []
    for student, hidden_weight in ((compressed, 0.0), (make_whisper_like(compressed), None)):
        trainer = make_trainer(tmp_path, deep_teacher, student, freeze_encoder=False, hidden_weight=hidden_weight)
        asked = note_arguments(trainer.model), note_arguments(trainer.teacher)
        trainer.train()
        assert all(asked) and "output_hidden_states" not in set().union(*asked[0], *asked[1])
        assert not any("hidden_loss" in row for row in trainer.state.log_history)
        runs.append(trainer)
    with_it = make_trainer(tmp_path, deep_teacher, compressed)
    with_it.train()
    assert not torch.allclose(history(with_it, "ce_loss")[1:], history(runs[0], "ce_loss")[1:], atol=1e-3)


@pytest.mark.parametrize("changes", [dict(activation_checkpointing=True), dict(bf16=True)], ids=str)
def test_other_ways_to_compute_follow_the_plain_trajectory(tmp_path, deep_teacher, compressed, changes):
    runs = []
    for more in ({}, changes):
        options = dict(preset="kd", max_steps=6, hidden_weight=2.0) | more
        runs.append(make_trainer(tmp_path, deep_teacher, compressed, **options))
        runs[-1].train()
    tolerance = dict(rtol=0.1, atol=0.05) if "bf16" in changes else dict(rtol=1e-4, atol=1e-5)
    names = ("loss", "hidden_loss", "grad_norm")
    torch.testing.assert_close(history(runs[1], *names), history(runs[0], *names), **tolerance)


def test_an_adapter_learns_from_it_too(tmp_path, deep_teacher, compressed):
    """It is seen to be on a compressed encoder, which is then trained, without being told."""
    config = ASKDConfig(**options(tmp_path, preset="kd"))
    plain = copy.deepcopy(compressed)
    trainer = ASKDTrainer(
        model=with_lora(compressed, LoraArguments(lora_r=4), freeze_encoder=False),
        args=config,
        teacher_model=deep_teacher,
        train_dataset=Clips(compressed.config),
        data_collator=collate,
    )
    assert trainer.origin.copied_encoder_layers == Provenance.of_models(deep_teacher, plain).copied_encoder_layers
    assert (trainer.args.freeze_encoder, trainer.args.hidden_weight) == (False, DEFAULT_HIDDEN_WEIGHT)
    trainer.train()
    losses = history(trainer, "hidden_loss").flatten()
    assert losses[-1] < losses[0]


def test_an_adapter_without_anything_in_a_compressed_encoder_is_refused(tmp_path, deep_teacher, compressed):
    config = ASKDConfig(**options(tmp_path))
    adapter = with_lora(compressed, LoraArguments(lora_r=4), config.freeze_encoder)
    with pytest.raises(
        UserError, match="--freeze_encoder False requires an adapter with trainable weights in the encoder"
    ):
        ASKDTrainer(model=adapter, args=config, teacher_model=deep_teacher, train_dataset=Clips(compressed.config))


# ---- evaluation and the self phase ----


def test_evaluation_with_the_blend_has_it_and_the_self_teachers_own_encoder(tmp_path, deep_teacher, compressed):
    evaluation = Clips(compressed.config, clips=5, seed=2)
    changes = dict(
        eval_teacher_losses=True, predict_with_generate=False, per_device_eval_batch_size=2, hidden_weight=2.0
    )
    trainer = make_trainer(tmp_path, deep_teacher, compressed, evaluation, max_steps=10, **changes)
    before = trainer.evaluate()
    assert "eval_hidden_loss" not in before  # outside of training there is no schedule
    rows = []
    kept = trainer.teacher

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step in (3, 10):  # in the teacher phase and in the self phase
                own = trainer.blend.self_teacher and copy.deepcopy(trainer.blend.self_teacher.parameters)
                rows.append((trainer.evaluate(), copy.deepcopy(model).eval(), own, trainer.blend.weights))
                model.train()

    trainer.add_callback(Evaluate())
    trainer.train()
    batch = collate(evaluation.rows)
    inputs = {"input_features": batch["input_features"], "labels": batch["labels"], "output_hidden_states": True}
    real = batch["labels"] != -100
    with torch.no_grad():
        (metrics, model, _, weights), (later, last, own, _) = rows
        ours, theirs = model(**inputs), kept(**inputs)
        hidden = 0.0
        for i, k in ((1, 1), (2, 4)):
            s, t = ours.encoder_hidden_states[i], theirs.encoder_hidden_states[k]
            hidden = hidden + (s - t).square().sum((1, 2)) / t.square().sum((1, 2)) / 2
        expected = ((hidden * real.sum(1)).sum() / real.sum()).item()
        assert metrics["eval_hidden_loss"] == pytest.approx(expected, rel=1e-4)
        terms = distillation_loss(
            ours.logits[real],
            batch["labels"][real],
            teacher=theirs.logits[real],
            teacher_weight=weights.teacher,
            temperature=2.0,
        )
        total = terms.total.mean().item() + weights.teacher * 2.0 * expected
        assert metrics["eval_total_loss"] == pytest.approx(total, rel=1e-4)
        # in the self phase: all of the student's average, its encoder among it
        assert any(".encoder." in name for name in own)
        average = torch.func.functional_call(last, own, kwargs=inputs)
        terms = distillation_loss(
            last(**inputs).logits[real],
            batch["labels"][real],
            self_teacher=average.logits[real],
            self_weight=0.3,
            temperature=2.0,
        )
        assert later["eval_self_loss"] == pytest.approx(terms.self.mean().item(), rel=1e-4)
        assert "eval_hidden_loss" not in later


# ---- what can't be ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_weight=-1.0), "--hidden_weight must be at least 0, got -1.0"),
        (dict(hidden_weight=float("nan")), "--hidden_weight must be at least 0, got nan"),
        (dict(hidden_weight=1.0, preset="ps-kd"), "--hidden_weight 1.0 requires a teacher phase"),
        (
            dict(metric_for_best_model="hidden_loss", load_best_model_at_end=True),
            "hidden_loss requires --eval_teacher_losses",
        ),
        (dict(metric_for_best_model="eval_agreement"), "agreement is called top1_agreement now"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ASKDConfig(output_dir=str(tmp_path), **changes)


def test_impossible_models_are_refused(tmp_path, processor, deep_teacher, compressed):
    with pytest.raises(UserError, match="a pruned encoder must be trained: leave out --freeze_encoder True"):
        make_trainer(tmp_path, deep_teacher, compressed, freeze_encoder=True)
    with pytest.raises(UserError, match="--hidden_weight 1 requires a trained encoder"):
        make_trainer(tmp_path, deep_teacher, init_student(deep_teacher), hidden_weight=1.0)
    narrow = make_whisper(processor, d_model=8)
    with pytest.raises(UserError, match="the same d_model, got 8 and 16"):
        make_trainer(tmp_path, deep_teacher, narrow, freeze_encoder=False, hidden_weight=1.0)
    make_trainer(tmp_path, deep_teacher, narrow, freeze_encoder=False, max_steps=1).train()
    compressed.config.encoder_layerdrop = 0.1
    with pytest.raises(UserError, match=r"set encoder_layerdrop \(0.1\) to 0"):
        make_trainer(tmp_path, deep_teacher, compressed)


def test_cached_labels_have_no_hidden_states(tmp_path, deep_teacher, compressed, caplog):
    config = ASKDConfig(output_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        prepare_hidden_loss(config, compressed.config, None, compressed=True)
    assert config.hidden_weight is None and "only cached labels of the teacher" in caplog.text
    config.hidden_weight = 1.0
    with pytest.raises(UserError, match="requires the teacher, not its cached labels"):
        prepare_hidden_loss(config, compressed.config, None, compressed=True)
