"""The check for options of the objective that are given and have no effect. Values of the preset may have none."""

from collections.abc import Set
from typing import Any

from ..errors import UserError
from ..schedule import PRESETS


def check_effects(config: Any, changed: Set[str]) -> None:
    """Raise `UserError` for given options that have no effect.

    Args:
        config: an `ASKDConfig`.
        changed: the options that were given with another value than the preset's.
    """
    _check_teacher(config, changed)
    _check_self_teacher(config, changed)
    _check_targets(config, changed)


def check_average(config: Any, total_steps: int) -> None:
    """Raise `UserError` if weights are to be averaged, and no step of the run is in the self phase."""
    if config.average and config.uses_teacher and round(config.teacher_phase_ratio * total_steps) >= total_steps:
        raise UserError(
            f"--average has no effect: with --teacher_phase_ratio {config.teacher_phase_ratio:g} no step of this run "
            "is in the self phase. Lower it, train longer, or leave out --average"
        )


def _check_teacher(config: Any, changed: Set[str]) -> None:
    start, end, phase = config.teacher_weight, config.teacher_weight_end, config.teacher_phase_ratio
    for name in ("teacher_weight", "teacher_weight_end"):
        if getattr(config, name) and not phase:
            raise UserError(f"--{name} {getattr(config, name)} has no effect with --teacher_phase_ratio 0")
    if "teacher_schedule" in changed and not config.uses_teacher:
        raise UserError(f"--teacher_schedule {config.teacher_schedule} has no effect: the teacher weight is always 0")
    # with --teacher_weight 0 it is the length of a phase that was turned off
    if "teacher_phase_ratio" in changed and "teacher_weight" not in changed and phase and not config.uses_teacher:
        raise UserError(f"--teacher_phase_ratio {phase:g} has no effect: the teacher weight is always 0")
    if "teacher_weight_end" in changed and config.teacher_schedule == "constant" and end != start:
        raise UserError(f"--teacher_weight_end {end} has no effect with --teacher_schedule constant")
    adaptive = config.teacher_schedule == "adaptive"
    if adaptive and end > start:
        raise UserError(
            "--teacher_schedule adaptive requires a --teacher_weight_end of at most --teacher_weight, got "
            f"{end} and {start}"
        )
    if "teacher_schedule" in changed and adaptive and end == start and phase == 1.0:
        raise UserError(
            f"--teacher_schedule adaptive has no effect: the teacher weight is {start} during the whole run"
        )
    constant = PRESETS[config.preset]["teacher_schedule"] == "constant"  # in others it replaces `adaptive`
    if "teacher_schedule" in changed and constant and not adaptive and end == start:
        raise UserError(
            f"--teacher_schedule {config.teacher_schedule} has no effect: the teacher weight is {start} at the start "
            "and at the end of its phase. Give a smaller --teacher_weight_end"
        )
    if _is_given(config, "adaptive_window") and not adaptive:
        raise UserError(
            f"--adaptive_window {config.adaptive_window} has no effect: it requires --teacher_schedule adaptive, and "
            "a teacher weight that decreases"
        )


def _check_self_teacher(config: Any, changed: Set[str]) -> None:
    no_phase = config.uses_teacher and config.teacher_phase_ratio == 1.0
    if "self_weight" in changed and config.self_weight and no_phase:
        raise UserError(
            f"--self_weight {config.self_weight} has no effect: with --teacher_phase_ratio 1 there is no self phase"
        )
    for name in ("self_schedule", "snapshot_strategy", "self_teacher"):
        if name in changed and not config.self_weight and getattr(config, name) != "none":
            raise UserError(
                f"--{name} {getattr(config, name)} has no effect with --self_weight 0: give one above 0, such as 0.3"
            )
    if _is_given(config, "self_ema_decay") and (config.self_teacher != "ema" or not config.self_weight or no_phase):
        raise UserError(
            f"--self_ema_decay {config.self_ema_decay:g} has no effect: it requires --self_teacher ema, a "
            "--self_weight above 0 and a self phase"
        )


def _check_targets(config: Any, changed: Set[str]) -> None:
    """Check the options of the soft targets, those of the teacher and the self-teacher."""
    if config.weight_teacher_by_label_prob and not config.uses_teacher:
        raise UserError("--weight_teacher_by_label_prob True has no effect: the teacher weight is always 0")
    if config.uses_teacher or config.self_weight:
        return
    given = [name for name in ("divergence", "eval_teacher_losses") if _is_given(config, name)]
    for name in given + [name for name in ("temperature",) if name in changed]:
        raise UserError(
            f"--{name} {getattr(config, name)} has no effect: the weights of teacher and self-teacher are always 0"
        )


def _is_given(config: Any, name: str) -> bool:
    """Return whether an option without a value in the presets differs from its default."""
    return getattr(config, name) != getattr(type(config), name)
