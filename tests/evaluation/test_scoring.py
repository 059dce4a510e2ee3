"""Scores of hand-written manifests."""

import json

import numpy as np
import pytest
from manifests import SPOKEN, write
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from askd_hf.errors import UserError
from askd_hf.evaluation import Results, format_results, save_spelling_normalizer, score_directory, write_report
from askd_hf.evaluation.excluded_clips import excluded_lines
from askd_hf.evaluation.metrics import UNIFIED, normalizer_for
from askd_hf.evaluation.results import EvaluatedModel, LongClips
from askd_hf.evaluation.word_errors import repeated_ngrams
from askd_hf.evaluation.word_times import compare_word_times


@pytest.fixture
def evaluation(tmp_path):
    save_spelling_normalizer(tmp_path / "manifests", {"colour": "color"})
    write(tmp_path, "student", [row[:3] for row in SPOKEN])
    write(tmp_path, "teacher", [(*row[:2], row[3]) for row in SPOKEN])
    return tmp_path


def edits(reference: list, prediction: list) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(prediction) + 1))
    for i, left in enumerate(reference, start=1):
        previous, row = row, [i]
        for j, right in enumerate(prediction, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (left != right)))
    return row[-1]


def test_counts_by_hand(evaluation):
    result = score_directory(evaluation).sets[0]
    assert (result.normalizer, result.clips, result.has_speech, result.bootstrap_unit) == (UNIFIED, 4, True, "clip")
    # the color of the sea mister smith; 21 ships; will not you come; a b c d
    assert result.reference_words == 7 + 2 + 4 + 4
    assert result.hours == pytest.approx(4 * 3.6 / 3600)
    assert result.excluded == {"reference empty after normalization": 1, "ignore time segment in scoring": 1}
    student, teacher = result.scores["student"], result.scores["teacher"]
    # without `the`; with `sailed away`; without `not`
    assert (student.substitutions, student.deletions, student.insertions) == (0, 2, 2)
    assert (teacher.substitutions, teacher.deletions, teacher.insertions) == (0, 1, 0)
    assert student.wer == pytest.approx(100 * 4 / 17)
    assert student.insertion_rate == pytest.approx(100 * 2 / 17)
    assert student.wer_by_speaker == pytest.approx({"ann": 100 * 3 / 9, "ben": 25.0, "cem": 0.0})
    assert result.comparison.wer_difference == pytest.approx(100 * 3 / 17)
    assert (result.comparison.system, result.comparison.baseline) == ("student", "teacher")
    assert result.comparison.confidence_interval[0] <= result.comparison.wer_difference
    assert result.comparison.wer_difference <= result.comparison.confidence_interval[1]
    assert result.comparison.probability_of_improvement < 0.1


