"""Statistics and tables of a study, against plain loops and counts by hand."""

import itertools
import random
import re

import numpy as np
import pytest
from manifests import write

from askd_hf.evaluation import study as evaluated
from askd_hf.evaluation.bootstrap import confidence_interval
from askd_hf.evaluation.result_tables import verdict
from askd_hf.evaluation.results import ModelSpeed, Speed, Timing
from askd_hf.evaluation.study import (
    CellResult,
    SeedErrors,
    SetErrors,
    Study,
    comparison_table,
    error_table,
    no_speech_table,
    pooled_table,
    resampled_means,
    seed_errors,
)
from askd_hf.evaluation.study_report import write_study
from askd_hf.evaluation.word_errors import capped_errors, is_loop


def set_errors(name, errors, words, speakers=None, **more) -> SetErrors:
    more = dict(data="digest", insertions=[0] * len(words), loops=0, texts=len(words)) | more
    return SetErrors(name=name, words=words, errors=errors, speakers=speakers or [None] * len(words), **more)


def cell(method, seed, sets, training="a") -> CellResult:
    return CellResult("tiny", sets, "short", training, method, seed)


def test_errors_are_capped_at_the_words_of_a_clip():
    assert capped_errors(np.array([0, 3, 200, 5]), np.array([4, 3, 6, 10])).tolist() == [0, 3, 6, 5]


@pytest.mark.parametrize(("words", "loop"), [(14, False), (15, True)])
def test_a_loop_has_more_than_twice_the_words_and_ten(words, loop):
    assert is_loop("one two", "two " * words) is loop


def test_the_errors_of_an_evaluation_are_counted_by_hand(tmp_path):
    """Those of its student. Fillers are text where there is no speech, and nothing elsewhere."""
    texts = [
        ("ann", "twenty one ships", "21 ships sailed away"),
        (None, "", "Uh."),
        ("ben", "a b c d", "a x d"),
        ("cem", "uh hmm", "left out"),
        ("cem", " ", "..."),
        ("dee", "yes", "yes " * 13),
    ]
    write(tmp_path, "student", texts)
    write(tmp_path, "teacher", [(speaker, text, text) for speaker, text, _ in texts])
    assert evaluated.set_errors(tmp_path, "spoken", "calls") == SetErrors(
        name="calls",
        data="abcd",
        words=[2, 4, 1],
        errors=[2, 2, 12],
        insertions=[2, 0, 12],
        loops=1,
        texts=1,
        speakers=["ann", "ben", "dee"],
    )


def test_errors_are_summed_per_speaker_and_seed():
    speakers = ["a", "b", "c", "d", "e", "a"]
    words = [5, 4, 3, 2, 1, 6]
    results = [
        cell("kd", seed, [set_errors("own", errors, words, speakers)])
        for seed, errors in ((1, [1, 0, 9, 0, 0, 2]), (2, [0, 0, 0, 0, 1, 0]))
    ]
    raw, capped = (seed_errors(results, ["own"], cap) for cap in (False, True))
    assert raw.words.tolist() == [11, 4, 3, 2, 1]
    assert raw.errors.tolist() == [[3, 0, 9, 0, 0], [0, 0, 0, 0, 1]]
    assert capped.errors.tolist() == [[3, 0, 3, 0, 0], [0, 0, 0, 0, 1]]
    assert raw.rates == pytest.approx([100 * 12 / 21, 100 / 21])


def test_the_bootstrap_is_that_of_a_plain_loop():
    rng = np.random.default_rng(5)
    words = 5 + rng.integers(20, size=15)
    first, second = (rng.binomial(words, rate, size=(3, 15)) for rate in (0.2, 0.25))
    rates = resampled_means([SeedErrors(first, words), SeedErrors(second, words)], n_resamples=20_000)
    generator, differences = random.Random(3), []
    for _ in range(5000):
        units = [generator.randrange(15) for _ in range(15)]
        seeds = [generator.randrange(3) for _ in range(3)]
        total = 3 * sum(words[unit] for unit in units)
        errors = [sum(of[seed][unit] for seed in seeds for unit in units) for of in (first, second)]
        differences.append(100 * (errors[0] - errors[1]) / total)
    differences.sort()
    low, high = confidence_interval(rates[0] - rates[1])
    expected = differences[125], differences[4875]
    assert (low, high) == pytest.approx(expected, abs=0.05 * (expected[1] - expected[0]))


def test_seeds_widen_the_interval():
    words = np.full(50, 10)
    alike = SeedErrors(np.full((3, 50), 2), words)
    unlike = SeedErrors(np.array([[1] * 50, [2] * 50, [3] * 50]), words)
    rates = resampled_means([alike, unlike], n_resamples=2000)
    assert rates[0] == pytest.approx(20)  # all clips and seeds are equal
    assert confidence_interval(rates[1]) == pytest.approx((10, 30), abs=1e-9)  # one seed three times, 1 in 27


