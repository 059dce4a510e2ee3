"""Bootstrap confidence intervals of error rates.

Bisani & Ney 2004, Bootstrap estimates for confidence intervals in ASR performance evaluation.

The resampling unit is a speaker if at least `MIN_SPEAKERS` are known, because clips of one speaker share voice and
microphone and aren't independent; else a clip. Units are drawn with replacement, as many as there are. The error rate
of a resample is the errors of its units divided by their words. With few units the intervals are somewhat too narrow.
"""

from typing import Literal

import numpy as np

from .options import N_RESAMPLES
from .results import CONFIDENCE

SEED = 0
MIN_SPEAKERS = 5
MAX_DRAWN_UNITS = 2**20  # in memory at a time


def bootstrap_units(speakers: list[str | None]) -> tuple[Literal["speaker", "clip"], np.ndarray]:
    """Return the kind of the resampling unit, and the unit index of each clip, int `(clips,)`.

    Args:
        speakers: speaker of each clip. If one is None (unknown), the units are clips.
    """
    if None not in speakers and len(set(speakers)) >= MIN_SPEAKERS:
        return "speaker", np.unique(speakers, return_inverse=True)[1]
    return "clip", np.arange(len(speakers))


def resampled_rates(
    errors: np.ndarray, lengths: np.ndarray, units: np.ndarray, n_resamples: int = N_RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """Return the error rates of the resamples in percent, float `(systems, n_resamples)`; all systems share resamples.

    Args:
        errors: errors of each system on each clip, int `(systems, clips)`.
        lengths: reference lengths in words or characters, at least 1 each, int `(clips,)`.
        units: unit index of each clip, from 0, int `(clips,)`.
    """
    count = int(units.max()) + 1
    # sums per unit, lengths in the last row: int (systems + 1, units)
    sums = np.stack([np.bincount(units, weights=row, minlength=count) for row in [*errors, lengths]])
    generator = np.random.default_rng(seed)
    rates, step = [], max(1, MAX_DRAWN_UNITS // count)
    for start in range(0, n_resamples, step):
        drawn = generator.integers(count, size=(min(step, n_resamples - start), count))
        totals = sums[:, drawn].sum(axis=-1)
        rates.append(100 * totals[:-1] / totals[-1])
    return np.concatenate(rates, axis=1)


def confidence_interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of resampled values `(n_resamples,)` at the level `CONFIDENCE`."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def probability_of_improvement(system: np.ndarray, baseline: np.ndarray) -> float:
    """Return the share of the resamples in which the system has the lower error rate; ties count half."""
    return float(np.mean(system < baseline) + np.mean(system == baseline) / 2)
