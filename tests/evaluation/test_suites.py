"""Named suites, and loading of a set."""

import pytest
from datasets import Audio, Dataset
from speech import write_speech

from askd_hf import evaluation
from askd_hf.errors import UserError
from askd_hf.evaluation import DatasetSpec, EvaluationArguments, suite_sets
from askd_hf.evaluation.suites import SUITES, load_set, with_speakers


def test_the_five_sets_of_the_paper():
    names = ["librispeech-test-clean", "librispeech-test-other", "ami", "earnings22", "tedlium"]
    assert [source.name for source in suite_sets("open-asr")] == names
    assert all(source.language == "en" for sets in SUITES.values() for source in sets)


@pytest.mark.parametrize(
    ("suite", "language", "dataset", "config", "code"),
    [
        ("fleurs", "French", "google/fleurs", "fr_fr", "fr"),
        ("fleurs", "zh", "google/fleurs", "cmn_hans_cn", "zh"),
        ("fleurs", "mandarin", "google/fleurs", "cmn_hans_cn", "zh"),
        ("fleurs", "es", "google/fleurs", "es_419", "es"),
        ("fleurs", "yue", "google/fleurs", "yue_hant_hk", "yue"),
        ("common-voice", "sv", "fixie-ai/common_voice_17_0", "sv-SE", "sv"),
        ("common-voice", "german", "fixie-ai/common_voice_17_0", "de", "de"),
    ],
)
def test_sets_by_language(suite, language, dataset, config, code):
    (source,) = suite_sets(suite, language)
    assert (source.dataset, source.config, source.language) == (dataset, config, code)
    assert source.name == f"{suite}-{code}"


@pytest.mark.parametrize(
    ("name", "language", "message"),
    [
        ("open_asr", None, "did you mean open-asr"),
        ("fleurs", None, "fleurs requires --language"),
        ("fleurs", "klingon", "got 'klingon'"),
        ("ami", "fr", "is English"),
    ],
)
def test_suites_that_there_are_not(name, language, message):
    with pytest.raises(UserError, match=message):
        suite_sets(name, language)


def test_several_suites_and_own_speech_in_one_run():
    args = EvaluationArguments(
        model="x", suite=["librispeech", "librispeech-test-other"], dataset="a/my speech", eval_splits=["test[:5%]"]
    )
    names = [source.name for source in args.sets()]
    assert names == ["librispeech-test-clean", "librispeech-test-other", "my-speech-test-5"]
    args.eval_splits = ["test[:5%]", "test[5:]"]
    with pytest.raises(UserError, match="two different sets are named my-speech-test-5"):
        args.sets()


def test_sets_and_directories_have_names(tmp_path, monkeypatch):
    (tmp_path / "my.speech").mkdir()
    monkeypatch.chdir(tmp_path / "my.speech")
    args = EvaluationArguments(model=".", dataset=".", dataset_config="far", eval_splits=["test", "train"])
    assert [source.name for source in args.sets()] == ["my.speech-far-test", "my.speech-far"]
    assert args.output_dir == "runs/evaluation-my.speech"


@pytest.mark.parametrize("speaker_column", ["client_id", None])
def test_only_what_is_needed_is_kept(tmp_path, speaker_column):
    table = {
        "path": [{"path": f"{i}.wav", "bytes": b"x"} for i in range(3)],
        "sentence": ["a", None, "c"],
        "client_id": [7, None, 9],
        "text": ["no", "no", "no"],
    }
    Dataset.from_dict(table).cast_column("path", Audio(decode=False)).to_parquet(tmp_path / "test.parquet")
    source = DatasetSpec("own", str(tmp_path), None, "test", "sentence", "path", speaker_column)
    loaded = load_set(source, limit=2)
    assert set(loaded.column_names) == {"audio", "text", "clip", "speaker"}
    assert (loaded["text"][:], loaded["speaker"][:]) == (["a", None], ["7", None])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([7.0, None, float("nan")], ["7.0", None, None]),
        ([None, None, None], None),
        (["ann", "", "ben"], ["ann", None, "ben"]),
    ],
)
def test_speakers_are_strings_or_none(names, expected):
    speech = with_speakers(Dataset.from_dict({"clip": ["a", "b", "c"], "speaker": names}))
    assert (speech["speaker"][:] if "speaker" in speech.column_names else None) == expected


def test_speakers_that_are_not_there(tmp_path):
    write_speech(tmp_path, clips=2)
    assert "speaker" not in load_set(DatasetSpec("own", str(tmp_path), None, "train")).column_names
    with pytest.raises(UserError, match=r"has no column 'who': --speaker_column must be one of"):
        load_set(DatasetSpec("own", str(tmp_path), None, "train", speaker_column="who"))


def test_old_names_of_the_package_still_work():
    with pytest.warns(FutureWarning, match="EvalSet is called DatasetSpec now"):
        assert evaluation.EvalSet is DatasetSpec
    with pytest.warns(FutureWarning, match="tables is called format_results now"):
        assert evaluation.tables is evaluation.format_results
