"""The HTML report: single clips, escaping and determinism."""

import base64
import hashlib
import json
import re
from pathlib import Path

import jinja2
import pytest
from manifests import SETTINGS
from report_page import HOSTILE, lines_of, one_model, render, results, speech_set, write_manifest

from askd_hf.data.json_files import write_json
from askd_hf.evaluation import report, report_clips

# ---------------------------------------------------------------------------------------------------------------------
# clips

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
    ("better", "We met again", "we met again", "we meat"),
    ("loop", "so it goes", "so it goes so it goes so it goes", "so it goes"),
    ("silence", "", "Thank you for watching and do subscribe to all of it", "you"),
    ("untranscribed", "ignore_time_segment_in_scoring", "this was never transcribed by anybody at all", "x"),
]


def write_manifests(folder: Path, name: str = "librispeech-test-other", said: list[tuple] = SAID) -> None:
    write_manifest(folder, "student", name, [(clip, reference, text) for clip, reference, text, _ in said], "1688")
    write_manifest(folder, "teacher", name, [(clip, reference, text) for clip, reference, _, text in said])


def distance(a: list[str], b: list[str]) -> int:
    """Return the Levenshtein distance of two lists of words."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def listed(page) -> dict[str, list[str]]:
    """Return the names of the clips in each list, with the difference of errors in front, by the list's title."""
    return {
        details.all("summary")[0].text: [
            " ".join(part.text for part in (article.all("strong") + article.all("header")[0].all("span"))[:2])
            for article in details.all("article")
        ]
        for details in page.by_id("clips").all("details")
    }


def test_clips_that_differ_most_come_first_and_unscored_ones_never(tmp_path):
    write_manifests(tmp_path)
    page, _ = render(results(), tmp_path)
    assert listed(page) == {
        "The student is worse than the teacher 3 of 3 clips with more errors, of 1,234 in total": [
            "+6 errors loop, speaker 1688",
            "+5 errors worst, speaker 1688",
            "+1 error mixed, speaker 1688",
        ],
        "The student is better than the teacher 1 of 1 clip with fewer errors, of 1,234 in total": [
            f"{report.MINUS}2 errors better, speaker 1688"
        ],
    }
    assert "english normalizer" in page.by_id("clips").all("h3")[0].text


def test_without_a_teacher_the_clips_with_the_most_errors_come_first(tmp_path):
    write_manifest(tmp_path, "student", "librispeech-test-other", [said[:3] for said in SAID])
    page, _ = render(one_model(), tmp_path)
    ((title, names),) = listed(page).items()
    assert title == "Most errors of the student 3 of 3 clips with errors, of 1,234 in total"
    assert [name.split()[0] for name in names] == ["loop", "worst", "mixed"] and not page.by_id("clips").all("strong")


def test_aligned_words_are_the_texts_and_the_marks_their_edits(tmp_path):
    write_manifests(tmp_path)
    page, _ = render(results(), tmp_path)
    normalized = {clip: [re.sub(r"[.!]", "", text).lower() for text in texts] for clip, *texts in SAID}
    for article in page.by_id("clips").all("article"):
        header = article.all("header")[0]
        reference, *said = (text.split() for text in normalized[header.all("span")[0].text.partition(",")[0]])
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
    write_manifest(tmp_path, "student", "librispeech-test-other", [said[:3] for said in SAID])
    (tmp_path / "manifests" / "normalizer.json").write_text('{"colour": "color"}')
    page, _ = render(results(), tmp_path)
    mixed = next(article for article in page.by_id("clips").all("article") if "mixed" in article.text)
    assert ("b", "color") in lines_of(mixed)[0] and ("i", "color") in lines_of(mixed)[1]


def test_sets_without_speech_show_what_was_made_up(tmp_path):
    write_manifests(tmp_path, "nonspeech", [("rain", "", "Thank you.", ""), ("dog", "", "", "woof")])
    page, _ = render(results(), tmp_path)
    rain, dog = page.by_id("clips").all("article")
    reference, student, teacher = lines_of(rain)
    assert student == [("ins", "thank"), ("ins", "you")]
    assert [word for _, word in reference + teacher] == [""] * 4
    assert lines_of(dog)[1:] == [[("i", "")], [("ins", "woof")]]


@pytest.mark.parametrize("where", ["prediction", "reference", "clip", "speaker"])
def test_text_is_escaped_wherever_it_stands(tmp_path, where):
    row = dict(clip="a", reference="one two", prediction="one", duration=1.0, seconds=0.1, speaker="s") | {
        where: HOSTILE
    }
    file = tmp_path / "manifests" / "student" / "librispeech-test-other.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(row) + "\n")
    write_json(file.with_suffix(".json"), SETTINGS)
    found = results(sets=[speech_set(normalizer="none")])
    found.models["student"].name = found.sets[0].dataset = found.settings["note"] = HOSTILE
    found.sets[0].excluded = {HOSTILE: 1}
    found.sets[0].scores["student"].wer_by_speaker[HOSTILE] = 50.0
    page, html = render(found, tmp_path)
    assert len(page.all("script")) == html.count("<script") == 1 and "<img" not in html
    assert "alert(" in page.by_id("clips").text and "{{ 7 * 7 }}" in page.by_id("settings").text