@pytest.mark.parametrize("normalizer", ["english", "basic", "none"])
def test_rates_are_those_of_an_own_alignment(evaluation, normalizer):
    result = score_directory(evaluation, normalizer).sets[0]
    name, normalize = normalizer_for(normalizer, "en", {"colour": "color"})
    assert name == result.normalizer == normalizer
    kept = [row for row in SPOKEN[:-1] if normalize(row[1])]
    assert len(kept) == result.clips == (4 if normalizer == "english" else 5)
    for role, column in (("student", 2), ("teacher", 3)):
        pairs = [(normalize(row[1]), normalize(row[column])) for row in kept]
        words = sum(edits(a.split(), b.split()) for a, b in pairs) / sum(len(a.split()) for a, _ in pairs)
        letters = sum(edits(list(a), list(b)) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        scores = result.scores[role]
        assert (scores.wer, scores.cer) == pytest.approx((100 * words, 100 * letters))
        assert scores.substitutions + scores.deletions + scores.insertions == round(words * result.reference_words)
        assert scores.wer_confidence_interval[0] <= scores.wer <= scores.wer_confidence_interval[1]
        assert scores.cer_confidence_interval[0] <= scores.cer <= scores.cer_confidence_interval[1]


def test_normalizers_by_name():
    text = "The Colour, isn't it twenty-one?"
    spelling = {"colour": "color"}
    assert normalizer_for("english", "fr", spelling)[1](text) == "the color is not it 21"
    assert normalizer_for("english", "en", {})[1](text) == "the colour is not it 21"
    assert normalizer_for("basic", "en", spelling)[1](text) == "the colour isn t it twenty one"
    assert normalizer_for("none", "en", spelling)[1](f" {text} \n") == text
    assert [normalizer_for("auto", language, {})[0] for language in ("en", "English", None, "fr", "hi", "zh")] == [
        *[UNIFIED] * 3,
        *["multilingual"] * 2,
        "multilingual, by letter",
    ]


def test_whispers_own_are_to_the_letter():
    for text in ("I’m — “here”… (laughs) कि İşik", "ก่า 今天", "wait... Mr. Smith's 20%"):
        for name, original in (("english", EnglishTextNormalizer({})), ("basic", BasicTextNormalizer())):
            for language in ("en", "hi", "tr"):
                assert normalizer_for(name, language, {})[1](text) == " ".join(original(text).split())
        by_letter = BasicTextNormalizer(split_letters=True)(text)
        assert normalizer_for("basic", "th", {})[1](text) == " ".join(by_letter.split())
        assert normalizer_for("basic", "th", {})[0] == "basic, by letter"


def test_marks_count_in_the_table_and_in_the_reports_clips(tmp_path):
    texts = [(None, "कि की के", "की कि का"), (None, "नमस्ते", "नमस्ते!")]
    write(tmp_path, "student", texts, set={"language": "hi"})
    results = score_directory(tmp_path)
    (result,) = results.sets
    assert (result.normalizer, result.reference_words, result.has_combining_marks) == ("multilingual", 4, False)
    assert result.scores["student"].wer == 75.0
    page = write_report(results, tmp_path).read_text()
    for text in (format_results(results), page):
        assert "multilingual: removes case, punctuation and spelling variants, and keeps combining marks" in text
    assert "3 errors" in page
    ignored = score_directory(tmp_path, "basic").sets[0]
    assert (ignored.scores["student"].wer, ignored.has_combining_marks) == (0.0, True)


def test_optional_vowel_signs_are_judged_by_each_models_text(tmp_path):
    """The normalized references are the same for both models."""
    reference = "كَتَبَ الوَلَدُ"
    for role, said in (("student", "كُتِبَ الولد"), ("teacher", "كتب الولد")):
        write(tmp_path, role, [(None, reference, said)], set={"language": "ar"})
    results = score_directory(tmp_path)
    (result,) = results.sets
    assert {role: scores.wer for role, scores in result.scores.items()} == {"student": 50.0, "teacher": 0.0}
    assert result.scores["student"].cer == pytest.approx(100 * 2 / 9)
    assert "كُتِب" in write_report(results, tmp_path).read_text()


def test_a_set_without_speech_counts_hallucinations(tmp_path):
    loop = "thanks for watching this " * 4
    texts = [(None, "", "you"), (None, "", " . "), (None, " ", ""), (None, "", loop)]
    write(tmp_path, "student", texts)
    result = score_directory(tmp_path).sets[0]
    assert (result.has_speech, result.clips, result.excluded, result.reference_words) == (False, 4, {}, 0)
    scores = result.scores["student"]
    assert (result.no_speech_clips, scores.no_speech_hallucinations) == (4, 2)  # a full stop isn't a word
    assert (scores.wer, scores.wer_confidence_interval, scores.insertion_rate) == (None, None, None)
    assert (scores.capped_wer, scores.loops) == (None, 1)
    assert (scores.substitutions, scores.deletions, scores.insertions) == (0, 0, 17)
    assert scores.repeated_5grams == pytest.approx(100 * 8 / 12)  # 16 words, 12 of five, 4 different ones
    assert "2 of 4 (50.0 %)" in format_results(score_directory(tmp_path))


def test_a_loop_is_counted_and_capped(tmp_path):
    write(tmp_path, "student", [("ann", "a b c d", "a b x d"), ("ann", "e f", "e f " * 10), ("ann", "g", "h")])
    scores = score_directory(tmp_path).sets[0].scores["student"]
    assert scores.wer == pytest.approx(100 * (1 + 18 + 1) / 7)
    assert scores.capped_wer == pytest.approx(100 * (1 + 2 + 1) / 7)
    assert scores.loops == 1


def test_word_times_are_compared_with_the_teachers(tmp_path):
    texts = [("ann", "a b c", "a b c"), ("ben", "d", "d")]
    student = [[(0.0, 0.5, " A,"), (0.5, 1.0, " x"), (1.05, 2.0, " c")], [(0.3, 0.6, " d")]]
    teacher = [[(0.1, 0.5, " a"), (0.5, 1.1, " b"), (1.1, 1.7, " c.")], [(0.1, 0.6, " d")]]
    decoding = dict(num_beams=1, generation_max_length=None, timestamps="word", dtype="float32")
    write(tmp_path, "student", texts, chunks=student, decoding=decoding)
    write(tmp_path, "teacher", texts, chunks=teacher, decoding=decoding)
    results = score_directory(tmp_path)
    scores = results.sets[0].scores
    # a, c and d: 0.1 and 0, 0.05 and 0.3, 0.2 and 0 s
    found = scores["student"].word_times
    assert (found.words, found.error) == (3, pytest.approx(0.65 / 6)) and scores["teacher"].word_times is None
    assert (found.within_100ms, found.within_200ms) == (pytest.approx(100 * 4 / 6), pytest.approx(100 * 5 / 6))
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert "words  mean difference, s  within 0.1 s, %  within 0.2 s, %\n" in format_results(results)
    assert "3               0.108             66.7             83.3" in format_results(results)
    page = write_report(results, tmp_path).read_text()
    assert "<td>0.108</td>" in page and "Word timestamps" in page


def test_a_difference_beyond_the_limit_is_not_within_it():
    """Times of faster-whisper, and true ones, aren't multiples of 0.02 s; 0.3 - 0.2 is as near as 0.1."""
    true, found = [(0.2, 0.5, "a")], [(0.3, 0.605, "a")]
    times = compare_word_times([{"chunks": found}], [{"chunks": true}])
    assert (times.words, times.within_100ms, times.within_200ms) == (1, 50.0, 100.0)


def test_without_word_times_nothing_is_said_of_them(evaluation):
    results = score_directory(evaluation)
    assert results.sets[0].scores["student"].word_times is None
    assert "Word timestamps" not in format_results(results) + write_report(results, evaluation).read_text()


def test_one_clip_has_no_interval(tmp_path):
    for role, text in (("student", "a b c"), ("teacher", "a b c d")):
        write(tmp_path, role, [("ann", "a b c d", text)])
    results = score_directory(tmp_path)
    scores = results.sets[0].scores["student"]
    assert (scores.wer, scores.wer_confidence_interval, scores.cer_confidence_interval) == (25.0, None, None)
    assert results.sets[0].comparison is None
    assert "25.00 " in format_results(results)
    write_report(results, tmp_path)


def test_repeated_5grams():
    assert repeated_ngrams(["a b c d e", "a b c d e"]) == 0.0  # not in the same text
    assert repeated_ngrams(["a b c d", ""]) == 0.0
    assert repeated_ngrams(["a a a a a a"]) == 50.0
    assert repeated_ngrams(["a b c a b c a b"]) == pytest.approx(100 * 1 / 4)


def test_speakers_are_drawn_where_there_are_five(tmp_path):
    rng = np.random.default_rng(0)
    texts = [(f"s{i % 5}", "a b c d", " ".join(rng.choice(list("abcd"), size=4))) for i in range(30)]
    write(tmp_path, "student", texts)
    result = score_directory(tmp_path, "basic").sets[0]
    assert result.bootstrap_unit == "speaker"
    assert result.scores["student"].wer_by_speaker.keys() == {f"s{i}" for i in range(5)}
    assert "resampled over speakers" in format_results(score_directory(tmp_path, "basic"))


def test_results_are_saved_and_loaded(evaluation):
    results = score_directory(evaluation)
    results.save(evaluation / "results.json")
    assert Results.load(evaluation / "results.json") == results
    assert json.loads((evaluation / "results.json").read_text())["sets"][0]["normalizer"] == UNIFIED
    text = format_results(results)
    assert "english" in text
    assert "spoken: excluded clips: 1 (reference empty after normalization), 1 (ignore" in text
    assert "23.53 [" in text  # 4 / 17


@pytest.mark.parametrize("limit, others, advised", [(6.0, [], True), (5.0, [], False), (6.0, ["sequential"], False)])
def test_long_clips_are_told_above_the_error_rates(tmp_path, limit, others, advised):
    model = EvaluatedModel("runs/tiny", 1000, 0.5, 2, 2, window=6.0)
    long = LongClips(limit, 5, 15, 41.4, ["ann", "bob", "cem", "dee"])
    texts = [("eve", "a b c", "a b")]
    write(tmp_path, "student", texts, model=model, excluded={"longer than 6 s": 5}, long_clips=long)
    for method in others:
        write(tmp_path, "student", texts, model=model, name=f"spoken-{method}", method=method)
    results = score_directory(tmp_path, "basic")
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").sets[0].long_clips == long
    above = format_results(results).split("Error rates:")[0]
    line = "spoken: excluded clips: 5 (longer than 6 s). The long ones are 5 of 15 clips with 41 % of the text, "
    assert f"{line}among them all of speakers ann, bob, cem and 1 more\n" in above
    assert ("--long_form sequential evaluates the long ones too" in above) == advised
    assert excluded_lines(results.sets) == [f"{line}among them all of 4 speakers"]  # a card names no speaker


def test_settings_that_differ_are_all_listed(evaluation):
    settings = score_directory(evaluation).settings
    assert (settings["num_beams"], settings["batch_size"], settings["device"]) == (1, 4, "cpu")
    write(evaluation, "student", [row[:3] for row in SPOKEN], name="another", runtime=dict(batch_size=8, device="cpu"))
    settings = score_directory(evaluation).settings
    assert (settings["num_beams"], settings["batch_size"], settings["device"]) == (1, "8, 4", "cpu")


def test_the_intervals_are_the_same_every_time(evaluation):
    assert score_directory(evaluation) == score_directory(evaluation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(complete=False), r"teacher/spoken\.jsonl is incomplete\. .* again"),
        (dict(data="ffff"), "other clips or transcripts than the manifest of the student"),
        (dict(decoding={"num_beams": 5}), "was decoded with .*'num_beams': 5"),
    ],
)
def test_manifests_that_cannot_be_compared(evaluation, change, message):
    file = evaluation / "manifests" / "teacher" / "spoken.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        score_directory(evaluation)


def test_manifests_of_two_models_in_one_role(evaluation):
    write(evaluation, "student", [row[:3] for row in SPOKEN], name="another")
    file = evaluation / "manifests" / "student" / "another.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": "ffff"}))
    with pytest.raises(UserError, match="of another model"):
        score_directory(evaluation)


def test_nothing_to_score(tmp_path):
    with pytest.raises(UserError, match="has no manifests"):
        score_directory(tmp_path)
    write(tmp_path, "student", [(None, "IGNORE_TIME_SEGMENT_IN_SCORING", "x")])
    with pytest.raises(UserError, match="all clips are excluded"):
        score_directory(tmp_path)
