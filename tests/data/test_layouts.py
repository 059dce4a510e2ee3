"""Directories as people have them: which rows are which split, and what is said of all that isn't read."""

import csv
import json
import logging
from pathlib import Path

import pytest
import soundfile
from datasets import Dataset
from speech import RATE, audiofolder, tone, write_csv

from askd_hf.data import load_speech_dataset
from askd_hf.data.languages import with_language
from askd_hf.errors import UserError, warn_once
from askd_hf.evaluation.suites import DatasetSpec, load_set

CV_HEADER = ["client_id", "path", "sentence_id", "sentence", "up_votes", "accents", "locale", "segment"]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    warn_once.cache_clear()


def write_sounds(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, tone(), RATE)
    return folder


def at_top(folder: Path, *names: str, kind: str = "csv") -> Path:
    """A metadata file at the top of files that are there; each one's text is its name."""
    write_sounds(folder, *names)
    rows = [{"file_name": name, "text": name} for name in names]
    if kind == "csv":
        write_csv(folder / "metadata.csv", [["file_name", "text"], *([name, name] for name in names)])
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    return folder


def texts(folder: Path, split: str = "train") -> list[str]:
    return load_speech_dataset(str(folder), None, split)["text"][:]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_directories_in_file_names_are_splits(tmp_path, kind):
    folder = at_top(tmp_path / "x", "train/0.wav", "test/1.wav", "train/a/2.wav", "dev/3.wav", kind=kind)
    assert texts(folder) == ["train/0.wav", "train/a/2.wav"]
    assert texts(folder, "test") == texts(folder, "eval") == ["test/1.wav"]
    assert texts(folder, "dev") == texts(folder, "validation") == ["dev/3.wav"]
    assert texts(folder, "train[1:]+test") == ["train/a/2.wav", "test/1.wav"]
    assert load_speech_dataset(str(folder), None, "test")["clip"][:] == ["test/1.wav"]
    with pytest.raises(UserError, match="has no split 'other'; it has train, test, dev"):
        texts(folder, "other")


@pytest.mark.parametrize(
    "names, splits",
    [
        (["data/training/0.wav", "data/evaluation/1.wav"], {"train": [0], "test": [1]}),
        (["train-clean-100/0.wav", "test-other/1.wav"], {"train": [0], "test-other": [1]}),
        (["my_train/0.wav", "val2/1.wav"], {"train": [0], "val2": [1]}),
        (["audio\\Train\\0.wav", "audio\\Test\\1.wav"], {"train": [0], "test": [1]}),
        (["audio/0.wav", "contest/1.wav", "trained/2.wav"], {"train": [0, 1, 2]}),
        (["train-a/0.wav", "extra/1.wav"], {"train": [0, 1]}),
        (["test.wav", "train.wav"], {"train": [0, 1]}),
    ],
)
def test_which_directories_are_splits(tmp_path, names, splits):
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], *([name, name] for name in names)])
    for split, rows in splits.items():
        assert texts(tmp_path, split) == [names[row] for row in rows]
    if list(splits) == ["train"]:
        with pytest.raises(UserError, match="no split 'test'; it has train"):
            texts(tmp_path, "test")


def test_rows_outside_of_the_splits_are_refused(tmp_path):
    folder = at_top(tmp_path / "x", "train/0.wav", "test/1.wav", "audio/2.wav")
    message = r"metadata\.csv: some audio files .*\(train/ 1, test/ 1\), but 1 are not, such as row 2, audio/2\.wav"
    for split in ("train", "test"):
        with pytest.raises(UserError, match=message):
            texts(folder, split)


def test_where_absolute_names_lie_is_no_split_unless_they_differ(tmp_path):
    folder = write_sounds(tmp_path / "test" / "x", "a/0.wav", "a/1.wav", "train/2.wav", "dev/3.wav")
    for names, split, number in ((["a/0.wav", "a/1.wav"], "train", 2), (["train/2.wav", "dev/3.wav"], "dev", 1)):
        write_csv(folder / "metadata.csv", [["file_name", "text"], *([str(folder / name), "a"] for name in names)])
        assert len(texts(folder, split)) == number


