"""The blend's weights at the steps where they can be said by hand."""

import math

import pytest

from askd_hf.callbacks import blend_schedule
from askd_hf.config import ASKDConfig
from askd_hf.errors import UserError
from askd_hf.schedule import PRESETS, BlendSchedule, BlendState, LabelsJudged


def schedule(**changes):
    fields = dict(
        total_steps=100,
        teacher_phase_ratio=0.6,
        teacher_weight=0.8,
        teacher_weight_end=0.2,
        teacher_schedule="linear",
        self_weight=0.5,
        self_schedule="linear",
    )
    return BlendSchedule(**(fields | changes))


AVERAGED = dict(average=True, self_weight=0.3)


@pytest.mark.parametrize(
    ("name", "at_15", "at_45"),
    [
        ("linear", 0.8 - 0.6 * 0.25, 0.8 - 0.6 * 0.75),
        ("cosine", 0.2 + 0.6 * (1 + math.cos(math.pi / 4)) / 2, 0.2 + 0.6 * (1 + math.cos(3 * math.pi / 4)) / 2),
        ("constant", 0.8, 0.8),
    ],
)
def test_the_teacher_phase(name, at_15, at_45):
    plan, state = schedule(teacher_schedule=name), BlendState()
    weights = [plan.weights(step, state).teacher for step in range(100)]
    assert weights[0] == 0.8
    assert weights[15] == pytest.approx(at_15)
    assert weights[45] == pytest.approx(at_45)
    assert all(0.2 <= w <= 0.8 for w in weights[:60])
    assert weights[:60] == sorted(weights[:60], reverse=True)
    assert weights[60:] == [0.0] * 40


@pytest.mark.parametrize(("name", "first", "middle"), [("linear", 0.5 / 40, 0.25), ("constant", 0.5, 0.5)])
def test_the_self_phase(name, first, middle):
    plan, state = schedule(self_schedule=name), BlendState()
    weights = [plan.weights(step, state).self for step in range(100)]
    assert weights[:60] == [0.0] * 60
    assert weights[60] == pytest.approx(first)
    assert weights[79] == pytest.approx(middle)
    assert weights[99] == pytest.approx(0.5)


def judged(upheld: float, clips: int) -> LabelsJudged:
    return LabelsJudged(upheld, clips, disputed=clips, tokens=4 * clips)


def test_adaptive_is_linear_while_the_labels_have_full_credit():
    linear, adaptive = schedule(), schedule(teacher_schedule="adaptive")
    state = BlendState(teacher_gone=True)
    for upheld, clips in [(8.0, 8), (26.0, 28)]:  # 9 of 10, 27 of 30
        fresh = BlendState()
        fresh.observe(judged(upheld, clips), share=1.0)
        assert [adaptive.weights(step, fresh) for step in range(60)] == [linear.weights(s, state) for s in range(60)]
    assert [adaptive.weights(step, state) for step in range(100)] == [linear.weights(s, state) for s in range(100)]


def test_labels_that_are_not_borne_out_gain_less_and_the_teacher_stays():
    linear, adaptive, state = schedule(), schedule(teacher_schedule="adaptive"), BlendState()
    state.observe(judged(upheld=3.5, clips=18), share=1.0)  # 4.5 of 20
    assert state.labels_upheld == pytest.approx(4.5 / 20) and state.labels_credit == pytest.approx(0.25)
    for step in range(100):
        a, b = linear.weights(step, state)
        held, own = adaptive.weights(step, state)
        assert held == pytest.approx(0.8 - 0.25 * (0.8 - a))
        assert own == pytest.approx((1.0 - held) * b)
    state.observe(judged(upheld=0.0, clips=10**6), share=1.0)
    assert adaptive.weights(99, state).teacher == pytest.approx(0.8 * 0.9)  # labels keep something to prove themselves
    state.observe(judged(upheld=100.0, clips=100), share=1.0)  # and nothing is for good
    assert adaptive.weights(30, state) == linear.weights(30, state)


def test_few_clips_say_little():
    credits = []
    for clips in (0, 1, 2, 20, 200):
        state = BlendState()
        state.observe(judged(0.0, clips), share=1.0)
        credits.append(state.labels_credit)
    assert credits == pytest.approx([0.5 / 0.9, (1 / 3) / 0.9, 0.25 / 0.9, 0.1, 0.1])


