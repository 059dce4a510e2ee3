"""The columns that a row of speech may have: their types, whatever a dataset holds under their names."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset
from models import make_processor, make_whisper
from speech import RATE, audiofolder, tone, write_csv

from askd_hf.data import SpeechCollator, decode_audio, load_speech_dataset
from askd_hf.data.columns import COLUMNS
from askd_hf.data.long_clips import cut_long_clips
from askd_hf.data.soft_labels import has_soft_labels
from askd_hf.errors import UserError

TEXTS = [*"abcdefgh"]
TIMED = [
    {"id": 7, "start": 0.1, "end": 1, "text": "a", "tokens": [1]},
    {"id": 8, "start": 1, "end": 2.5, "text": None},
]
ROUNDED = [{"start": float(np.float32(0.1)), "end": 1.0, "text": "a"}, {"start": 1.0, "end": 2.5, "text": None}]


def with_audio_inside(folder: Path) -> Dataset:
    """An audiofolder's rows, with the bytes of the files."""
    dataset = load_speech_dataset(str(audiofolder(folder, TEXTS)), None, "train")
    audio = [{"bytes": Path(row["audio"]["path"]).read_bytes(), "path": row["clip"]} for row in dataset]
    return dataset.select_columns("text").add_column("audio", audio, feature=Audio())


def saved_with(target: Path, kind: str, **columns) -> str:
    """Speech with more columns, as parquet or as `save_to_disk` writes it."""
    dataset = with_audio_inside(target / "files").cast_column("audio", Audio(decode=False))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    if kind == "parquet":
        dataset.to_parquet(target / "speech.parquet")
        return str(target / "speech.parquet")
    dataset.save_to_disk(target / "saved")
    return str(target / "saved")


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("streaming", [False, True])
def test_optional_columns_have_their_types(tmp_path, caplog, kind, streaming):
    name = saved_with(
        tmp_path,
        kind,
        segments=[TIMED, None, [], *[TIMED] * 5],
        prompt=["before", None, *[""] * 6],
        draw=[3] * 8,
        task=[None] * 8,
    )
    files = sorted(tmp_path.rglob("*"))
    got = load_speech_dataset(name, None, "train", streaming=streaming)
    assert {name: got.features[name] for name in ("segments", "prompt", "task")} == {
        name: COLUMNS[name] for name in ("segments", "prompt", "task")
    }
    assert set(got.column_names) == {"audio", "text", "clip", "segments", "prompt", "task"}
    rows = list(got)
    assert [row["segments"] for row in rows] == [ROUNDED, None, [], *[ROUNDED] * 5]
    assert [row["prompt"] for row in rows] == ["before", None, *[""] * 6]
    assert [row["text"] for row in rows] == TEXTS and {row["task"] for row in rows} == {None}
    (said,) = caplog.messages
    assert said == f"{name}: columns 'draw' are dropped, because training adds its own of these names"
    if kind == "saved":
        assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "column, values, held",
    [
        ("prompt", [1] * 8, "Value('int64'), not text"),
        ("prompt", [["a"]] * 8, "List(Value('string')), not text"),
        ("language", [0] * 8, "Value('int64'), not text"),
        ("segments", ["[]"] * 8, "Value('string'), not a list of {start, end, text}"),
        ("segments", [[1.0]] * 8, "List(Value('float64')), not a list of"),
        ("segments", [[{"start": 1.0, "end": 2.0}]] * 8, "List({'start': Value('float64'), 'end': "),
        ("segments", [[{"start": "1", "end": 2.0, "text": "a"}]] * 8, "List({'start': Value('string'), "),
    ],
)
def test_columns_that_hold_something_else_are_left_out(tmp_path, caplog, streaming, column, values, held):
    name = saved_with(tmp_path, "parquet", **{column: values})
    got = load_speech_dataset(name, None, "train", streaming=streaming)
    assert column not in got.column_names and [row["text"] for row in got] == TEXTS
    assert column not in next(iter(got))
    assert f"{name}: column '{column}' is dropped, because it has type {held}" in caplog.text


def test_transcripts_of_another_type_are_read_without_a_copy_of_the_audio(tmp_path):
    dataset = with_audio_inside(tmp_path).cast_column("audio", Audio(decode=False)).remove_columns("text")
    dataset.add_column("text", list(range(8))).save_to_disk(tmp_path / "saved")
    files = sorted(tmp_path.rglob("*"))
    assert load_speech_dataset(str(tmp_path / "saved"), None, "train")["text"][:] == list("01234567")
    streamed = load_speech_dataset(str(tmp_path / "saved"), None, "train", streaming=True)
    assert [row["text"] for row in streamed] == list("01234567")
    assert sorted(tmp_path.rglob("*")) == files


def test_arrays_of_samples_can_not_be_streamed(tmp_path):
    sounds = [{"array": [0.1, 0.2], "sampling_rate": 16_000}] * 2
    Dataset.from_dict({"text": ["a", "b"], "audio": sounds}).to_parquet(tmp_path / "a.parquet")
    assert decode_audio(load_speech_dataset(str(tmp_path / "a.parquet"), None, "train")[0]["audio"]).shape == (2,)
    timed = Dataset.from_dict({"segments": [[{"start": 0.0, "end": 1.0, "text": "a"}]] * 2})
    long = load_speech_dataset(str(tmp_path / "a.parquet"), None, "train").add_column("segments", timed["segments"][:])
    with pytest.raises(UserError, match="mine: cannot cut long clips of datasets whose audio is stored as arrays"):
        cut_long_clips(long, 1e-4, "mine")
    with pytest.raises(
        UserError, match=r"a\.parquet: cannot stream datasets whose audio is stored as arrays; save it"
    ):
        load_speech_dataset(str(tmp_path / "a.parquet"), None, "train", streaming=True)


@pytest.mark.parametrize("stream", [False, True])
def test_columns_called_as_trainings_own_are_dropped_and_said(tmp_path, caplog, stream):
    names = ["no_speech", "rng_key", "negative", "draw", "duration", "label_tokens"]
    others = ["audio_key", "length", "labels", "row", "teacher_key", "seconds"]
    write_csv(tmp_path / "metadata.csv", [["file_name", "text", *names, *others], ["0.wav", "a", *["0"] * 12]])
    soundfile.write(tmp_path / "0.wav", tone(), RATE)
    with caplog.at_level(logging.WARNING):
        speech = load_speech_dataset(str(tmp_path), None, "train", streaming=stream)
    assert not set(names) & set(speech.column_names) and set(others) <= set(speech.column_names)
    said = ", ".join(map(repr, names[:4]))  # the others are measured again
    assert f"columns {said} are dropped, because training" in caplog.text
    (row,) = speech
    processor = make_processor()
    batch = SpeechCollator(processor, make_whisper(processor).config)([row])
    assert set(batch) == {"input_features", "decoder_input_ids", "labels", "label_positions", "clip"}
    if not stream:
        assert not has_soft_labels(speech)


def test_a_transcript_that_is_not_chosen_is_said(tmp_path, caplog):
    write_csv(tmp_path / "metadata.csv", [["file_name", "text", "other"], ["0.wav", "a", "b"]])
    with caplog.at_level(logging.WARNING):
        assert load_speech_dataset(str(tmp_path), None, "train", text_column_name="other")["text"][:] == ["b"]
    assert "column 'text' is ignored, because column 'other' was chosen" in caplog.text
