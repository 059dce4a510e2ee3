"""Named blends: each sets the same fields of `ASKDConfig` and nothing else."""

from typing import Any

# What a preset sets: these fields and nothing else. An option given explicitly wins over its preset.
PRESETS: dict[str, dict[str, Any]] = {
    # Our choices; the ASKD paper's own values are not public. Where data are few, starting from the teacher alone and
    # keeping it for 0.8 of the run gave held-out speech a lower cross-entropy than 0.8 of it over 0.6 of the run. An
    # adaptive schedule ended no worse than a linear one on clean labels and better on noisy ones:
    # examples/benchmark_schedules.py.
    "askd": dict(
        teacher_weight=1.0,
        teacher_weight_end=0.0,
        teacher_phase=0.8,
        teacher_schedule="adaptive",
        self_weight=0.3,
        self_schedule="linear",
        self_teacher="ema",
        self_refresh="never",
        temperature=2.0,
    ),
    # distil-whisper's 0.8*CE + 1.0*T^2*KL at T=2, divided by 1.8 to be convex: the same direction of every gradient.
    "kd": dict(
        teacher_weight=1.0 / 1.8,
        teacher_weight_end=1.0 / 1.8,
        teacher_phase=1.0,
        teacher_schedule="constant",
        self_weight=0.0,
        self_schedule="constant",
        self_teacher="none",
        self_refresh="never",
        temperature=2.0,
    ),
    # Teacher annealing (BAM, Clark et al. 2019, section 3): from the teacher alone to the labels alone.
    "annealing": dict(
        teacher_weight=1.0,
        teacher_weight_end=0.0,
        teacher_phase=1.0,
        teacher_schedule="linear",
        self_weight=0.0,
        self_schedule="constant",
        self_teacher="none",
        self_refresh="never",
        temperature=1.0,
    ),
    # PS-KD (Kim et al. 2021): the student of the epoch before, its weight growing to 0.8.
    "ps-kd": dict(
        teacher_weight=0.0,
        teacher_weight_end=0.0,
        teacher_phase=0.0,
        teacher_schedule="constant",
        self_weight=0.8,
        self_schedule="linear",
        self_teacher="snapshot",
        self_refresh="epoch",
        temperature=1.0,
    ),
    # Labels only: plain fine-tuning.
    "ce": dict(
        teacher_weight=0.0,
        teacher_weight_end=0.0,
        teacher_phase=0.0,
        teacher_schedule="constant",
        self_weight=0.0,
        self_schedule="constant",
        self_teacher="none",
        self_refresh="never",
        temperature=1.0,
    ),
}
