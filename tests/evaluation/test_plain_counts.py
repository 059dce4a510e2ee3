"""Measures that don't depend on the normalizer, and languages without spaces or with combining marks."""

import json

import jiwer
import pytest
from manifests import SPOKEN, write

from askd_hf.errors import UserError
from askd_hf.evaluation import Results, format_results, save_spelling_normalizer, score_directory, write_report
from askd_hf.evaluation.metrics import BY_LETTER, normalizer_for
from askd_hf.evaluation.word_errors import plain_words


def of_language(language: str | None, **more) -> dict:
    return {"set": {"language": language} | more}


@pytest.mark.parametrize("normalizer", ["english", "basic", "none"])
def test_loops_of_fillers_are_counted_whatever_the_normalizer(tmp_path, normalizer):
    write(tmp_path, "student", [(None, "yes", "Mm-hmm. " * 5), (None, "so", "So (laughs)")])
    result = score_directory(tmp_path, normalizer).sets[0]
    # mm hmm mm hmm ..., 10 words: 6 of five, 2 different ones
    assert result.scores["student"].repeated_5grams == pytest.approx(100 * 4 / 6)


def test_fillers_are_hallucinations_in_clips_without_speech(tmp_path):
    write(tmp_path, "student", [(None, "", "Uh, hmm."), (None, " ", "..."), (None, "", "[music]")])
    result = score_directory(tmp_path, "english").sets[0]
    assert (result.has_speech, result.clips, result.scores["student"].no_speech_hallucinations) == (False, 3, 2)
    assert "in lower-case text without punctuation, for every normalizer" in format_results(score_directory(tmp_path))


def test_letters_are_words_where_there_are_no_spaces():
    assert plain_words("你好。你好!", "zh") == "你 好 你 好"
    assert plain_words("Don't, (really)!", "en") == "don t really"


def test_a_set_whose_references_are_fillers_has_speech(tmp_path):
    write(tmp_path, "student", [(None, "Hmm.", "yes"), (None, "uh", ""), (None, "seven", "seven")])
    result = score_directory(tmp_path, "english").sets[0]
    assert (result.has_speech, result.clips, result.no_speech_clips) == (True, 1, 0)
    assert result.excluded == {"reference empty after normalization": 2}
    write(tmp_path, "student", [(None, "Hmm.", "yes"), (None, "uh", "")], name="only")
    with pytest.raises(UserError, match=r"only: all clips are excluded .* Another --normalizer may keep"):
        score_directory(tmp_path, "english")
    assert score_directory(tmp_path, "basic").sets[0].clips == 2


def test_hallucinations_in_a_set_with_speech_are_shown(tmp_path):
    texts = [(None, "one two", "one"), (None, "", "Thank you."), (None, " ", ""), (None, "hmm", "x"), (None, "", "Uh")]
    write(tmp_path, "student", texts)
    results = score_directory(tmp_path, "english")
    result = results.sets[0]
    assert (result.has_speech, result.clips, result.no_speech_clips) == (True, 1, 3)
    assert result.excluded == {"no transcript": 3, "reference empty after normalization": 1}
    assert result.scores["student"].no_speech_hallucinations == 2
    assert "2 of 3 (66.7 %)" in format_results(results)
    page = write_report(results, tmp_path).read_text()
    assert "2 of 3" in page and "66.7 %" in page
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


@pytest.mark.parametrize(("limit", "expected"), [(3, 6), (4, 0), (None, None), ("3, 4", None)])
def test_clips_that_ran_into_the_limit_are_counted(tmp_path, limit, expected):
    """All lines of `write` have 3 tokens."""
    runtime = dict(batch_size=4, device="cpu") | ({} if limit is None else {"token_limit": limit})
    write(tmp_path, "student", [row[:3] for row in SPOKEN], runtime=runtime)
    results = score_directory(tmp_path, "none")
    assert results.sets[0].scores["student"].clips_at_limit == (
        expected and expected - 1
    )  # one clip isn't transcribed
    row = format_results(results).partition("Hallucination indicators:")[2].splitlines()[2]
    assert row.split()[6:] == {None: [], 6: ["5"], 0: ["0"]}[expected]


