"""The HTML report: what it shows, what it leaves out, what it can't be made to do."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest

from askd_hf.evaluation import report, worst_clips
from askd_hf.evaluation.results import (
    ModelFacts,
    Paired,
    Results,
    Scores,
    SetResult,
    Speculative,
    Speed,
    SpeedOfModel,
    Timing,
)

VOID = {"br", "hr", "img", "input", "link", "meta"}
TIMES = "\N{MULTIPLICATION SIGN}"
MAY_STAND_ALONE = {"circle", "line", "path", "rect", "use"}  # of SVG, closed by themselves
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/a.png onerror=alert(1)>{{ 7 * 7 }}'


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None], parent: "Element | None"):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Element | str] = []

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    def all(self, tag: str, cls: str | None = None) -> list["Element"]:
        """All elements within of that name and class, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (cls is None or cls in (child.attributes.get("class") or "").split()):
                    found.append(child)
                found += child.all(tag, cls)
        return found

    def by_id(self, name: str) -> "Element | None":
        for child in self.children:
            if isinstance(child, Element):
                if child.attributes.get("id") == name:
                    return child
                if found := child.by_id(name):
                    return found
        return None

    @property
    def text(self) -> str:
        texts = [child if isinstance(child, str) else child.text for child in self.children]
        return re.sub(r"\s+", " ", "".join(texts)).strip()


