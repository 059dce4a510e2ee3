"""The HTML report: values, plots and sections."""

import copy

import pytest
from report_page import (
    Element,
    one_model,
    render,
    results,
    rows_of,
    scores,
    silent_set,
    speech_set,
    write_manifest,
)

from askd_hf.evaluation import report
from askd_hf.evaluation.results import EvaluatedModel, PairedComparison, Results


def test_headline_has_the_main_results(tmp_path):
    page, _ = render(results(), tmp_path)
    assert page.all("h1")[0].text == "Evaluation: tiny-2-askd vs. whisper-tiny.en"
    top = page.all("header")[0].text
    assert "2026-11-23" in top and "2 sets, 1,314 clips, 10.86 hours of audio, decoded on cpu in float32" in top
    assert "[a, b]: 95 % bootstrap confidence interval, resampled over speakers." in top
    wer, speed, size, silent = (tile.text for tile in page.all("div", "tile"))
    assert "14.23 % teacher 12.01 %" in wer
    assert "+2.22 points [+1.11, +3.33], +18.5 % relative; probability of improvement 1.2 %" in wer
    assert "librispeech-test-other, english normalizer · short-form, 1,234 clips" in wer
    assert "1.88x over the teacher at batch size 1, 2.12x at batch size 8" in speed
    assert "5 interleaved repetitions with greedy decoding; 20 clips of librispeech-test-other" in speed
    assert "cpu, float32, 2 threads" in speed
    assert "29.5 M parameters teacher 37.8 M" in size
    assert "34 of 80 clips teacher 20" in silent


def test_headline_of_several_sets_is_their_mean_with_significance(tmp_path):
    rates = {"a": (10.0, 8.0, (1.0, 3.0)), "b": (20.0, 21.0, (-2.0, -0.5)), "c": (6.0, 6.5, (-1.5, 0.5))}
    sets = [
        speech_set(
            name,
            scores={"student": scores(student), "teacher": scores(teacher)},
            comparison=PairedComparison("student", "teacher", student - teacher, ends, 0.5),
        )
        for name, (student, teacher, ends) in rates.items()
    ]
    long_form = copy.deepcopy(sets[0])
    long_form.name, long_form.method = "a-whole", "chunked"
    page, _ = render(results(sets=[*sets, long_form]), tmp_path)
    tile = page.all("div", "tile")[0].text
    assert "mean of 3 sets" in tile and "12.00 % teacher 11.83 %" in tile and "+0.17 points" in tile
    assert "; better on 1, worse on 1, no significant difference on 1" in tile
    assert "short-form; normalizer: english" in tile
    assert "long-form, chunked" in page.by_id("wer").text


def test_tables_have_the_measured_values(tmp_path):
    page, _ = render(results(), tmp_path)
    wer = rows_of(page.by_id("wer").all("table")[0])[1:]
    words = "4,321"
    assert wer == [
        ["librispeech-test-otherenglish normalizer · short-form", "student", "14.23", "[12.73, 16.48]", "4.74",
         "[4.24, 5.49]", "61", "22", "13", words],
        ["teacher", "12.01", "[10.51, 14.26]", "4.00", "[3.50, 4.75]", "50", "22", "13", words],
    ]  # fmt: skip
    speed = rows_of(page.by_id("speed").all("table")[0])[1:]
    times = ["4.12 [4.00, 4.25]", "3.50 [3.25, 60.00]"]
    assert speed[0] == ["student", "1", "1.88x", "33.2", "0.432", "7.62 [7.00, 64.00]", *times, "2,345", "988"]
    assert speed[3][:4] == ["teacher", "8", "", "29.0"]
    assert "5 interleaved repetitions with greedy decoding; 20 clips of librispeech-test-other, 188 s of audio" in (
        page.by_id("speed").text
    )
    assert "RTFx: seconds of audio transcribed per second." in page.by_id("speed").text
    assert "cpu, float32, 2 threads, sdpa attention" in page.by_id("speed").text
    assert rows_of(page.by_id("speculative").all("table")[0])[1:] == [
        ["teacher alone", "", "", "", "0.500"],
        ["as configured", "1.38", "71.2 %", "39 of 40", "0.375"],
    ]
    assert "Speculative decoding is 1.38x as fast as the teacher alone." in page.by_id("speculative").text
    assert "Tokens differ from the teacher's for a.wav, b.wav. Speedup: median" in page.by_id("speculative").text
    hallucination = rows_of(page.by_id("hallucination").all("table")[0])[1:]
    assert [row[-7:] for row in hallucination] == [
        ["student", "1.23", "13.21", "2", "0.57", "", ""],
        ["teacher", "1.23", "13.21", "2", "0.57", "", ""],
        ["student", "", "", "0", "0.57", "", "34 of 80 (42.5 %)"],
        ["teacher", "", "", "0", "0.57", "", "20 of 80 (25.0 %)"],
    ]
    hardest = rows_of(page.by_id("speakers").all("table")[0])[1:]
    assert hardest == [["2033", "41.75", "33.00"], ["1688", "20.50", "18.50"], ["367", "9.25", "8.00"]]
    sets = rows_of(page.by_id("sets").all("table")[0])[1:]
    excluded = "3 (reference empty after normalization), 2 (ignore time segment in scoring)"
    assert sets[0] == ["librispeech-test-other", "openslr/librispeech_asr", "other", "test", "en", "short-form",
                       "english", "1,234", "5.43", words, excluded, "speaker"]  # fmt: skip
    assert sets[1][-2:] == ["0", ""]
    settings = dict(rows_of(page.by_id("settings").all("table")[0]))
    assert settings == {
        "date": "2026-11-23",
        "device": "cpu",
        "dtype": "float32",
        "num_beams": "1",
        "versions.torch": "2.13",
    }