def test_the_page_needs_and_asks_for_nothing_else(tmp_path):
    write_manifests(tmp_path)
    page, html = render(results(), tmp_path)
    assert "://" not in html and "url(" not in html and "@import" not in html
    assert not [
        tag
        for tag in ("script", "link", "iframe", "img", "object", "style")
        if len(page.all(tag)) > (tag in ("script", "style"))
    ]
    ids = {
        element["id"] for tag in ("circle", "rect", "path") for element in page.all(tag) if "id" in element.attributes
    }
    assert {use["href"].removeprefix("#") for use in page.all("use")} <= ids
    policy = [meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256("".join(script.children).encode()).digest()).decode()
    assert policy[0]["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; media-src data:; script-src 'sha256-{digest}'"
    )
    assert not script.attributes
    sections = [section["id"] for section in page.all("section") if "id" in section.attributes]
    assert [link["href"] for link in page.all("nav")[0].all("a")] == [f"#{name}" for name in sections]
    assert html == render(results(), tmp_path)[1]  # deterministic


def test_right_to_left_and_unspaced_text(tmp_path):
    said = [
        ("ar", "مرحبا بكم في البيت", "مرحبا بك البيت", "مرحبا بكم في"),
        ("zh", "今天天气很好", "今天天汽很好", "今天天气很好"),
    ]
    write_manifests(tmp_path, said=said)
    found = results(sets=[speech_set(normalizer="basic", language="ar")])
    page, _ = render(found, tmp_path)
    lines = {article.all("header")[0].all("span")[0].text[:2]: lines_of(article) for article in page.all("article")}
    # a substitution and a deletion; both orders are optimal
    assert [tag for tag, _ in lines["ar"][1]] in (["i", "mark", "del", "i"], ["i", "del", "mark", "i"])
    assert lines["zh"][1:] == [[("mark", "今天天汽很好")], [("i", "今天天气很好")]]
    assert {words["dir"] for words in page.all("div", "words")} == {"auto"}


@pytest.mark.parametrize(("wrong", "right"), [("student", "teacher"), ("teacher", "student")])
def test_only_the_first_of_many_clips_are_shown(tmp_path, wrong, right):
    reference = [f"w{i}" for i in range(40)]
    whole = " ".join(reference)
    names = [f"clip-{i:05d}" for i in range(10_000)]
    said = [(name, whole, " ".join(reference[i % 41 :])) for i, name in enumerate(names)]
    write_manifest(tmp_path, wrong, "librispeech-test-other", said)
    write_manifest(tmp_path, right, "librispeech-test-other", [(name, whole, whole) for name in names])
    page, html = render(results(sets=[speech_set(normalizer="none")]), tmp_path)
    ((title, shown),) = listed(page).items()
    assert ("worse" if wrong == "student" else "better") in title and "20 of 9,756 clips" in title
    assert len(shown) == report_clips.MAX_CLIPS == 20
    # all 40 words are missing in every 41st clip; ties are sorted by name
    sign = "+" if wrong == "student" else report.MINUS
    assert shown == [f"{sign}40 errors clip-{40 + 41 * i:05d}" for i in range(20)]
    assert len(html) < 1_000_000


def test_long_clips_are_cut_between_errors_and_at_the_end(tmp_path):
    reference = [f"w{i}" for i in range(9_000)]
    student = [*reference[:100], "wrong", *reference[101:5_000]]
    write_manifest(tmp_path, "student", "librispeech-test-other", [("hour", " ".join(reference), " ".join(student))])
    page, _ = render(results(sets=[speech_set(normalizer="none", method="sequential")]), tmp_path)
    (article,) = page.by_id("clips").all("article")
    near = report_clips.CONTEXT_WORDS
    cuts = [span.text for span in article.all("span", "cut")]
    assert cuts[:2] == [f"… {100 - near} correct …", f"… {5_000 - 101 - 2 * near:,} correct …"]
    first, line = lines_of(article)
    assert [word for _, word in first][: 2 * near + 1] == reference[100 - near : 101 + near]
    deleted = [tag for tag, _ in line].count("del")
    assert 4_001 == 1 + 4_000 and cuts[2] == f"… {4_000 - deleted:,} more words, not shown"
    assert len(first) == report_clips.MAX_COLUMNS - 2


def test_a_loop_is_cut(tmp_path):
    write_manifest(tmp_path, "student", "nonspeech", [("rain", "", "over and out " * 100)])
    write_manifest(tmp_path, "teacher", "nonspeech", [("rain", "", "over")])
    page, _ = render(results(), tmp_path)
    (article,) = page.by_id("clips").all("article")
    longest = report_clips.MAX_INSERTION
    _, student, teacher = lines_of(article)
    assert student == [("ins", word) for word in ("over and out " * 100).split()[:longest]]
    assert teacher == [("ins", "over"), *[("i", "")] * (longest - 1)]
    assert [span.text for span in article.all("span", "cut")] == [f"… {300 - longest} more inserted …"]
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