def test_measurements_are_smoothed():
    state = BlendState()
    for _ in range(2):
        state.observe(judged(upheld=0.0, clips=8), share=0.5)
    assert state.labels_upheld == pytest.approx(0.25 * 1.0 + 0.75 * 0.1)
    assert state.disputed == 0.25


def test_when_an_adaptive_schedule_measures():
    plan, state = schedule(teacher_schedule="adaptive", total_steps=400), BlendState()
    assert [s for s in range(400) if plan.is_measured(s, state)] == list(range(10, 400, 10))
    assert not any(schedule(total_steps=400).is_measured(s, state) for s in range(240, 400))
    state.teacher_gone = True
    assert [s for s in range(400) if plan.is_measured(s, state)] == list(range(10, 240, 10))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_every_blend_field_and_an_explicit_value_wins(preset, tmp_path):
    config = ASKDConfig(output_dir=str(tmp_path), preset=preset)
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    if preset != "ce":  # which has no soft targets
        assert ASKDConfig(output_dir=str(tmp_path), preset=preset, temperature=3.0).temperature == 3.0
    plan = blend_schedule(config, 100)
    for step in range(100):
        a, b = plan.weights(step, BlendState())
        assert a >= 0 and b >= 0 and a + b <= 1 and a * b == 0
    assert all(set(values) == set(PRESETS["askd"]) for values in PRESETS.values())


def test_kd_is_distil_whisper_up_to_a_factor(tmp_path):
    config = ASKDConfig(output_dir=str(tmp_path), preset="kd")
    a = blend_schedule(config, 100).weights(57, BlendState()).teacher
    assert a / (1 - a) == pytest.approx(1.0 / 0.8)


def test_annealing_goes_from_the_teacher_to_the_labels(tmp_path):
    plan = blend_schedule(ASKDConfig(output_dir=str(tmp_path), preset="annealing"), 100)
    assert plan.weights(0, BlendState()) == (1.0, 0.0)
    assert plan.weights(50, BlendState()) == (0.5, 0.0)
    assert plan.weights(99, BlendState()) == (pytest.approx(0.01), 0.0)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.5), (0.7, 0.5), (0.3, 0.3), (0.0, 0.0)])
def test_the_end_of_a_preset_is_at_most_the_start_that_is_given(tmp_path, start, end):
    config = ASKDConfig(output_dir=str(tmp_path), teacher_weight=start)
    assert (config.teacher_weight, config.teacher_weight_end) == (start, end)
    assert config.uses_teacher is (start > 0)