# ---- languages that the basic normalizer wasn't made for ----


@pytest.mark.parametrize("language", ["zh", "Chinese", "ja", "th", "yue"])
def test_every_letter_is_a_word_where_words_have_no_spaces(language):
    name, normalize = normalizer_for("auto", language, {})
    assert (name, normalize("今天。天气 好")) == (BY_LETTER, "今 天 天 气 好")
    assert normalizer_for("none", language, {})[0] == "none"
    assert normalizer_for("basic", "de", {})[0] == "basic"


def test_scores_by_letter_count_no_spaces(tmp_path):
    write(tmp_path, "student", [(None, "今天天气很好", "今天天汽好"), (None, "再见。", "再见")], **of_language("zh"))
    results = score_directory(tmp_path)
    result, scores = results.sets[0], results.sets[0].scores["student"]
    assert (result.normalizer, result.reference_words, result.has_combining_marks) == (BY_LETTER, 8, False)
    assert scores.wer == scores.cer == pytest.approx(100 * 2 / 8)
    assert "multilingual, by letter" in format_results(
        results
    ) and "by letter: each letter is a word" in format_results(results)
    page = write_report(results, tmp_path).read_text()
    assert (
        "multilingual, by letter normalizer" in page and "<mark>汽</mark>" in page
    )  # the clips are by letter as well


def test_words_that_the_basic_normalizer_breaks_are_told(tmp_path):
    write(tmp_path, "student", [(None, "नमस्ते दुनिया", "नमस्ते")], **of_language("hi"))
    write(tmp_path, "student", [(None, "Grüße e\u0301te\u0301", "Grüße")], name="other", **of_language("fr"))
    assert not any(result.has_combining_marks for result in score_directory(tmp_path).sets)
    results = score_directory(tmp_path, "basic")
    assert {result.name: result.has_combining_marks for result in results.sets} == {"spoken": True, "other": False}
    for text in (format_results(results), write_report(results, tmp_path).read_text()):
        assert text.count("spoken: basic removes combining marks, such as vowel signs") == 1


# ---- the spelling list ----


@pytest.mark.parametrize(("spelling", "wer", "name"), [({}, 25.0, "no"), ({"colour": "color"}, 0.0, "with")])
def test_whether_there_was_a_spelling_list_is_told(tmp_path, spelling, wer, name):
    save_spelling_normalizer(tmp_path / "manifests", spelling)
    write(tmp_path, "student", [(None, "the colour of it", "the color of it")])
    results = score_directory(tmp_path)
    assert (results.sets[0].scores["student"].wer, results.sets[0].spelling_normalizer) == (wer, bool(spelling))
    assert f"english-unified, {name} spelling list" in format_results(results)
    assert f"english-unified normalizer, {name} spelling list" in write_report(results, tmp_path).read_text()
    assert score_directory(tmp_path, "basic").sets[0].spelling_normalizer is None


def test_translations_are_normalized_as_english_in_the_reports_clips_too(tmp_path):
    write(tmp_path, "student", [(None, "it's 7 o'clock", "it is late")], **of_language("zh", task="translate"))
    results = score_directory(tmp_path, "basic")
    assert results.sets[0].normalizer == "basic"
    references = [["it", "s", "7", "o", "clock"]]
    errors = jiwer.process_words([" ".join(references[0])], ["it is late"])
    page = write_report(results, tmp_path).read_text()
    assert f"{errors.substitutions + errors.deletions} errors" in page


def test_weights_are_noted_even_where_the_sidecar_has_them_apart(tmp_path):
    write(tmp_path, "student", [(None, "a b", "a")])
    file = tmp_path / "manifests" / "student" / "spoken.json"
    assert json.loads(file.read_text())["model"]["weights"] is None  # as in the metadata of earlier versions
    assert score_directory(tmp_path).models["student"].weights == "student"