class Page(HTMLParser):
    """A tree of elements; asserts that each is closed where it should be."""

    def __init__(self, html: str):
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(html)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs), self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attrs):
        assert tag in MAY_STAND_ALONE, f"<{tag}/>"
        self.here.children.append(Element(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def scores(wer: float | None, **changes) -> Scores:
    spoken = wer is not None
    defaults = dict(
        wer=wer,
        wer_interval=(wer - 1.5, wer + 2.25) if spoken else None,
        cer=wer / 3 if spoken else None,
        cer_interval=(wer / 3 - 0.5, wer / 3 + 0.75) if spoken else None,
        substitutions=61,
        deletions=22,
        insertions=13,
        insertion_rate=1.234 if spoken else None,
        repeated_5grams=0.567,
        clips_with_text=37,
        seconds=12.0,
    )
    return Scores(**defaults | changes)


def speech_set(name: str = "librispeech-test-other", **changes) -> SetResult:
    defaults = dict(
        name=name,
        dataset="openslr/librispeech_asr",
        config="other",
        split="test",
        language="en",
        method="short",
        normalizer="english",
        clips=1234,
        dropped={"reference empty after normalisation": 3, "ignore time segment in scoring": 2},
        hours=5.432,
        reference_words=4321,
        speech=True,
        blocks="speaker",
        scores={
            "student": scores(14.234, wer_by_speaker={"1688": 20.5, "367": 9.25, "2033": 41.75}),
            "teacher": scores(12.012, substitutions=50, wer_by_speaker={"1688": 18.5, "367": 8.0, "2033": 33.0}),
        },
        paired=Paired("student", "teacher", 2.222, (1.111, 3.333), 0.012),
    )
    return SetResult(**defaults | changes)


def silent_set() -> SetResult:
    return speech_set(
        "nonspeech",
        dataset="noises",
        config=None,
        clips=80,
        reference_words=0,
        speech=False,
        dropped={},
        scores={"student": scores(None, clips_with_text=34), "teacher": scores(None, clips_with_text=20)},
        paired=None,
    )


def speed_row(role: str, batch_size: int, rtfx: float, times_faster: float | None) -> SpeedOfModel:
    encoder, decoder = Timing(4.125, 4.0, 4.25), Timing(3.5 * batch_size, 3.25, 60.0)
    total = Timing(encoder.median + decoder.median, 7.0, 64.0)
    return SpeedOfModel(role, batch_size, encoder, decoder, total, 0.4321, rtfx, 2345, 987.6, times_faster)


def results(**changes) -> Results:
    defaults = dict(
        models={
            "student": ModelFacts("runs/tiny-2-askd", 29_502_720, 118.04, 4, 2),
            "teacher": ModelFacts("openai/whisper-tiny.en", 37_760_256, None, 4, 4),
        },
        settings={
            "date": "2026-11-23",
            "device": "cpu",
            "dtype": "float32",
            "num_beams": 1,
            "versions": {"torch": "2.13"},
        },
        sets=[speech_set(), silent_set()],
        speed=Speed(
            "librispeech-test-other",
            20,
            187.65,
            5,
            "cpu",
            "float32",
            2,
            "sdpa",
            [
                speed_row("student", 1, 33.25, 1.875),
                speed_row("student", 8, 61.5, 2.125),
                speed_row("teacher", 1, 17.75, None),
                speed_row("teacher", 8, 29.0, None),
            ],
        ),
        speculative=Speculative(
            "librispeech-test-other", 40, 39, 0.7125, 1.375, Timing(20, 19, 22), Timing(15, 14, 17)
        ),
    )
    return Results(**defaults | changes)


def one_model() -> Results:
    alone = copy.deepcopy(results(speculative=None))
    del alone.models["teacher"]
    for entry in alone.sets:
        del entry.scores["teacher"]
        entry.paired = None
    alone.speed.rows = [row for row in alone.speed.rows if row.role == "student"]
    for row in alone.speed.rows:
        row.times_faster = None
    return alone


def write_manifest(folder: Path, role: str, name: str, rows: list[tuple], speaker: str | None = None) -> None:
    file = folder / "manifests" / role / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip, reference, prediction in rows:
        row = dict(clip=clip, reference=reference, prediction=prediction, duration=4.2, seconds=0.1)
        lines.append(json.dumps(row | ({"speaker": speaker} if speaker else {}), ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def render(found: Results, folder: Path) -> tuple[Element, str]:
    path = report.write_report(found, folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    return Page(html).root, html


def rows_of(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.all("tr")]


def test_headline_says_what_was_compared_and_the_figures_that_matter(tmp_path):
    page, _ = render(results(), tmp_path)
    assert page.all("h1")[0].text == "tiny-2-askd beside whisper-tiny.en"
    top = page.all("header")[0].text
    assert "2026-11-23" in top and "2 sets, 1,314 clips, 10.86 hours of audio, on cpu in float32" in top
    wer, speed, size, silent = (tile.text for tile in page.all("div", "tile"))
    assert "14.23 % teacher 12.01 %" in wer
    assert "+2.22 points, interval +1.11 to +3.33; probability of improvement 1.2 %" in wer
    assert "librispeech-test-other, english normaliser · short clips, 1,234 clips" in wer
    assert f"1.88{TIMES} as fast as the teacher at batch 1, 2.12{TIMES} at batch 8" in speed
    assert "cpu, float32, 2 threads, 20 clips of librispeech-test-other, 5 interleaved repetitions" in speed
    assert "29.5 M parameters teacher 37.8 M" in size
    assert "34 of 80 clips teacher 20" in silent


def test_headline_of_many_sets_is_their_mean_and_counts_what_the_intervals_say(tmp_path):
    rates = {"a": (10.0, 8.0, (1.0, 3.0)), "b": (20.0, 21.0, (-2.0, -0.5)), "c": (6.0, 6.5, (-1.5, 0.5))}
    sets = [
        speech_set(
            name,
            scores={"student": scores(student), "teacher": scores(teacher)},
            paired=Paired("student", "teacher", student - teacher, ends, 0.5),
        )
        for name, (student, teacher, ends) in rates.items()
    ]
    long_form = copy.deepcopy(sets[0])
    long_form.name, long_form.method = "a-whole", "chunked"
    page, _ = render(results(sets=[*sets, long_form]), tmp_path)
    tile = page.all("div", "tile")[0].text
    assert "mean of 3 sets" in tile and "12.00 % teacher 11.83 %" in tile and "+0.17 points" in tile
    assert "; better on 1, worse on 1, undecided on 1" in tile
    assert "short clips; normaliser: english" in tile
    assert "long-form, chunked" in page.by_id("wer").text


def test_every_figure_of_the_tables_is_the_measured_one(tmp_path):
    page, _ = render(results(), tmp_path)
    wer = rows_of(page.by_id("wer").all("table")[0])[1:]
    words = "4,321"
    assert wer == [
        ["librispeech-test-otherenglish normaliser · short clips", "student", "14.23", "12.73 to 16.48", "4.74",
         "4.24 to 5.49", "61", "22", "13", words],
        ["teacher", "12.01", "10.51 to 14.26", "4.00", "3.50 to 4.75", "50", "22", "13", words],
    ]  # fmt: skip
    speed = rows_of(page.by_id("speed").all("table")[0])[1:]
    times = ["4.12 4.00 to 4.25", "3.50 3.25 to 60.00"]
    assert speed[0] == ["student", "1", "1.88", "33.2", "0.432", "7.62 7.00 to 64.00", *times, "2,345", "988",
                        "29,502,720", "118.0"]  # fmt: skip
    assert speed[3][:4] == ["teacher", "8", "", "29.0"] and speed[3][-1] == ""
    assert "20 clips of librispeech-test-other, 187.7 s of audio, transcribed 5 times" in page.by_id("speed").text
    assert "cpu, float32, 2 threads, sdpa attention" in page.by_id("speed").text
    assert [row[1] for row in rows_of(page.by_id("speculative").all("table")[0])[1:]] == [
        "1.38", "71.2 %", "39 of 40", "20.00 19.00 to 22.00", "15.00 14.00 to 17.00"
    ]  # fmt: skip
    hallucination = rows_of(page.by_id("hallucination").all("table")[0])[1:]
    assert [row[-5:] for row in hallucination] == [
        ["student", "1.23", "0.57", "", ""],
        ["teacher", "1.23", "0.57", "", ""],
        ["student", "", "0.57", "", "34 of 80 (42.5 %)"],
        ["teacher", "", "0.57", "", "20 of 80 (25.0 %)"],
    ]
    hardest = rows_of(page.by_id("speakers").all("table")[0])[1:]
    assert hardest == [["2033", "41.75", "33.00"], ["1688", "20.50", "18.50"], ["367", "9.25", "8.00"]]
    sets = rows_of(page.by_id("sets").all("table")[0])[1:]
    dropped = "3 reference empty after normalisation, 2 ignore time segment in scoring"
    assert sets[0] == ["librispeech-test-other", "openslr/librispeech_asr", "other", "test", "en", "short clips",
                       "english", "1,234", "5.43", words, dropped, "speakers"]  # fmt: skip
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
    """The value at a place (percent of the width), from the ticks as they are drawn."""
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
    assert "+1.11 to +3.33" in difference.text and "probability of improvement 1.2 %" in difference.text

    errors = page.by_id("errors").all("figure")[0]
    value = scale_of(errors)
    for role, kind, count in [(0, "substitute", 61), (1, "substitute", 50), (0, "delete", 22), (1, "insert", 13)]:
        width = percents(errors.all("rect", f"fill-{kind}")[role + 1], "width")[0]  # 0 is the legend
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
    assert "WER: librispeech-test-other, english normaliser" in page.by_id("speed").text

    elsewhere = copy.deepcopy(found)
    elsewhere.speed.set = "another set"
    assert report.speed_against_wer(elsewhere).source is None
    assert "WER: mean of 1 set" in render(elsewhere, tmp_path)[0].by_id("speed").text


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
    assert sections(results()) == whole | {"worst"}


def test_one_model_is_compared_with_none(tmp_path):
    page, _ = render(one_model(), tmp_path)
    assert page.all("h1")[0].text == "tiny-2-askd" and "teacher" not in page.all("section")[0].text
    assert "interval 12.73 to 16.48" in page.all("div", "tile")[0].text
    assert {use["href"] for use in page.all("use")} == {"#circle"}
    assert len(page.by_id("wer").all("figure")) == 1


def test_twelve_sets_of_three_models_with_long_names(tmp_path):
    found = results()
    found.models = {
        "student": found.models["student"],
        "student before": ModelFacts("x" * 300, 1, 1.0, 1, 1),
        "teacher": found.models["teacher"],
    }
    found.sets = [speech_set(f"{'a-very-long-name-of-a-set-' * 6}{i}") for i in range(12)]
    for entry in found.sets:
        entry.scores = {"student": scores(10), "student before": scores(170), "teacher": scores(5)}
    page, _ = render(found, tmp_path)
    figure = page.by_id("wer").all("figure")[0]
    assert len(figure.all("g", "circle")) == len(figure.all("g", "diamond")) == len(figure.all("g", "square")) == 12
    table = page.by_id("wer").all("table")[0]
    assert len(table.all("tbody")) == 12 and {
        th["rowspan"] for th in table.all("th") if "rowspan" in th.attributes
    } == {"3"}


# ---------------------------------------------------------------------------------------------------------------------
# worst clips

SAID = [  # clip, reference, student, teacher
    ("right", "He came in.", "he came in", "He came in!"),
    (
        "mixed",
        "The colour of the old house was red",
        "The color of an house it was red",
        "colour of old house was read",
    ),
    (
        "worst",
        "Nobody knows where they went after",
        "Thank you. Thank you. Thank you.",
        "nobody knows where they went",
    ),
    ("loop", "so it goes", "so it goes so it goes so it goes", "so it goes"),
    ("silence", "", "Thank you for watching and do subscribe to all of it", "you"),
    ("untranscribed", "ignore_time_segment_in_scoring", "this was never transcribed by anybody at all", "x"),
]


def write_manifests(folder: Path, name: str = "librispeech-test-other", said: list[tuple] = SAID) -> None:
    write_manifest(folder, "student", name, [(clip, reference, text) for clip, reference, text, _ in said], "1688")
    write_manifest(folder, "teacher", name, [(clip, reference, text) for clip, reference, _, text in said])


def distance(a: list[str], b: list[str]) -> int:
    """Edits between two lists of words, by the textbook."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def lines_of(article: Element) -> list[list[tuple[str, str]]]:
    """The reference and each model's line as (tag, word); words that were cut count as nothing."""
    columns = [
        span.children for span in article.all("div", "words")[0].all("span") if span.attributes.get("class") != "cut"
    ]
    columns = [[child for child in column if isinstance(child, Element)] for column in columns]
    return [[(cell.tag, cell.text) for cell in line] for line in zip(*columns, strict=True)]


def test_worst_clips_come_first_and_unscored_ones_never(tmp_path):
    write_manifests(tmp_path)
    page, _ = render(results(), tmp_path)
    worst = page.by_id("worst")
    names = [article.all("header")[0].all("span")[0].text for article in worst.all("article")]
    assert names == ["loop, speaker 1688", "worst, speaker 1688", "mixed, speaker 1688"]
    assert "3 of the 3 clips with errors, of 1,234" in worst.all("summary")[0].text
    assert "english normaliser" in worst.all("summary")[0].text


def test_aligned_words_are_the_texts_and_the_marks_their_edits(tmp_path):
    write_manifests(tmp_path)
    page, _ = render(results(), tmp_path)
    normalised = {clip: [re.sub(r"[.!]", "", text).lower() for text in texts] for clip, *texts in SAID}
    for article in page.by_id("worst").all("article"):
        header = article.all("header")[0]
        reference, *said = (text.split() for text in normalised[header.all("span")[0].text.partition(",")[0]])
        first, *lines = lines_of(article)
        assert [word for _, word in first if word] == reference
        for line, words, head in zip(lines, said, header.all("span")[2:], strict=True):
            assert [word for tag, word in line if word and tag != "del"] == words
            marks = [tag for tag, _ in line if tag in ("mark", "del", "ins")]
            assert len(marks) == distance(reference, words)
            for (_, expected), (tag, word) in zip(first, line, strict=True):
                assert {
                    "i": word in (expected, "") and (word != "" or expected == ""),
                    "mark": word != expected != "",
                    "del": word == expected != "",
                    "ins": expected == "" != word,
                }[tag]
            counts = [marks.count(tag) for tag in ("mark", "del", "ins")]
            assert f"{len(marks)} error" in head.text
            assert "({} S, {} D, {} I)".format(*counts) in head.text


def test_the_spelling_list_beside_the_manifests_is_used(tmp_path):
    write_manifests(tmp_path)
    (tmp_path / "manifests" / "normalizer.json").write_text('{"colour": "color"}')
    page, _ = render(results(), tmp_path)
    mixed = next(article for article in page.by_id("worst").all("article") if "mixed" in article.text)
    assert ("b", "color") in lines_of(mixed)[0] and ("i", "color") in lines_of(mixed)[1]


def test_sets_without_speech_show_what_was_made_up(tmp_path):
    write_manifests(tmp_path, "nonspeech", [("rain", "", "Thank you.", ""), ("dog", "", "", "woof")])
    page, _ = render(results(), tmp_path)
    (article,) = page.by_id("worst").all("article")
    reference, student, teacher = lines_of(article)
    assert student == [("ins", "thank"), ("ins", "you")]
    assert [word for _, word in reference + teacher] == [""] * 4


@pytest.mark.parametrize("where", ["prediction", "reference", "clip", "speaker"])
def test_text_is_escaped_wherever_it_stands(tmp_path, where):
    row = dict(clip="a", reference="one two", prediction="one", duration=1.0, seconds=0.1, speaker="s") | {
        where: HOSTILE
    }
    file = tmp_path / "manifests" / "student" / "librispeech-test-other.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(row) + "\n")
    found = results(sets=[speech_set(normalizer="none")])
    found.models["student"].name = found.sets[0].dataset = found.settings["note"] = HOSTILE
    found.sets[0].dropped = {HOSTILE: 1}
    found.sets[0].scores["student"].wer_by_speaker[HOSTILE] = 50.0
    page, html = render(found, tmp_path)
    assert not page.all("script") and not page.all("img")
    assert "<script" not in html and "<img" not in html
    assert "alert(" in page.by_id("worst").text and "{{ 7 * 7 }}" in page.by_id("settings").text


def test_the_page_needs_and_asks_for_nothing_else(tmp_path):
    write_manifests(tmp_path)
    page, html = render(results(), tmp_path)
    assert "://" not in html and "url(" not in html and "@import" not in html
    assert not [
        tag for tag in ("script", "link", "iframe", "img", "object", "style") if len(page.all(tag)) > (tag == "style")
    ]
    ids = {
        element["id"] for tag in ("circle", "rect", "path") for element in page.all(tag) if "id" in element.attributes
    }
    assert {use["href"].removeprefix("#") for use in page.all("use")} <= ids
    policy = [meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy[0]["content"]
    assert html == render(results(), tmp_path)[1]  # the same each time


def test_right_to_left_and_unspaced_text(tmp_path):
    said = [
        ("ar", "مرحبا بكم في البيت", "مرحبا بك البيت", "مرحبا بكم"),
        ("zh", "今天天气很好", "今天天汽很好", "今天天气很好"),
    ]
    write_manifests(tmp_path, said=said)
    found = results(sets=[speech_set(normalizer="basic", language="ar")])
    page, _ = render(found, tmp_path)
    lines = {article.all("header")[0].all("span")[0].text[:2]: lines_of(article) for article in page.all("article")}
    # one word of five is gone, and one is another: as good either way round
    assert [tag for tag, _ in lines["ar"][1]] in (["i", "mark", "del", "i"], ["i", "del", "mark", "i"])
    assert lines["zh"][1:] == [[("mark", "今天天汽很好")], [("i", "今天天气很好")]]
    assert {words["dir"] for words in page.all("div", "words")} == {"auto"}


def test_only_the_worst_of_many_clips_are_shown(tmp_path):
    reference = [f"w{i}" for i in range(40)]
    said = [(f"clip-{i:05d}", " ".join(reference), " ".join(reference[i % 41 :])) for i in range(10_000)]
    for role in ("student", "teacher"):
        write_manifest(tmp_path, role, "librispeech-test-other", said)
    page, html = render(results(sets=[speech_set(normalizer="none")]), tmp_path)
    articles = page.by_id("worst").all("article")
    assert len(articles) == worst_clips.WORST_CLIPS == 20
    # all 40 words are missing in every 41st; equally bad ones by name
    names = [article.all("header")[0].all("span")[0].text for article in articles]
    assert names == [f"clip-{40 + 41 * i:05d}" for i in range(20)]
    assert len(html) < 1_000_000


def test_long_clips_are_cut_between_errors_and_at_the_end(tmp_path):
    reference = [f"w{i}" for i in range(9_000)]
    student = [*reference[:100], "wrong", *reference[101:5_000]]
    write_manifest(tmp_path, "student", "librispeech-test-other", [("hour", " ".join(reference), " ".join(student))])
    page, _ = render(results(sets=[speech_set(normalizer="none", method="sequential")]), tmp_path)
    (article,) = page.by_id("worst").all("article")
    near = worst_clips.NEIGHBOURS
    cuts = [span.text for span in article.all("span", "cut")]
    assert cuts[:2] == [f"… {100 - near} right …", f"… {5_000 - 101 - 2 * near:,} right …"]
    first, line = lines_of(article)
    assert [word for _, word in first][: 2 * near + 1] == reference[100 - near : 101 + near]
    deleted = [tag for tag, _ in line].count("del")
    assert 4_001 == 1 + 4_000 and cuts[2] == f"… {4_000 - deleted:,} more words, not shown"
    assert len(first) == worst_clips.MOST_COLUMNS - 2


def test_a_loop_is_cut(tmp_path):
    write_manifest(tmp_path, "student", "nonspeech", [("rain", "", "over and out " * 100)])
    write_manifest(tmp_path, "teacher", "nonspeech", [("rain", "", "over")])
    page, _ = render(results(), tmp_path)
    (article,) = page.by_id("worst").all("article")
    longest = worst_clips.LONGEST_INSERTION
    _, student, teacher = lines_of(article)
    assert student == [("ins", word) for word in ("over and out " * 100).split()[:longest]]
    assert teacher == [("ins", "over"), *[("i", "")] * (longest - 1)]
    assert [span.text for span in article.all("span", "cut")] == [f"… {300 - longest} more too many …"]
    assert "300 errors (0 S, 0 D, 300 I)" in article.text


def test_an_undefined_name_in_the_template_is_an_error(tmp_path):
    environment = report._environment()
    assert environment.undefined is jinja2.StrictUndefined
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ results.nothing_like_it }}").render(results=results())


def test_numbers_are_rounded_and_signed():
    assert (
        report._signed(-0.001) == "+0.00"
        and report._signed(-1.239) == f"{report.MINUS}1.24"
        and report._signed(2) == "+2.00"
    )
    assert report._number(1234567.891, 2) == "1,234,567.89" and report._share(0.98765) == "98.8 %"
