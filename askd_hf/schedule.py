"""Loss weights of the teacher and the self-teacher at each step.

A run has two phases. In the teacher phase the teacher weight decreases from `teacher_weight` to `teacher_weight_end`.
In the self phase it is 0, and the self-teacher weight increases to `self_weight`. The weights depend only on the step
and on `BlendState`, which is saved in every checkpoint.

To add a schedule, write a function of the phase's progress and add it to `TEACHER_SCHEDULES` or `SELF_SCHEDULES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MEASUREMENTS = 40  # per run, of an adaptive schedule
UNKNOWN = 0.5  # `labels_upheld` before the first measurement
ENOUGH_UPHELD = 0.9  # from this `labels_upheld` on the labels have full credit
LEAST_CREDIT = 0.1  # with credit 0 the student would never learn from the labels, and couldn't uphold them


class BlendWeights(NamedTuple):
    """The weights of the two soft targets. The labels have the rest, up to 1."""

    teacher: float = 0.0
    self: float = 0.0


def linear_decay(progress: float) -> float:
    return 1.0 - progress


def cosine_decay(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    return 1.0


def linear_ramp(progress: float) -> float:
    return progress


# progress of the teacher phase, [0, 1) -> 1 for teacher_weight, 0 for teacher_weight_end
TEACHER_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": linear_decay,
    "cosine": cosine_decay,
    "constant": constant,
    "adaptive": linear_decay,  # with full `BlendState.labels_credit`
}
# progress of the self phase, (0, 1] -> factor of self_weight
SELF_SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear_ramp, "constant": constant}


class LabelsJudged(NamedTuple):
    """Agreement of the student with the labels of held-out clips.

    A label is disputed if it isn't the teacher's most probable token. The student upholds it if it is the student's
    most probable token apart from the teacher's.

    Attributes:
        upheld: the sum over clips of the share of disputed label tokens that the student upholds.
        clips: the number of clips with disputed labels.
        disputed: the number of disputed label tokens.
        tokens: the number of label tokens.
    """

    upheld: float
    clips: float
    disputed: float
    tokens: float


@dataclass
class BlendState:
    """The state of the schedule besides the step. Saved as JSON in every checkpoint.

    Attributes:
        options: the settings of the run (`askd_hf.training.run_settings`), which are compared when it is resumed.
        labels_upheld: the smoothed share of disputed labels that the student upholds (`teacher_schedule=adaptive`,
            see `LabelsJudged`). 1 if no clips are held out.
        disputed: the share of held-out label tokens that are disputed. None before the first measurement.
        teacher_gone: whether an adaptive schedule has dropped the teacher, after the teacher phase.
        snapshot_epoch: the epoch in which the snapshot was taken. None before.
        evaluation_due: whether the run was stopped by a signal before the evaluation of its last step.
    """

    options: dict[str, Any] = field(default_factory=dict)
    labels_upheld: float = 1.0
    disputed: float | None = None
    teacher_gone: bool = False
    snapshot_epoch: int | None = None
    evaluation_due: bool = False

    @property
    def labels_credit(self) -> float:
        """The factor of the weight that a linear schedule would move from teacher to labels, 0.1 to 1."""
        return min(1.0, max(LEAST_CREDIT, self.labels_upheld / ENOUGH_UPHELD))

    def observe(self, judged: LabelsJudged, share: float) -> None:
        """Update the moving average with a measurement, whose weight is `share`."""
        upheld = (judged.upheld + 1.0) / (judged.clips + 2.0)  # rule of succession: few clips move it little
        self.labels_upheld += share * (upheld - self.labels_upheld)
        self.disputed = judged.disputed / max(judged.tokens, 1.0)


class Phase(NamedTuple):
    """The steps `start` to `end` (exclusive), with the weights of the first and the last of them."""

    name: str
    start: int
    end: int
    first: BlendWeights
    last: BlendWeights


@dataclass(frozen=True)
class BlendSchedule:
    """The weights in a run of `total_steps` updates. The other fields are options of `ASKDConfig`."""

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
        """The first step from which on the teacher weight is 0 for certain."""
        held = self.teacher_schedule == "adaptive" and self.planned_end > 0 and not state.teacher_gone
        return self.total_steps if held else self.planned_end

    def is_measured(self, step: int, state: BlendState) -> bool:
        """Return whether an adaptive schedule measures on the held-out clips before update `step`."""
        return 0 < step < self.teacher_end(state) and step % self.measured_every == 0

    @property
    def measured_every(self) -> int:
        return max(1, self.total_steps // MEASUREMENTS)

    def weights(self, step: int, state: BlendState) -> BlendWeights:
        """Return the weights at update `step`, counted from 0."""
        end, teacher, own = self.planned_end, 0.0, 0.0
        if step < end:
            left = TEACHER_SCHEDULES[self.teacher_schedule](step / end)
            teacher = self.teacher_weight_end + left * (self.teacher_weight - self.teacher_weight_end)
        else:
            # (0, 1]: the weight is above 0 at the first step of the phase, and `self_weight` at the last
            progress = (step - end + 1) / max(1, self.total_steps - end)
            own = self.self_weight * SELF_SCHEDULES[self.self_schedule](min(1.0, progress))
        if self.teacher_schedule == "adaptive" and step < self.teacher_end(state):
            # move only the share `labels_credit` of the weight from the teacher to the labels
            teacher += (1.0 - state.labels_credit) * (self.teacher_weight - teacher)
        return BlendWeights(teacher=teacher, self=own * (1.0 - teacher))

    def phases(self) -> list[Phase]:
        """Return the phases of the run; those of an adaptive schedule with full `labels_credit`."""
        end = self.planned_end
        after = "self" if self.self_weight else "labels"
        spans = [("teacher", 0, end), (after, end, self.total_steps)]
        return [
            Phase(name, start, stop, self.weights(start, BlendState()), self.weights(stop - 1, BlendState()))
            for name, start, stop in spans
            if stop > start
        ]

    def table(self) -> str:
        """Return the phases as a table, for the log."""
        rows = ["phase     steps             teacher weight    self weight"]
        for name, start, end, first, last in self.phases():
            rows.append(
                f"{name:8s}  {start:6d} - {end - 1:<6d}   {first.teacher:.3f} -> {last.teacher:.3f}    "
                f"{first.self:.3f} -> {last.self:.3f}"
            )
        return "\n".join(rows)


# Labels only: plain fine-tuning.
LABELS_ONLY: dict[str, Any] = dict(
    teacher_weight=0.0,
    teacher_weight_end=0.0,
    teacher_phase_ratio=0.0,
    teacher_schedule="constant",
    self_weight=0.0,
    self_schedule="constant",
    self_teacher="none",
    snapshot_strategy="no",
    temperature=1.0,
)
# preset -> {option: value}. A given option overrides that of the preset.
PRESETS: dict[str, dict[str, Any]] = {
    # Our choices: of the ASKD paper we had the abstract and the results only. On a small training set a teacher weight
    # that starts at 1.0 and lasts for 0.8 of the run gave a lower cross-entropy on held-out speech than 0.8 for 0.6 of
    # the run. An adaptive schedule was as good as a linear one with clean labels and better with noisy labels
    # (examples/benchmarks/schedules.py). A weight that decays to 0.5 probably made fewer errors than one that decays
    # to 0 on held-out speech of the domain (P 0.95), and no more outside of it (examples/studies/defaults.yaml). A
    # self phase (--self_weight 0.3) was nowhere certainly better, and made more errors on other speech (P 0.98 and
    # 0.99) or in the domain (P 0.97): the same study, and examples/studies/ablations.yaml.
    "askd": LABELS_ONLY
    | dict(teacher_weight=1.0, teacher_weight_end=0.5, teacher_phase_ratio=0.8, teacher_schedule="adaptive")
    | dict(temperature=2.0, self_weight=0.0, self_schedule="linear", self_teacher="ema"),
    # distil-whisper: 0.8*CE + 1.0*T^2*KL at T=2, divided by 1.8 so that the weights add up to 1.
    "kd": LABELS_ONLY
    | dict(teacher_weight=1.0 / 1.8, teacher_weight_end=1.0 / 1.8, teacher_phase_ratio=1.0, temperature=2.0),
    # Teacher annealing (BAM, Clark et al. 2019, section 3): from the teacher alone to the labels alone.
    "annealing": LABELS_ONLY | dict(teacher_weight=1.0, teacher_phase_ratio=1.0, teacher_schedule="linear"),
    # PS-KD (Kim et al. 2021): the student of the previous epoch, with a weight that increases to 0.8.
    "ps-kd": LABELS_ONLY
    | dict(self_weight=0.8, self_schedule="linear", self_teacher="snapshot", snapshot_strategy="epoch"),
    "ce": LABELS_ONLY,
}