def test_metadata_at_the_top_and_below(tmp_path, caplog):
    folder = at_top(tmp_path / "x", "held/audio/0.wav", "audio/1.wav")
    audiofolder(folder / "held", ["a"])
    with pytest.raises(UserError, match=r"\(held/ 1\), but 1 are not, such as row 1, audio/1\.wav"):
        texts(folder)
    folder = at_top(tmp_path / "y", "train/audio/0.wav", "test/audio/0.wav")
    audiofolder(folder / "test", ["a"])
    assert texts(folder) == ["train/audio/0.wav"] and texts(folder, "test") == ["a"]
    message = r"metadata.csv: the rows of split 'test' are ignored, because"
    assert caplog.text.count(message) == 1  # however many splits are read


def test_of_two_metadata_files_the_one_that_is_read_is_named(tmp_path, caplog):
    folder = audiofolder(tmp_path / "x", ["a"])
    (folder / "metadata.jsonl").write_text('{"file_name": "audio/0.wav", "text": "other"}\n')
    assert texts(folder) == ["a"]
    assert "metadata.csv is used; metadata.jsonl in the same directory is ignored" in caplog.text


def test_audio_without_a_row_is_counted(tmp_path, caplog):
    folder = audiofolder(tmp_path / "x", ["a"])
    write_sounds(folder, "audio/1.WAV", "more/2.flac", ".hidden/3.wav")
    assert texts(folder) == ["a"]
    assert (
        "metadata.csv: 2 audio files in its directory have no row and are ignored, such as audio/1.WAV" in caplog.text
    )
    caplog.clear()
    audiofolder(tmp_path / "y" / "train", ["a"])
    audiofolder(tmp_path / "y" / "test", ["b"])
    write_sounds(tmp_path / "y", "extra/0.wav", "extra/1.wav")
    assert texts(tmp_path / "y") == ["a"]
    assert f"{tmp_path / 'y' / 'extra'}: 2 audio files without a metadata file are ignored" in caplog.text
    assert "no row" not in caplog.text


def test_audio_that_splits_share_is_not_ignored(tmp_path, caplog):
    write_sounds(tmp_path, "audio/0.wav", "audio_test/1.wav")
    write_csv(tmp_path / "train" / "metadata.csv", [["file_name", "text"], ["../audio/0.wav", "a"]])
    write_csv(tmp_path / "test" / "metadata.csv", [["file_name", "text"], ["../audio_test/1.wav", "b"]])
    assert texts(tmp_path) == ["a"] and caplog.text == ""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_names_splits_is_not_heeded_in_silence(tmp_path, caplog, kind):
    if kind == "csv":
        rows = [["file_name", "text", "split"], ["0.wav", "a", "train"], ["1.wav", "b", "test"]]
        write_csv(tmp_path / "x" / "metadata.csv", rows)
        name = tmp_path / "x"
    else:
        name = tmp_path / "x.parquet"
        Dataset.from_dict({"audio": ["0.wav", "1.wav"], "text": ["a", "b"], "set": ["dev", "train"]}).to_parquet(name)
    assert texts(name) == ["a", "b"]
    assert "but it is ignored: all 2 rows are loaded as one split" in caplog.text


@pytest.mark.parametrize(
    "files, message",
    [
        ({"data/train/metadata.csv": "file_name,text\n0.wav,a\n", "data/train/0.wav": ""}, "too deep; use .*/data"),
        ({"train.csv": "file_name,text\n0.wav,a\n"}, "train.csv lists audio files, rename it to train/metadata.csv"),
        ({"train_1.jsonl": '{"a": "b"}\n'}, "train_1.jsonl lists audio files, rename it to train_1/metadata.jsonl"),
    ],
)
def test_other_layouts_are_explained(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "x")


def test_several_datasets_joined_by_a_plus(tmp_path):
    a, b = audiofolder(tmp_path / "a", ["a"]), audiofolder(tmp_path / "b", ["b"])
    with pytest.raises(UserError, match=rf"separate several datasets by spaces, not by \+: {a} {b}"):
        texts(f"{a}+{b}")
    with pytest.raises(UserError, match=r"separate several datasets by spaces, not by \+: org/a org/b"):
        texts("org/a+org/b")
    assert texts(audiofolder(tmp_path / "c+d", ["c"])) == ["c"]
    with pytest.raises(
        UserError, match=r"no column 'text\+sentence'.*separated by spaces: --text_column_name text sentence"
    ):
        load_speech_dataset(str(a), None, "train", text_column_name="text+sentence")