@pytest.fixture
def study() -> Study:
    """A teacher, and two methods with two seeds on two trainings; four clips of 10 words in each set, one in noise."""
    words = [10] * 4

    def sets(own, other, texts=0):
        silent = set_errors("noise", [0], [0], texts=texts)
        return [set_errors("own", own, words, insertions=[1, 0, 0, 0]), set_errors("other", other, words), silent]

    results = [CellResult("tiny", sets([4] * 4, [1] * 4, texts=1))]
    for training in ("a", "b"):
        for seed in (1, 2):
            results.append(cell("ce", seed, sets([2, 2, 2, 1 + seed], [3] * 4), training))
            results.append(cell("askd", seed, sets([1, 1, 1, seed], [2, 2, 2, 40]), training))
    return Study(results, ["ce", "teacher"])


def test_the_error_rates_are_means_over_the_seeds(study):
    table = error_table(study, "own")
    assert table.title == "own: 4 clips, 40 words"
    assert table.header[:3] == ["training", "method", "seeds"]
    by_name = {" ".join(row[:2]).strip(): row[2:] for row in table.rows}
    assert by_name["teacher"][:2] == ["", "40.0"]
    assert by_name["a ce"][:3] == ["2", "21.2 (20.0 to 22.5)", "21.2 (20.0 to 22.5)"]
    assert by_name["a ce"][4:] == ["2.5", "0/0"]
    assert by_name["b askd"][1] == "11.2 (10.0 to 12.5)"


def test_capped_errors_are_beside_raw_ones(study):
    row = next(row for row in error_table(study, "other").rows if row[:2] == ["a", "askd"])
    assert row[3:5] == ["115.0 (115.0 to 115.0)", "40.0 (40.0 to 40.0)"]


def test_systems_are_compared_with_the_same_training(study):
    table = comparison_table(study, ["own"], "title")
    compared = [row[:3] for row in table.rows]
    assert ["a", "askd", "ce"] in compared and ["b", "askd", "teacher"] in compared
    assert not [row for row in compared if row[1] == row[2]]
    row = next(row for row in table.rows if row[:3] == ["a", "askd", "teacher"])
    assert row[3] == "2" and row[4].startswith("-28.75 [") and row[5] == "1.000" and row[-1] == "fewer errors"
    assert verdict((-1.0, 0.5), 1234) == "undecided on 1,234 words" and verdict((0.1, 0.5), 9) == "more errors"


def test_trainings_are_pooled_and_a_clip_in_both_is_one_unit(study):
    (row,) = pooled_table(study, {"a": ["own"], "b": ["own"]}, "title").rows
    assert row[2:5] == ["askd", "ce", "a, b"]
    single = comparison_table(study, ["own"], "title").rows
    assert row[5:] == next(row for row in single if row[:3] == ["a", "askd", "ce"])[3:]  # both trainings are equal


def test_pooled_differences_are_those_of_plain_sums():
    """Two trainings with other sets outside their domain, one of which has speakers; three seeds."""
    rng = np.random.default_rng(4)
    sets_of = {"a": ["calls", "read"], "b": ["calls"]}
    words = {"calls": 3 + 40 * (np.arange(30) % 5 == 0), "read": 3 + rng.integers(9, size=24)}
    speakers = {"calls": [None] * 30, "read": [f"s{i % 6}" for i in range(24)]}
    errors, results = {}, []
    for training, method, seed in itertools.product("ab", ("kd", "askd"), (1, 2, 3)):
        sets = []
        for name in ("calls", "read"):
            made = rng.poisson(words[name] * (0.5 if method == "kd" else 0.4) * (1 + 0.1 * seed))
            errors[training, method, seed, name] = np.minimum(made, words[name])
            sets.append(set_errors(name, made.tolist(), words[name].tolist(), speakers[name]))
        results.append(cell(method, seed, sets, training))
    (row,) = (row for row in pooled_table(Study(results, ["kd"]), sets_of, "title").rows if row[2:4] == ["askd", "kd"])
    assert row[4:6] == ["a, b", "3"]

    # a unit is a clip of calls with its errors in both trainings, or a speaker of read
    units = [([("a", "calls", i), ("b", "calls", i)]) for i in range(30)]
    units += [[("a", "read", i) for i in range(24) if i % 6 == speaker] for speaker in range(6)]
    size = np.array([sum(words[name][i] for _, name, i in unit) for unit in units])
    more = np.array(  # (seeds, units)
        [
            [
                sum(errors[t, "askd", seed, name][i] - errors[t, "kd", seed, name][i] for t, name, i in unit)
                for unit in units
            ]
            for seed in (1, 2, 3)
        ]
    )
    drawn, seeds = rng.integers(36, size=(5000, 36)), rng.integers(3, size=(5000, 3))
    samples = [100 * more[s][:, u].sum() / 3 / size[u].sum() for u, s in zip(drawn, seeds, strict=True)]
    expected = [100 * more.sum() / 3 / size.sum(), *np.quantile(samples, [0.025, 0.975])]
    assert [float(number) for number in re.findall(r"[-+][\d.]+", row[8])] == pytest.approx(expected, abs=0.5)  # of 10
    assert float(row[9]) == pytest.approx(np.mean(np.array(samples) < 0), abs=0.02)


