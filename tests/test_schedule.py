"""The blend's weights at the steps where they can be said by hand."""

import math

import pytest

from askd_hf.callbacks import AdaptiveBlendCallback
from askd_hf.config import ASKDConfig
from askd_hf.errors import UserError
from askd_hf.presets import PRESETS
from askd_hf.schedule import BlendSchedule, BlendState


def schedule(**changes):
    fields = dict(
        total_steps=100,
        teacher_phase=0.6,
        teacher_weight=0.8,
        teacher_weight_end=0.2,
        teacher_schedule="linear",
        self_weight=0.5,
        self_schedule="linear",
    )
    return BlendSchedule(**(fields | changes))


@pytest.mark.parametrize(
    ("name", "at_15", "at_45"),
    [
        ("linear", 0.8 - 0.6 * 0.25, 0.8 - 0.6 * 0.75),
        ("cosine", 0.2 + 0.6 * (1 + math.cos(math.pi / 4)) / 2, 0.2 + 0.6 * (1 + math.cos(3 * math.pi / 4)) / 2),
        (
            "exponential",
            0.2 + 0.6 * (math.exp(-1.25) - math.exp(-5)) / (1 - math.exp(-5)),
            0.2 + 0.6 * (math.exp(-3.75) - math.exp(-5)) / (1 - math.exp(-5)),
        ),
        ("step", 0.2 + 0.6 * 0.75, 0.2 + 0.6 * 0.25),
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


def test_adaptive_is_linear_capped_by_the_measured_advantage():
    plan, state = schedule(teacher_schedule="adaptive", teacher_weight_end=0.0), BlendState()
    assert plan.weights(0, state).teacher == 0.8
    for _ in range(300):
        state.observe(teacher_ce=0.5, student_ce=2.0, window=10)
    assert state.advantage == pytest.approx(0.75)
    assert plan.weights(0, state).teacher == pytest.approx(0.8 * 0.75)
    assert plan.weights(45, state).teacher == pytest.approx(0.2)  # the line is below the cap
    for _ in range(300):
        state.observe(teacher_ce=0.5, student_ce=0.4, window=10)
    assert state.advantage == 0.0
    assert plan.weights(10, state).teacher == 0.0


def test_one_lucky_batch_does_not_release_the_teacher():
    state = BlendState()
    state.observe(teacher_ce=1.0, student_ce=0.5, window=10)
    assert state.advantage > 0.5


def test_an_early_release_starts_the_self_phase():
    plan, state = schedule(teacher_schedule="adaptive"), BlendState(release_step=20)
    assert plan.weights(19, state).teacher > 0
    assert plan.weights(20, state) == (0.0, pytest.approx(0.5 / 80))
    assert plan.weights(99, state) == (0.0, pytest.approx(0.5))
    # the line itself is that of the planned phase, not of the shortened one
    assert plan.weights(15, state).teacher == schedule().weights(15, BlendState()).teacher


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_every_blend_field_and_an_explicit_value_wins(preset, tmp_path):
    config = ASKDConfig(output_dir=str(tmp_path), preset=preset)
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert ASKDConfig(output_dir=str(tmp_path), preset=preset, temperature=3.0).temperature == 3.0
    plan = AdaptiveBlendCallback(config)._schedule(100)
    for step in range(100):
        a, b = plan.weights(step, BlendState())
        assert a >= 0 and b >= 0 and a + b <= 1 and a * b == 0
    assert all(set(values) == set(PRESETS["askd"]) for values in PRESETS.values())


def test_kd_is_distil_whisper_up_to_a_factor(tmp_path):
    config = ASKDConfig(output_dir=str(tmp_path), preset="kd")
    a = AdaptiveBlendCallback(config)._schedule(100).weights(57, BlendState()).teacher
    assert a / (1 - a) == pytest.approx(1.0 / 0.8)


def test_annealing_goes_from_the_teacher_to_the_labels(tmp_path):
    plan = AdaptiveBlendCallback(ASKDConfig(output_dir=str(tmp_path), preset="annealing"))._schedule(100)
    assert plan.weights(0, BlendState()) == (1.0, 0.0)
    assert plan.weights(50, BlendState()) == (0.5, 0.0)
    assert plan.weights(99, BlendState()) == (pytest.approx(0.01), 0.0)


def test_the_table_names_the_phases():
    table = schedule().table(BlendState())
    assert "teacher        0 - 59       0.800 -> 0.210    0.000 -> 0.000" in table
    assert "self          60 - 99       0.000 -> 0.000    0.013 -> 0.500" in table


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("preset", "akd", "askd, kd"),
        ("teacher_weight", 1.2, "between 0 and 1"),
        ("teacher_schedule", "sigmoid", "linear, cosine"),
        ("self_teacher", "mean", "ema, snapshot, none"),
        ("temperature", 0.0, "positive"),
        ("self_ema_decay", 1.0, r"\[0, 1\)"),
        ("divergence", "l2", "forward_kl"),
        ("label_smoothing_factor", 0.1, "must be 0"),
        ("remove_unused_columns", True, "must be False"),
    ],
)
def test_an_impossible_option_is_refused_by_name(tmp_path, option, value, message):
    with pytest.raises(UserError, match=message) as error:
        ASKDConfig(output_dir=str(tmp_path), **{option: value})
    assert str(error.value).startswith(option)
