"""How sure an error rate is: bootstrap over clips or speakers (Bisani & Ney 2004, Bootstrap estimates for confidence
intervals in ASR performance evaluation).

Blocks are drawn with replacement, as many as there are; the rate of a resample is the errors of its blocks over their
words. A block is a speaker, whose clips share voice and microphone and so aren't independent, where at least
`FEWEST_SPEAKERS` are known; else a clip. With few blocks intervals come out somewhat too narrow.
"""

from typing import Literal

import numpy as np

from .results import CONFIDENCE

RESAMPLES = 10_000
SEED = 0
FEWEST_SPEAKERS = 5
AT_ONCE = 2**20  # drawn blocks in memory


def blocks_of(speakers: list[str | None]) -> tuple[Literal["speaker", "clip"], np.ndarray]:
    """What to draw, and for each clip the number of its block, int `(clips,)`.

    Args:
        speakers: of each clip; None if unknown, which makes clips the blocks.
    """
    if None not in speakers and len(set(speakers)) >= FEWEST_SPEAKERS:
        return "speaker", np.unique(speakers, return_inverse=True)[1]
    return "clip", np.arange(len(speakers))


def resampled_rates(
    errors: np.ndarray, lengths: np.ndarray, blocks: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """Error rates in percent of resamples, the same ones for all systems: float `(systems, resamples)`.

    Args:
        errors: int `(systems, clips)`.
        lengths: of the references in words or characters, int `(clips,)`; at least 1 each.
        blocks: of the clips, int `(clips,)` from 0.
    """
    number = int(blocks.max()) + 1
    # sums over the blocks, lengths in the last row: int (systems + 1, blocks)
    sums = np.stack([np.bincount(blocks, weights=row, minlength=number) for row in [*errors, lengths]])
    generator = np.random.default_rng(seed)
    rates, step = [], max(1, AT_ONCE // number)
    for start in range(0, resamples, step):
        drawn = generator.integers(number, size=(min(step, resamples - start), number))
        totals = sums[:, drawn].sum(axis=-1)
        rates.append(100 * totals[:-1] / totals[-1])
    return np.concatenate(rates, axis=1)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled values `(resamples,)`, that holds `CONFIDENCE` of them."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the resamples in which the first system has the lower error rate; ties count half."""
    return float(np.mean(first < second) + np.mean(first == second) / 2)