def test_the_table_names_the_phases():
    table = schedule().table()
    assert "teacher        0 - 59       0.800 -> 0.210    0.000 -> 0.000" in table
    assert "self          60 - 99       0.000 -> 0.000    0.013 -> 0.500" in table


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("preset", "akd", "askd, kd"),
        ("teacher_weight", 1.2, "between 0 and 1"),
        ("teacher_schedule", "step", "must be one of linear, cosine, constant, adaptive, got 'step'$"),
        ("self_teacher", "mean", "ema, snapshot, none"),
        ("temperature", 0.0, "above 0, got 0.0"),
        ("self_ema_decay", 1.0, "at least 0 and below 1, got 1.0"),
        ("divergence", "l2", "forward_kl"),
        ("label_smoothing_factor", 0.1, "must be 0"),
        ("remove_unused_columns", True, "must be False"),
    ],
)
def test_an_impossible_option_is_refused_by_name(tmp_path, option, value, message):
    with pytest.raises(UserError, match=message) as error:
        ASKDConfig(output_dir=str(tmp_path), **{option: value})
    assert str(error.value).startswith(f"--{option} must be ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(teacher_weight=0.0, teacher_weight_end=0.3, teacher_schedule="adaptive"),
            "--teacher_schedule adaptive requires",
        ),
        (dict(preset="kd", average=True), "--average requires --self_teacher ema"),
        (
            AVERAGED | dict(teacher_phase_ratio=1.0),
            "--average has no effect: with --teacher_phase_ratio 1",
        ),
        (
            AVERAGED | dict(load_best_model_at_end=True),
            "--average is not supported with --load_best_model_at_end",
        ),
        (dict(preset="kd", teacher_schedule="adaptive"), "--teacher_schedule adaptive has no effect"),
        (dict(preset="ps-kd", teacher_schedule="adaptive"), "--teacher_schedule adaptive has no effect"),
        (dict(preset="ce", teacher_schedule="cosine"), "--teacher_schedule cosine has no effect"),
        (
            dict(teacher_weight=0.0, teacher_weight_end=0.3, teacher_phase_ratio=0.0),
            "--teacher_weight_end 0.3 has no effect",
        ),
        (dict(teacher_weight_end=0.3, teacher_schedule="constant"), "--teacher_weight_end 0.3 has no effect"),
        (dict(teacher_phase_ratio=1.0, self_weight=0.5), "--self_weight 0.5 has no effect"),
        (dict(self_weight=0.0, self_schedule="constant"), "--self_schedule constant has no effect"),
        (dict(self_weight=0.0, self_teacher="snapshot"), "--self_teacher snapshot has no effect"),
        (dict(preset="ps-kd", self_weight=0.0, self_schedule="constant"), "--self_schedule constant has no effect"),
        (dict(preset="ce", weight_teacher_by_label_prob=True), "--weight_teacher_by_label_prob True has no effect"),
        (dict(preset="ps-kd", weight_teacher_by_label_prob=True), "--weight_teacher_by_label_prob True has no effect"),
        (dict(preset="ce", divergence="reverse_kl"), "--divergence reverse_kl has no effect"),
        (dict(preset="ce", temperature=3.0), "--temperature 3.0 has no effect"),
        (dict(preset="ps-kd", self_weight=0.0, temperature=3.0), "--temperature 3.0 has no effect"),
        (dict(preset="ce", eval_teacher_losses=True), "--eval_teacher_losses True has no effect"),
        (dict(preset="kd", adaptive_window=9), "--adaptive_window 9 has no effect: it requires --teacher_schedule"),
        (dict(teacher_schedule="linear", adaptive_window=9), "--adaptive_window 9 has no effect"),
        (dict(preset="kd", self_ema_decay=0.9), "--self_ema_decay 0.9 has no effect: it requires --self_teacher ema"),
        (dict(preset="ps-kd", self_ema_decay=0.9), "--self_ema_decay 0.9 has no effect"),
        (dict(teacher_phase_ratio=1.0, self_ema_decay=0.9), "--self_ema_decay 0.9 has no effect"),
        (dict(preset="ps-kd", teacher_phase_ratio=0.5), "--teacher_phase_ratio 0.5 has no effect"),
        (
            AVERAGED | dict(max_steps=8, teacher_phase_ratio=0.97),
            "--average has no effect: .* no step of this run",
        ),
        (
            dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="no"),
            "--lr_scheduler_type .* requires --eval_",
        ),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ASKDConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "options",
    [
        *(dict(teacher_phase_ratio=1.0), dict(teacher_schedule="constant"), dict(self_weight=0.0), dict(preset="ce")),
        AVERAGED | dict(teacher_phase_ratio=0.9),
        # values of the defaults, which may be in a file for several presets
        dict(preset="ce", divergence="forward_kl", temperature=1.0, adaptive_window=50, self_ema_decay=0.99),
        dict(preset="ce", weight_teacher_by_label_prob=False, eval_teacher_losses=False, teacher_phase_ratio=0.0),
        dict(preset="ps-kd", divergence="reverse_kl", temperature=3.0, eval_teacher_losses=True),
        dict(preset="ce", self_teacher="ema", self_weight=0.5, self_ema_decay=0.9, divergence="reverse_kl"),
        dict(preset="kd", teacher_weight_end=0.2, teacher_schedule="adaptive", adaptive_window=9),
        AVERAGED | dict(max_steps=8, teacher_phase_ratio=0.9),
        dict(
            average=True, self_weight=0.3, teacher_weight=0.0, teacher_phase_ratio=1.0
        ),  # without a teacher, all is the self phase
    ],
)
def test_what_a_preset_leaves_without_effect_is_nobodys_mistake(tmp_path, options):
    ASKDConfig(output_dir=str(tmp_path), **options)


def test_the_default_schedule_is_adaptive_where_it_can_adapt(tmp_path):
    def schedule(**options) -> str:
        return ASKDConfig(output_dir=str(tmp_path), **options).teacher_schedule

    assert schedule() == schedule(teacher_weight_end=0.2) == schedule(teacher_weight_end=1.0) == "adaptive"
    assert schedule(teacher_weight=0.2, teacher_weight_end=0.6) == "linear"
    assert schedule(teacher_weight_end=1.0, teacher_phase_ratio=1.0, self_weight=0.0) == "linear"
    assert schedule(teacher_weight=0.0) == "linear"
