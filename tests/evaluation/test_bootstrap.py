"""Confidence intervals against other implementations, and power and level of the paired comparison."""

import random

import numpy as np
import pytest
from scipy import stats

from askd_hf.evaluation.bootstrap import (
    bootstrap_units,
    confidence_interval,
    probability_of_improvement,
    resampled_rates,
)

# The standard error of the 2.5 % quantile of 4000 resamples is 0.011 of the interval's width (normal distribution).
# This tolerance is 4.5 standard errors.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def corpus():
    """Errors, lengths and speakers of 300 clips, int `(300,)` each; 12 speakers with different error rates."""
    rng = np.random.default_rng(1)
    speakers = rng.integers(12, size=300)
    lengths = 1 + rng.poisson(15, size=300)
    errors = rng.binomial(lengths, 0.05 + 0.02 * speakers)
    return errors, lengths, speakers


def plain_loop(errors, lengths, blocks, n_resamples=4000) -> tuple[float, float]:
    """Return the interval by a direct implementation: units drawn one by one."""
    generator = random.Random(7)
    members = [[i for i, block in enumerate(blocks) if block == number] for number in sorted(set(blocks))]
    rates = []
    for _ in range(n_resamples):
        drawn = [clip for _ in members for clip in generator.choice(members)]
        rates.append(100 * sum(errors[clip] for clip in drawn) / sum(lengths[clip] for clip in drawn))
    rates.sort()
    return rates[round(0.025 * n_resamples)], rates[round(0.975 * n_resamples)]


@pytest.mark.parametrize("by", ["clip", "speaker"])
def test_the_interval_is_that_of_a_plain_loop(corpus, by):
    errors, lengths, speakers = corpus
    blocks = speakers if by == "speaker" else np.arange(len(errors))
    interval = confidence_interval(resampled_rates(errors[None], lengths, blocks)[0])
    expected = plain_loop(errors.tolist(), lengths.tolist(), blocks.tolist())
    width = expected[1] - expected[0]
    assert interval == pytest.approx(expected, abs=TOLERANCE * width)


def test_the_interval_is_that_of_scipy(corpus):
    errors, lengths, _ = corpus

    def rate(errors, lengths, axis):
        return 100 * errors.sum(axis=axis) / lengths.sum(axis=axis)

    expected = stats.bootstrap((errors, lengths), rate, paired=True, method="percentile", rng=3).confidence_interval
    interval = confidence_interval(resampled_rates(errors[None], lengths, np.arange(len(errors)))[0])
    assert interval == pytest.approx((expected.low, expected.high), abs=TOLERANCE * (expected.high - expected.low))


def test_speakers_who_differ_make_the_interval_wider(corpus):
    errors, lengths, speakers = corpus
    by_clip, by_speaker = (
        confidence_interval(resampled_rates(errors[None], lengths, blocks)[0])
        for blocks in (np.arange(len(errors)), speakers)
    )
    assert by_speaker[1] - by_speaker[0] > 1.5 * (by_clip[1] - by_clip[0])


def test_speakers_are_the_blocks_where_all_are_known_and_enough():
    kind, blocks = bootstrap_units(["b", "a", "c", "d", "e", "a"])
    assert (kind, blocks.tolist()) == ("speaker", [1, 0, 2, 3, 4, 0])
    for speakers in (["a", "b", "c", "d", "d", "d"], ["a", "b", "c", "d", "e", None], 6 * [None]):
        kind, blocks = bootstrap_units(speakers)
        assert (kind, blocks.tolist()) == ("clip", [0, 1, 2, 3, 4, 5])


def test_the_same_draws_serve_all_systems(corpus):
    errors, lengths, _ = corpus
    blocks = np.arange(len(errors))
    twice = resampled_rates(np.stack([errors, errors, errors + lengths]), lengths, blocks, n_resamples=500)
    assert (twice[0] == twice[1]).all()
    assert twice[2] == pytest.approx(twice[0] + 100)
    assert probability_of_improvement(twice[0], twice[1]) == 0.5
    assert probability_of_improvement(twice[0], twice[2]) == 1.0
    assert np.std(twice[0]) > 0


def compared(first, second, lengths) -> tuple[bool, float]:
    """Return whether the interval of the difference excludes 0, and the probability of improvement."""
    rates = resampled_rates(np.stack([first, second]), lengths, np.arange(len(lengths)), n_resamples=1000)
    low, high = confidence_interval(rates[0] - rates[1])
    return low > 0 or high < 0, probability_of_improvement(*rates)


def test_a_planted_improvement_of_5_percent_is_found():
    rng = np.random.default_rng(2)
    found, chances = [], []
    for _ in range(20):
        lengths = 1 + rng.poisson(18, size=2500)
        worse = rng.binomial(lengths, rng.beta(1.2, 8.8, size=2500))  # WER 12 %, with varying difficulty
        # 10 % of the errors are fixed, and half as many new errors are added
        fixed, added = rng.binomial(worse, 0.10), rng.binomial(lengths - worse, 0.05 * 0.12 / 0.88)
        better = worse - fixed + added
        assert better.sum() / worse.sum() == pytest.approx(0.95, abs=0.015)
        significant, chance = compared(better, worse, lengths)
        found.append(significant)
        chances.append(chance)
    assert np.mean(found) >= 0.95
    assert min(chances) > 0.95


def test_nothing_is_found_between_two_halves_of_one_system():
    """Two systems with the same distribution of errors: a difference is significant in about 5 % of the cases."""
    rng = np.random.default_rng(3)
    found, chances = [], []
    for _ in range(200):
        lengths = 1 + rng.poisson(18, size=400)
        first, second = rng.binomial(lengths, rng.beta(1.2, 8.8, size=400), size=(2, 400))
        significant, chance = compared(first, second, lengths)
        found.append(significant)
        chances.append(chance)
    assert 0.01 <= np.mean(found) <= 0.10
    assert np.mean(chances) == pytest.approx(0.5, abs=0.08)