@pytest.mark.parametrize("speakers", [[f"s{i // 4}" for i in range(40)], [None] * 40], ids=["speakers", "clips"])
def test_copies_of_a_set_have_the_same_units(speakers):
    """As noisy ones: the interval of five equal copies is that of one set."""
    rng = np.random.default_rng(3)
    words = rng.integers(3, 9, size=40).tolist()

    def interval(copies: int) -> str:
        results = [
            cell(method, 1, [set_errors(f"{i} dB", errors, words, speakers) for i in range(copies)])
            for method, errors in (("kd", words), ("askd", rng.permutation(words).tolist()))
        ]
        rng.bit_generator.state = state
        names = [one.name for one in results[0].sets]
        comparison = comparison_table(Study(results, ["kd"]), names, "title").rows[-1]
        (pooled,) = (r for r in pooled_table(Study(results, ["kd"]), {"a": names}, "title").rows if r[2] == "askd")
        assert pooled[5:] == comparison[2:]
        return comparison[3]

    state = rng.bit_generator.state
    assert interval(5) == interval(1)
    other = set_errors("other", words, words, [f"t{i}" for i in range(40)])  # of other speakers
    results = [cell(method, 1, [set_errors("own", words, words, speakers), other]) for method in ("kd", "askd")]
    assert len(seed_errors([results[0]], ["own", "other"], False).words) == (10 if speakers[0] else 40) + 40


def test_the_interval_of_an_error_rate_is_in_its_row(study):
    study.results = [cell("kd", seed, [set_errors("own", [seed] * 50, [10] * 50)]) for seed in (1, 2, 3)]
    (row,) = error_table(study, "own").rows
    assert row[2:5] == ["20.0 (10.0 to 30.0)", "20.0 (10.0 to 30.0)", "[10.0, 30.0]"]


def test_without_sets_to_pool_there_is_no_table(study):
    assert not pooled_table(study, {"a": [], "b": []}, "title").rows


def test_only_seeds_that_both_have_are_compared(study):
    study.results = [one for one in study.results if not (one.method == "askd" and one.seed == 2)]
    row = next(row for row in comparison_table(study, ["own"], "title").rows if row[:3] == ["a", "askd", "ce"])
    assert row[3] == "1" and row[4].startswith("-10.00 [")  # 4 of 40 and 8 of 40 errors with seed 1
    (pooled,) = pooled_table(study, {"a": ["own"]}, "title").rows
    assert pooled[5:] == row[3:]


def test_only_trainings_that_both_have_are_pooled(study):
    study.results = [one for one in study.results if one.system[2:] != ("b", "askd")]
    (row,) = pooled_table(study, {"a": ["own"], "b": ["own"]}, "title").rows
    single = comparison_table(study, ["own"], "title").rows
    assert row[4] == "a" and row[5:] == next(row for row in single if row[:3] == ["a", "askd", "ce"])[3:]


def test_texts_without_speech_are_counted(study):
    rows = no_speech_table(study, "noise").rows
    assert rows[0] == ["teacher", "", "1", "0"] and rows[1] == ["a", "ce", "0/0", "0/0"]


def test_the_report_has_every_table_and_the_figure(study, tmp_path):
    timing = Timing(1.0, 1.0, 1.0)
    rows = [
        ModelSpeed(role, 1, timing, timing, timing, 0.1, 9.0, 50, None, speedup)
        for role, speedup in (("short, a", 5.0), ("short, b", 5.1), ("teacher", 1.0))
    ]
    speed = Speed("own", 4, 12.0, 3, "cpu", "float32", 1, "sdpa", rows)
    tables = write_study(study, {"a": ["own"], "b": ["own"]}, {"tiny": speed}, tmp_path, "Title")
    text = (tmp_path / "study.md").read_text()
    assert [table.title for table in tables] == re.findall("^## (.*)$", text, re.MULTILINE)
    assert (tmp_path / "study.png").stat().st_size > 10_000 and "(study.png)" in text
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    assert len(headings) == 8 and headings[-1] == "Speed"
    assert "noise: 1 clip without speech" in headings