def percents(element: Element, *names: str) -> list[float]:
    return [float(element[name].removesuffix("%")) for name in names]


def scale_of(figure: Element):
    """Return a function from a position (percent of the width) to the value on the axis, from the drawn ticks."""
    ticks = [
        (percents(text, "x")[0], float(text.text.replace(report.MINUS, "-"))) for text in figure.all("text", "tick")
    ]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    assert all(v0 + (x - x0) / (x1 - x0) * (v1 - v0) == pytest.approx(v, rel=1e-3) for x, v in ticks)
    return lambda x: v0 + (x - x0) / (x1 - x0) * (v1 - v0)


def test_marks_stand_at_their_values(tmp_path):
    page, _ = render(results(), tmp_path)
    wer, difference = page.by_id("wer").all("figure")
    value = scale_of(wer)
    for shape, expected in {"circle": (14.234, 12.734, 16.484), "square": (12.012, 10.512, 14.262)}.items():
        (group,) = wer.all("g", shape)
        (mark,), (interval,) = group.all("use"), group.all("line", "interval")
        drawn = [value(x) for x in (*percents(mark, "x"), *percents(interval, "x1", "x2"))]
        assert drawn == pytest.approx(expected, abs=0.01) and mark["href"] == f"#{shape}"
        assert group.text == f"{expected[0]:.2f}"
    value, (group,) = scale_of(difference), difference.all("g", "circle")
    drawn = [value(x) for x in (*percents(group.all("use")[0], "x"), *percents(group.all("line")[0], "x1", "x2"))]
    assert drawn == pytest.approx([2.222, 1.111, 3.333], abs=0.01)
    assert "[+1.11, +3.33]" in difference.text and "probability of improvement 1.2 %" in difference.text

    errors = page.by_id("errors").all("figure")[0]
    value = scale_of(errors)
    for role, kind, count in [(0, "substitute", 61), (1, "substitute", 50), (0, "delete", 22), (1, "insert", 13)]:
        width = percents(errors.all("rect", f"fill-{kind}")[role + 1], "width")[0]  # index 0 is the legend
        assert value(width) - value(0) == pytest.approx(100 * count / 4321, abs=0.01)

    dots = page.by_id("speakers").all("figure")[0]
    value = scale_of(dots)
    drawn = [value(x) for use in dots.all("g", "square")[0].all("use") for x in percents(use, "x")]
    assert drawn == pytest.approx([18.5, 8.0, 33.0], abs=0.03)


