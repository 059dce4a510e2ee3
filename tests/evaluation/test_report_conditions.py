"""Results are shown with the conditions they were measured under, in the report and the terminal."""

import copy

import pytest
from report_page import lines_of, render, results, rows_of, scores, silent_set, speech_set, write_manifest

from askd_hf.evaluation import format_results, report


def test_speed_is_said_to_be_greedy(tmp_path):
    page, _ = render(results(), tmp_path)
    assert "repetitions with greedy decoding" in page.by_id("speed").text
    assert "repetitions with greedy decoding" in page.all("div", "tile")[1].text
    assert "repetitions with greedy decoding" in format_results(results())


@pytest.mark.parametrize(
    ("student", "note"),
    [
        (4140, "The student wrote 207 tokens per clip, the teacher 37, and each token takes time."),
        (520, "The student wrote 26 tokens per clip, the teacher 37, and each token takes time."),
        (960, None),  # 1.297 times as many
    ],
)
def test_the_speedup_has_the_tokens_if_they_differ_much(tmp_path, student, note):
    found = results()
    for row in found.speed.rows:
        if row.batch_size == 1:
            row.tokens = student if row.role == "student" else 740
    page, _ = render(found, tmp_path)
    for text in (page.all("div", "tile")[1].text, format_results(found)):
        assert (note in text) if note else ("wrote" not in text)


@pytest.mark.parametrize("num_beams", [4, "4, 1"])
def test_speed_of_greedy_decoding_is_not_drawn_against_the_wer_of_beams(tmp_path, num_beams):
    found = results()
    found.settings["num_beams"] = num_beams
    assert report.speed_against_wer(found) is None
    page, _ = render(found, tmp_path)
    assert "Speed against WER" not in page.text and page.by_id("speed") is not None


def test_speed_of_the_student_alone_is_not_compared_where_the_teacher_was_scored(tmp_path):
    found = results(speculative=None)
    found.speed.rows = [row for row in found.speed.rows if row.role == "student"]
    for row in found.speed.rows:
        row.speedup = None
    page, _ = render(found, tmp_path)
    section = page.by_id("speed")
    assert "speedup" not in section.text
    table = rows_of(section.all("table")[0])
    assert table[0][:3] == ["model", "batch size", "RTFx"] and table[1][:3] == ["student", "1", "33.2"]
    assert not [tile for tile in page.all("div", "tile") if tile.text.startswith("Speed")]


def test_the_size_on_disk_has_its_dtype(tmp_path):
    found = results()
    found.models["student"].stored_dtype = "float32"
    found.models["teacher"].size_mb, found.models["teacher"].stored_dtype = 75.6, "float16"
    page, _ = render(found, tmp_path)
    sizes = [row[4] for row in rows_of(page.all("table")[0])[1:]]
    assert sizes == ["118.0 float32", "75.6 float16"]
    assert "118.0 float32" in format_results(found) and "75.6 float16" in format_results(found)


def test_made_up_text_has_its_conditions(tmp_path):
    found = results()
    page, _ = render(found, tmp_path)
    words = "clips with any word, in lower-case text without punctuation, for every normalizer"
    assert f"nonspeech, short-form; {words}" in page.all("div", "tile")[-1].text
    assert "in lower-case text without punctuation, for every normalizer" in page.by_id("hallucination").text
    row, _ = [line.split() for line in format_results(found).splitlines() if line.startswith("nonspeech ")]
    assert row == ["nonspeech", "student", "0", "0.57", "34", "of", "80", "(42.5", "%)"]


def test_clips_without_a_transcript_stand_beside_those_with_speech(tmp_path):
    both = {"student": scores(14.2, no_speech_hallucinations=4), "teacher": scores(12.0, no_speech_hallucinations=1)}
    found = results(sets=[speech_set(no_speech_clips=5, scores=both), silent_set()])
    page, _ = render(found, tmp_path)
    tile = page.all("div", "tile")[3].text
    assert "4 of 5 clips teacher 1 librispeech-test-other, short-form, clips with an empty transcript" in tile
    column = [row[-1] for row in rows_of(page.by_id("hallucination").all("table")[0])[1:]]
    assert column == ["4 of 5 (80.0 %)", "1 of 5 (20.0 %)", "34 of 80 (42.5 %)", "20 of 80 (25.0 %)"]


def test_clips_at_the_limit_of_tokens_are_shown(tmp_path):
    found = copy.deepcopy(results())
    found.sets[0].scores["student"].clips_at_limit = 3
    page, _ = render(found, tmp_path)
    table = rows_of(page.by_id("hallucination").all("table")[0])
    assert [row[-2] for row in table] == ["clips at token limit", "3", "", "", ""]


def test_clips_of_one_name_keep_their_own_texts(tmp_path):
    for role, first, second in (("student", "red cat", "few ski"), ("teacher", "red car", "glue sky")):
        rows = [("same.wav", "red car", first), ("same.wav", "blue sky", second)]
        write_manifest(tmp_path, role, "librispeech-test-other", rows)
    page, _ = render(results(), tmp_path)
    found = [[[word for _, word in line] for line in lines_of(a)] for a in page.by_id("clips").all("article")]
    assert found == [
        [["red", "car"], ["red", "cat"], ["red", "car"]],
        [["blue", "sky"], ["few", "ski"], ["glue", "sky"]],
    ]
