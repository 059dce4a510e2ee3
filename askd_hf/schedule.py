"""When the student listens to whom: the weights of teacher and self-teacher as a function of the step.

A run has two phases. In the teacher phase the weight on the teacher falls from `teacher_weight` to
`teacher_weight_end`; in the self phase the teacher is gone and the weight on the self-teacher rises to `self_weight`.
The weights depend on the step and on `BlendState` alone, which is saved in every checkpoint.

To add a schedule, write a function of the phase's progress and name it in `TEACHER_SCHEDULES` or `SELF_SCHEDULES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STAIRS = 4
EXPONENTIAL_RATE = 5.0


class BlendWeights(NamedTuple):
    """The weights on the two soft targets; the labels get the rest."""

    teacher: float = 0.0
    self: float = 0.0


def linear_decay(progress: float) -> float:
    return 1.0 - progress


def cosine_decay(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def exponential_decay(progress: float) -> float:
    """exp(-5 * progress), shifted and scaled to run from exactly 1 to exactly 0."""
    floor = math.exp(-EXPONENTIAL_RATE)
    return (math.exp(-EXPONENTIAL_RATE * progress) - floor) / (1.0 - floor)


def step_decay(progress: float) -> float:
    """Four stairs of equal length: 1, 3/4, 1/2, 1/4."""
    return 1.0 - math.floor(progress * STAIRS) / STAIRS


def constant(progress: float) -> float:
    return 1.0


def linear_ramp(progress: float) -> float:
    return progress


# progress of the teacher phase, [0, 1) -> how much is left of the way from teacher_weight_end up to teacher_weight
TEACHER_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": linear_decay,
    "cosine": cosine_decay,
    "exponential": exponential_decay,
    "step": step_decay,
    "constant": constant,
    "adaptive": linear_decay,  # and never more than `BlendState.advantage` allows
}
# progress of the self phase, (0, 1] -> share of self_weight
SELF_SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear_ramp, "constant": constant}


@dataclass
class BlendState:
    """All that the weights depend on besides the step. Saved as JSON in every checkpoint.

    Attributes:
        options: what the run is, by name (`askd_hf.run_settings`), so that it isn't resumed as another one.
        teacher_ce, student_ce: smoothed cross-entropy on the labels, nats a token (`teacher_schedule=adaptive`).
        release_step: the step from which on an adaptive schedule has done without the teacher; None before.
        snapshot_epoch: the epoch in whose course the snapshot was taken; None before.
    """

    options: dict[str, Any] = field(default_factory=dict)
    teacher_ce: float = 0.0
    student_ce: float | None = None
    release_step: int | None = None
    snapshot_epoch: int | None = None

    @property
    def advantage(self) -> float:
        """The share of the student's cross-entropy that the teacher would save, 1 - CE_teacher/CE_student in [0, 1].

        1 before the first measurement. `teacher_ce` is smoothed from 0 on, so that the advantage starts near 1 and one
        lucky batch can't release the teacher.
        """
        if self.student_ce is None:
            return 1.0
        return min(1.0, max(0.0, 1.0 - self.teacher_ce / self.student_ce)) if self.student_ce > 0 else 0.0

    def observe(self, teacher_ce: float, student_ce: float, window: int) -> None:
        """Smooth in the mean cross-entropies of one update (exponential average over about `window` updates)."""
        new = 1.0 / window
        self.teacher_ce += new * (teacher_ce - self.teacher_ce)
        if self.student_ce is None:
            self.student_ce = student_ce
        self.student_ce += new * (student_ce - self.student_ce)


class Phase(NamedTuple):
    """A stretch of the run: steps `start` to `end` (exclusive) and the weights at its first and last step."""

    name: str
    start: int
    end: int
    first: BlendWeights
    last: BlendWeights


@dataclass(frozen=True)
class BlendSchedule:
    """The weights of a run of `total_steps` updates. Field meanings are those of `ASKDConfig`."""

    total_steps: int
    teacher_phase: float
    teacher_weight: float
    teacher_weight_end: float
    teacher_schedule: str
    self_weight: float
    self_schedule: str

    def teacher_end(self, state: BlendState) -> int:
        """The first step without the teacher."""
        if self.teacher_weight == 0.0 and self.teacher_weight_end == 0.0:
            return 0
        end = round(self.teacher_phase * self.total_steps)
        return end if state.release_step is None else min(end, state.release_step)

    def weights(self, step: int, state: BlendState) -> BlendWeights:
        """The weights at update `step`, counted from 0."""
        end = self.teacher_end(state)
        if step < end:
            # of the planned phase, not of the one that an early release has cut short
            left = TEACHER_SCHEDULES[self.teacher_schedule](step / round(self.teacher_phase * self.total_steps))
            teacher = self.teacher_weight_end + left * (self.teacher_weight - self.teacher_weight_end)
            if self.teacher_schedule == "adaptive":
                teacher = min(teacher, self.teacher_weight * state.advantage)
            return BlendWeights(teacher=teacher)
        # (0, 1]: the first step of the phase already has some weight and the last one has all of it
        progress = (step - end + 1) / max(1, self.total_steps - end)
        return BlendWeights(self=self.self_weight * SELF_SCHEDULES[self.self_schedule](min(1.0, progress)))

    def phases(self, state: BlendState) -> list[Phase]:
        """The plan of the run, as far as it is known at `state` (an adaptive teacher may be released earlier)."""
        end = self.teacher_end(state)
        after = "self" if self.self_weight else "labels"
        spans = [("teacher", 0, end), (after, end, self.total_steps)]
        return [
            Phase(name, start, stop, self.weights(start, state), self.weights(stop - 1, state))
            for name, start, stop in spans
            if stop > start
        ]

    def table(self, state: BlendState) -> str:
        """The phases as text, for the log."""
        rows = ["phase     steps             teacher weight    self weight"]
        for name, start, end, first, last in self.phases(state):
            rows.append(
                f"{name:8s}  {start:6d} - {end - 1:<6d}   {first.teacher:.3f} -> {last.teacher:.3f}    "
                f"{first.self:.3f} -> {last.self:.3f}"
            )
        if self.teacher_schedule == "adaptive" and self.teacher_end(state):
            rows.append("adaptive: a student that has caught up with its teacher on the labels is released earlier")
        return "\n".join(rows)