def test_speed_against_wer_is_drawn_to_scale(tmp_path):
    found = results()
    trade = report.speed_against_wer(found)
    axis = trade.speed_axis
    assert axis.at(40) - axis.at(20) == pytest.approx(axis.at(20) - axis.at(10), abs=0.02)
    assert axis.ticks[0] <= 17.75 and axis.ticks[-1] >= 61.5
    page, _ = render(found, tmp_path)
    field = page.by_id("speed").all("div", "field")[0]
    marks = [mark for mark in field.all("use") if mark["href"] == "#circle"]
    assert [percents(mark, "x")[0] for mark in marks] == [axis.at(33.25), axis.at(61.5)]
    ticks = [(percents(text, "y")[0], float(text.text)) for text in field.all("text", "unit")[:-1]]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    y = percents(marks[0], "y")[0]
    assert v0 + (y - y0) / (y1 - y0) * (v1 - v0) == pytest.approx(14.234, abs=0.01)
    assert "WER of librispeech-test-other, english normalizer" in page.by_id("speed").text

    elsewhere = copy.deepcopy(found)
    elsewhere.speed.set = "another set"
    assert report.speed_against_wer(elsewhere).source is None
    assert "WER of the mean of 1 set" in render(elsewhere, tmp_path)[0].by_id("speed").text


@pytest.mark.parametrize(
    "values, low, high",
    [([14.2, 9.9], 0, 15), ([172.3], 0, 200), ([-0.3, 0.7], -0.4, 0.8), ([0.031], 0, 0.04), ([], 0, 1), ([0.0], 0, 1)],
)
def test_scales_end_at_round_values_around_all(values, low, high):
    axis = report.Axis.over(values)
    assert axis.ticks[0] == low and axis.ticks[-1] == high and 0 in axis.ticks
    assert 2 <= len(axis.ticks) <= 8
    assert (axis.at(low), axis.at(high)) == (0, 100)


def test_sections_without_a_measured_value_are_left_out(tmp_path):
    whole = {"wer", "errors", "speed", "speculative", "hallucination", "speakers", "sets", "settings"}

    def sections(found: Results) -> set[str]:
        page, html = render(found, tmp_path)
        assert "None" not in page.text and "nan" not in html.lower().split()
        return {section["id"] for section in page.all("section") if "id" in section.attributes}

    assert sections(results()) == whole
    assert sections(results(speed=None, speculative=None)) == whole - {"speed", "speculative"}
    assert sections(results(sets=[silent_set()], speed=None, speculative=None, settings={})) == {
        "hallucination",
        "sets",
    }
    assert sections(results(sets=[], speculative=None)) == {"speed", "settings"}
    assert sections(one_model()) == whole - {"speculative"}
    unknown = speech_set()
    for entry in unknown.scores.values():
        entry.wer_by_speaker = {}
    assert sections(results(sets=[unknown])) == whole - {"speakers"}
    write_manifest(tmp_path, "student", "librispeech-test-other", [("a", "one two", "one")])
    assert sections(results()) == whole | {"clips"}


def test_a_single_model_has_no_comparison(tmp_path):
    page, _ = render(one_model(), tmp_path)
    assert page.all("h1")[0].text == "Evaluation: tiny-2-askd" and "teacher" not in page.all("section")[0].text
    assert "[12.73, 16.48]" in page.all("div", "tile")[0].text
    assert {use["href"] for use in page.all("use")} == {"#circle"}
    assert len(page.by_id("wer").all("figure")) == 1


def test_twelve_sets_of_three_models_with_long_names(tmp_path):
    found = results()
    found.models = {
        "student": found.models["student"],
        "initial student": EvaluatedModel("x" * 300, 1, 1.0, 1, 1),
        "teacher": found.models["teacher"],
    }
    found.sets = [speech_set(f"{'a-very-long-name-of-a-set-' * 6}{i}") for i in range(12)]
    for entry in found.sets:
        entry.scores = {"student": scores(10), "initial student": scores(170), "teacher": scores(5)}
    page, _ = render(found, tmp_path)
    figure = page.by_id("wer").all("figure")[0]
    assert len(figure.all("g", "circle")) == len(figure.all("g", "diamond")) == len(figure.all("g", "square")) == 12
    table = page.by_id("wer").all("table")[0]
    assert len(table.all("tbody")) == 12 and {
        th["rowspan"] for th in table.all("th") if "rowspan" in th.attributes
    } == {"3"}