def common_voice(folder: Path, locale: str = "fr") -> Path:
    """Three tables, with quotes that are no quotes, and those of Common Voice that list no clips."""
    clips = {"train": ['"Oui', "a, b"], "dev": ["null"], "test": ["c"], "other": ["d"]}
    for split, sentences in clips.items():
        with (folder.mkdir(parents=True, exist_ok=True) or folder / f"{split}.tsv").open("w", newline="") as stream:
            rows = csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
            rows.writerow(CV_HEADER)
            for number, sentence in enumerate(sentences):
                name = f"common_voice_{split}_{number}.mp3"
                rows.writerow([f"voice{number}", name, "7", sentence, "2", "", locale, ""])
                write_sounds(folder, f"clips/{name}")
    (folder / "validated.tsv").write_text((folder / "train.tsv").read_text())
    (folder / "reported.tsv").write_text("sentence_id\tsentence\tlocale\treason\n7\tx\tfr\ty\n")
    (folder / "clip_durations.tsv").write_text("clip\tduration[ms]\na.mp3\t5\n")
    return folder


def test_common_voice_as_it_is_downloaded(tmp_path, caplog):
    folder = common_voice(tmp_path / "cv-corpus-22.0" / "fr")
    for name in (folder, folder.parent):
        speech = load_speech_dataset(str(name), None, "train")
        assert speech["text"][:] == ['"Oui', "a, b"]
        assert speech["clip"][:] == [f"clips/common_voice_train_{i}.mp3" for i in range(2)]
        assert speech["speaker"][:] == ["voice0", "voice1"] and speech["language"][:] == ["fr", "fr"]
        assert texts(name, "validation") == texts(name, "dev") == ["null"]
        assert texts(name, "test") == ["c"] and texts(name, "other") == ["d"]
    assert caplog.text == ""
    with pytest.raises(UserError, match="no split 'x'; it has dev, other, test, train, validated"):
        texts(folder, "x")
    assert len(texts(folder, "validated")) == 2 and "includes the clips of dev and test" in caplog.text
    evaluated = load_set(DatasetSpec("cv", str(folder), None, "test"))
    assert evaluated["speaker"][:] == ["voice0"] and Path(evaluated[0]["audio"]["path"]).is_file()
    assert load_set(DatasetSpec("cv", str(folder), None, "test"), text_required=False)["text"][:] == ["c"]


@pytest.mark.parametrize("locale, code", [("zh-CN", "zh"), ("sv-SE", "sv"), ("zh-HK", "yue"), ("nn-NO", "nn")])
def test_locales_are_languages(tmp_path, locale, code):
    assert load_speech_dataset(str(common_voice(tmp_path, locale)), None, "test")["language"][:] == [code]


def test_a_language_that_whisper_does_not_know_is_left_to_the_option(tmp_path, caplog):
    speech = load_speech_dataset(str(common_voice(tmp_path, "rm-sursilv")), None, "test")
    assert "language" not in speech.column_names
    assert "Whisper doesn't support language rm-sursilv; set --language" in caplog.text
    assert with_language(speech, "it", None)["language"][:] == ["it"]


def test_several_languages_of_common_voice(tmp_path):
    common_voice(tmp_path / "fr"), common_voice(tmp_path / "de", "de")
    with pytest.raises(UserError, match=r"has several languages \(de, fr\); choose one, such as .*/de"):
        texts(tmp_path)


@pytest.mark.parametrize("task", ["asr", "transcription"])
def test_a_task_that_no_row_has_is_one_error(tmp_path, task, caplog):
    write_csv(tmp_path / "metadata.csv", [["file_name", "text", "task"], *([f"{i}.wav", "a", task] for i in range(3))])
    speech = load_speech_dataset(str(tmp_path), None, "train")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match=rf"mine: .*'task' must be .*, got '{task}'.*--task transc"),
    ):
        with_language(speech, "fr", None, "mine")
    assert with_language(speech, "fr", "transcribe")["task"][:] == ["transcribe"] * 3


def test_a_language_that_no_row_has_is_one_error(tmp_path):
    write_csv(tmp_path / "metadata.csv", [["file_name", "text", "language"], ["0.wav", "a", ""], ["1.wav", "b", " "]])
    with pytest.raises(UserError, match="column 'language' is empty in all rows; set --language"):
        with_language(load_speech_dataset(str(tmp_path), None, "train"), None, None)
