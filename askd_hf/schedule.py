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
MEASUREMENTS = 40  # of an adaptive schedule in a run
UNKNOWN = 0.5  # share of disputed labels that are upheld, before a clip was looked at
ENOUGH_UPHELD = 0.9  # the share that earns full credit
LEAST_CREDIT = 0.1  # labels without any weight couldn't show what they are worth


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
    "adaptive": linear_decay,  # if the labels deserve it, see `BlendState.labels_credit`
}
# progress of the self phase, (0, 1] -> share of self_weight
SELF_SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear_ramp, "constant": constant}


class LabelsJudged(NamedTuple):
    """The student's judgment on held-out clips.

    Attributes:
        upheld: summed over clips, the share of a clip's disputed label tokens that the student upholds.
        clips: in which the teacher disputes a label.
        disputed: label tokens that aren't the teacher's first choice.
        tokens: all that were looked at.
    """

    upheld: float
    clips: float
    disputed: float
    tokens: float


@dataclass
class BlendState:
    """All that the weights depend on besides the step. Saved as JSON in every checkpoint.

    Attributes:
        options: what the run is, by name (`askd_hf.training.run_settings`), so that it isn't resumed as another one.
        labels_upheld: of held-out labels that the teacher disputes, the share that the student upholds, smoothed
            (`teacher_schedule=adaptive`). 1 where none are held out.
        disputed: the share of held-out label tokens that the teacher disputes; None before the first measurement.
        teacher_gone: whether an adaptive schedule has done without the teacher since the teacher phase ended.
        snapshot_epoch: the epoch in whose course the snapshot was taken; None before.
    """

    options: dict[str, Any] = field(default_factory=dict)
    labels_upheld: float = 1.0
    disputed: float | None = None
    teacher_gone: bool = False
    snapshot_epoch: int | None = None

    @property
    def labels_credit(self) -> float:
        """How much of the weight that a linear schedule would give to the labels they have earned, 0.1 to 1."""
        return min(1.0, max(LEAST_CREDIT, self.labels_upheld / ENOUGH_UPHELD))

    def observe(self, judged: LabelsJudged, share: float) -> None:
        """Smooth in a new measurement, with the weight `share`."""
        upheld = (judged.upheld + 1.0) / (judged.clips + 2.0)  # the rule of succession: few clips say little
        self.labels_upheld += share * (upheld - self.labels_upheld)
        self.disputed = judged.disputed / max(judged.tokens, 1.0)


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
    teacher_phase_ratio: float
    teacher_weight: float
    teacher_weight_end: float
    teacher_schedule: str
    self_weight: float
    self_schedule: str

    @property
    def planned_end(self) -> int:
        """The first step after the teacher phase."""
        if self.teacher_weight == 0.0 and self.teacher_weight_end == 0.0:
            return 0
        return round(self.teacher_phase_ratio * self.total_steps)

    def teacher_end(self, state: BlendState) -> int:
        """The first step that certainly is without the teacher."""
        held = self.teacher_schedule == "adaptive" and self.planned_end > 0 and not state.teacher_gone
        return self.total_steps if held else self.planned_end

    def is_measured(self, step: int, state: BlendState) -> bool:
        """Whether an adaptive schedule looks at held-out clips before update `step`."""
        return 0 < step < self.teacher_end(state) and step % self.measured_every == 0

    @property
    def measured_every(self) -> int:
        return max(1, self.total_steps // MEASUREMENTS)

    def weights(self, step: int, state: BlendState) -> BlendWeights:
        """The weights at update `step`, counted from 0."""
        end, teacher, own = self.planned_end, 0.0, 0.0
        if step < end:
            left = TEACHER_SCHEDULES[self.teacher_schedule](step / end)
            teacher = self.teacher_weight_end + left * (self.teacher_weight - self.teacher_weight_end)
        else:
            # (0, 1]: the first step of the phase already has some weight and the last one has all of it
            progress = (step - end + 1) / max(1, self.total_steps - end)
            own = self.self_weight * SELF_SCHEDULES[self.self_schedule](min(1.0, progress))
        if self.teacher_schedule == "adaptive" and step < self.teacher_end(state):
            # the labels gain on the teacher as much of what they would as they have earned
            teacher += (1.0 - state.labels_credit) * (self.teacher_weight - teacher)
        return BlendWeights(teacher=teacher, self=own * (1.0 - teacher))

    def phases(self) -> list[Phase]:
        """The plan of the run; under an adaptive schedule of one whose labels earn full credit."""
        end = self.planned_end
        after = "self" if self.self_weight else "labels"
        spans = [("teacher", 0, end), (after, end, self.total_steps)]
        return [
            Phase(name, start, stop, self.weights(start, BlendState()), self.weights(stop - 1, BlendState()))
            for name, start, stop in spans
            if stop > start
        ]

    def table(self) -> str:
        """The phases as text, for the log."""
        rows = ["phase     steps             teacher weight    self weight"]
        for name, start, end, first, last in self.phases():
            rows.append(
                f"{name:8s}  {start:6d} - {end - 1:<6d}   {first.teacher:.3f} -> {last.teacher:.3f}    "
                f"{first.self:.3f} -> {last.self:.3f}"
            )
        if self.teacher_schedule == "adaptive":
            rows.append("adaptive: where held-out labels don't bear out, the teacher keeps more weight, and longer")
        return "\n".join(rows)


# What a preset sets: these fields and nothing else. An option given explicitly wins over its preset.
PRESETS: dict[str, dict[str, Any]] = {
    # Our choices; the ASKD paper's own values are not public. Where data are few, starting from the teacher alone and
    # keeping it for 0.8 of the run gave held-out speech a lower cross-entropy than 0.8 of it over 0.6 of the run. An
    # adaptive schedule ended no worse than a linear one on clean labels and better on noisy ones:
    # examples/benchmarks/schedules.py.
    "askd": dict(
        teacher_weight=1.0,
        teacher_weight_end=0.0,
        teacher_phase_ratio=0.8,
        teacher_schedule="adaptive",
        self_weight=0.3,
        self_schedule="linear",
        self_teacher="ema",
        snapshot_strategy="no",
        temperature=2.0,
    ),
    # distil-whisper's 0.8*CE + 1.0*T^2*KL at T=2, divided by 1.8 to be convex: the same direction of every gradient.
    "kd": dict(
        teacher_weight=1.0 / 1.8,
        teacher_weight_end=1.0 / 1.8,
        teacher_phase_ratio=1.0,
        teacher_schedule="constant",
        self_weight=0.0,
        self_schedule="constant",
        self_teacher="none",
        snapshot_strategy="no",
        temperature=2.0,
    ),
    # Teacher annealing (BAM, Clark et al. 2019, section 3): from the teacher alone to the labels alone.
    "annealing": dict(
        teacher_weight=1.0,
        teacher_weight_end=0.0,
        teacher_phase_ratio=1.0,
        teacher_schedule="linear",
        self_weight=0.0,
        self_schedule="constant",
        self_teacher="none",
        snapshot_strategy="no",
        temperature=1.0,
    ),
    # PS-KD (Kim et al. 2021): the student of the epoch before, its weight growing to 0.8.
    "ps-kd": dict(
        teacher_weight=0.0,
        teacher_weight_end=0.0,
        teacher_phase_ratio=0.0,
        teacher_schedule="constant",
        self_weight=0.8,
        self_schedule="linear",
        self_teacher="snapshot",
        snapshot_strategy="epoch",
        temperature=1.0,
    ),
    # Labels only: plain fine-tuning.
    "ce": dict(
        teacher_weight=0.0,
        teacher_weight_end=0.0,
        teacher_phase_ratio=0.0,
        teacher_schedule="constant",
        self_weight=0.0,
        self_schedule="constant",
        self_teacher="none",
        snapshot_strategy="no",
        temperature=1.0,
    ),
}
