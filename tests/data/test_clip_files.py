"""Audio that rows name instead of holding it: where it is looked for, and what may be opened."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, Features, Value, load_from_disk
from speech import RATE, audiofolder, encoded, tone, write_csv

from askd_hf.data import Limits, decode_audio, filter_invalid_clips, load_speech_dataset
from askd_hf.data.audio import MAX_BYTES, AudioError
from askd_hf.data.augment import AugmentArguments, Augmenter
from askd_hf.data.clip_files import ClipFiles
from askd_hf.data.columns import replace_column
from askd_hf.errors import UserError, warn_once
from askd_hf.evaluation.prepared_sets import prepare_set
from askd_hf.evaluation.suites import DatasetSpec, load_set

STRANGE = "a[1] (x)*?{b}"
OUTSIDE = [
    "/etc/passwd",
    "../x.wav",
    "a/../../x.wav",
    "..\\x.wav",
    "a\\..\\..\\x.wav",
    "C:\\x.wav",
    "C:x.wav",
    "\\\\server\\share\\x.wav",
    "//server/share/x.wav",
    "https://example.org/x.wav",
    "file:///etc/x.wav",
]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    warn_once.cache_clear()


def paths_in(file: Path, paths: list[str | None], struct: bool = True, **columns) -> str:
    """A parquet file whose rows name audio files."""
    audio = [path and {"bytes": None, "path": path} for path in paths] if struct else paths
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"audio": audio, "text": ["a"] * len(paths), **columns}).to_parquet(file)
    return str(file)


def downloaded(folder: Path) -> Path:
    """A directory as `hf download --local-dir` leaves it."""
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("path", OUTSIDE)
def test_downloaded_datasets_name_no_files_outside(tmp_path, path):
    with pytest.raises(UserError, match=r"mine: the audio path .* is outside the dataset"):
        ClipFiles("mine", downloaded=True).locate(path)
    folder = downloaded(tmp_path / "x")
    write_csv(folder / "metadata.csv", [["file_name", "text"], [path, "a"]])
    with pytest.raises(UserError, match="is outside the dataset"):
        load_speech_dataset(str(folder), None, "train")
    (folder / "metadata.csv").unlink()
    paths_in(folder / "data" / "train-00000-of-00001.parquet", ["0.wav", path])
    (folder / "data" / "0.wav").write_bytes(encoded(tone()))
    if "a" in path or path.startswith(("..", "/")):  # `data/../x.wav` is inside
        inside = path in ("../x.wav", "..\\x.wav", "a/../../x.wav", "a\\..\\..\\x.wav")
        if not inside:
            with pytest.raises(UserError, match="is outside the dataset"):
                load_speech_dataset(str(folder), None, "train")


def test_links_out_of_downloaded_datasets_are_not_followed(tmp_path):
    (tmp_path / "secret.wav").write_bytes(encoded(tone()))
    folder = downloaded(tmp_path / "x")
    (folder / "0.wav").symlink_to(tmp_path / "secret.wav")
    write_csv(folder / "metadata.csv", [["file_name", "text"], ["0.wav", "a"]])
    with pytest.raises(UserError, match=r"links to .*secret\.wav, outside the downloaded dataset"):
        load_speech_dataset(str(folder), None, "train")
    shutil.rmtree(folder / ".cache")  # one's own
    assert len(decode_audio(load_speech_dataset(str(folder), None, "train")[0]["audio"])) == 8000


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize("layout", ["x.parquet", "x/data/train-00000-of-00001.parquet"])
def test_relative_paths_are_beside_the_parquet_file(tmp_path, monkeypatch, caplog, streaming, struct, layout):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / layout
    name = paths_in(file, ["audio/0.wav", "here.wav", None, str(tmp_path / "abs.wav"), "gone.wav"], struct)
    for there in (file.parent / "audio" / "0.wav", tmp_path / "elsewhere" / "here.wav", tmp_path / "abs.wav"):
        there.parent.mkdir(exist_ok=True)
        there.write_bytes(encoded(tone()))
    name = name if layout == "x.parquet" else str(tmp_path / "x")
    rows = list(load_speech_dataset(name, None, "train", streaming=streaming))
    assert [len(decode_audio(rows[i]["audio"])) for i in (0, 1, 3)] == [8000] * 3
    assert rows[0]["clip"] == "audio/0.wav" and rows[4]["clip"] == "gone.wav"
    for row, message in ((2, "no audio"), (4, "missing file")):
        with pytest.raises(AudioError, match=message):
            decode_audio(rows[row]["audio"])
    assert f"searched in {file.parent}" in caplog.text and "in the working directory" in caplog.text


def test_rows_with_their_audio_keep_the_names_of_others(tmp_path):
    audio = [{"bytes": encoded(tone()), "path": "/elsewhere/0.wav"}, {"bytes": None, "path": "1.wav"}]
    Dataset.from_dict({"audio": audio, "text": ["a", "b"]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "1.wav").write_bytes(encoded(tone(300.0)))
    got = load_speech_dataset(str(tmp_path / "x.parquet"), None, "train")
    assert got["clip"][:] == ["/elsewhere/0.wav", "1.wav"]
    assert (decode_audio(got[0]["audio"]) == decode_audio({"bytes": encoded(tone())})).all()
    assert (decode_audio(got[1]["audio"]) == decode_audio({"bytes": encoded(tone(300.0))})).all()


def test_only_regular_files_of_a_sane_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    (tmp_path / "folder.wav").mkdir()
    names = ["pipe.wav", "huge.wav", "folder.wav", "/dev/zero"]
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], *([name, "a"] for name in names)])
    with pytest.raises(UserError) as error:
        filter_invalid_clips(
            load_speech_dataset(str(tmp_path), None, "train"), None, Limits(30.0), on_bad_audio="error"
        )
    for line in (
        "row 0, pipe.wav: unreadable file: not a regular file but a pipe or device",
        "row 1, huge.wav: too large: 4.0 GiB, the limit is 4 GiB",
        "row 2, folder.wav: unreadable file: Is a directory",
        "row 3, /dev/zero: unreadable file: not a regular file but a pipe or device",
    ):
        assert line in str(error.value)


AUDIO_TYPES = [
    pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
    pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view())]),
    pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("sampling_rate", pa.int64())]),
    pa.struct([("bytes", pa.binary())]),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", AUDIO_TYPES, ids=str)
def test_audio_of_every_type(tmp_path, kind, streaming):
    content = encoded(tone())
    (tmp_path / "0.wav").write_bytes(content)
    if pa.types.is_struct(kind):
        value = {"bytes": content, "path": "0.wav", "sampling_rate": RATE}
        value = {field.name: value[field.name] for field in kind}
    else:
        value = content if "binary" in str(kind) else "0.wav"
    table = pa.table({"audio": pa.array([value], kind), "text": ["a"]})
    pq.write_table(table, tmp_path / "x.parquet")
    (row,) = load_speech_dataset(str(tmp_path / "x.parquet"), None, "train", streaming=streaming)
    assert (decode_audio(row["audio"]) == decode_audio({"bytes": content})).all()


TEXTS = {
    "large_string": pa.array(["a", None], pa.large_string()),
    "string_view": pa.array(["a", None], pa.string_view()),
    "dictionary": pa.array(["a", None]).dictionary_encode(),
    "binary": pa.array([b"a", None]),
    "int": pa.array([7, None], pa.int8()),
    "null": pa.nulls(2),
}
TEXTS_AS = {"int": ["7", None], "null": [None, None]}
NO_TEXTS = {
    "bool": pa.array([True, False]),
    "double": pa.array([1.5, 2.0]),
    "timestamp": pa.array([0, 1], pa.timestamp("ms")),
    "date": pa.array([0, 1], pa.date32()),
    "decimal": pa.array([1, 2], pa.decimal128(5, 2)),
    "list": pa.array([["a"], ["b"]]),
    "struct": pa.array([{"en": "a"}, {"en": "b"}]),
    "bytes": pa.array([b"\xff", b"\xfe"]),
}


def source_of(folder: Path, column: str, values: pa.Array, way: str) -> str:
    """Speech with a column, by one of the ways to load it; the clips are missing files."""
    folder.mkdir()
    columns = {column: values} | ({} if column == "sentence" else {"text": pa.array(["a", "b"])})
    if way == "metadata.parquet":
        pq.write_table(pa.table({"file_name": ["0.wav", "1.wav"], **columns}), folder / way)
        return str(folder)
    audio = pa.array([{"bytes": encoded(tone()), "path": f"{i}.wav"} for i in range(2)])
    if way == "saved":
        Dataset(pa.table({"audio": audio, **columns})).save_to_disk(folder)
        return str(folder)
    pq.write_table(pa.table({"audio": audio, **columns}), folder / "x.parquet")
    return str(folder / "x.parquet")


WAYS = ["metadata.parquet", "parquet", "saved", "stream"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TEXTS)
def test_transcripts_of_every_type_of_text(tmp_path, way, kind):
    name = source_of(tmp_path / "x", "sentence", TEXTS[kind], way)
    speech = load_speech_dataset(name, None, "train", streaming=way == "stream")
    assert speech.features["text"] == Value("string")
    assert [row["text"] for row in speech] == TEXTS_AS.get(kind, ["a", None])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NO_TEXTS)
def test_transcripts_that_are_no_text_are_named(tmp_path, way, kind):
    name = source_of(tmp_path / "x", "sentence", NO_TEXTS[kind], way)
    message = r"column 'sentence' has type .*, not text.*--text_column_name"
    if kind == "bytes" and way == "stream":  # which is read when it is trained on
        message = "a transcript isn't UTF-8"
    with pytest.raises(UserError, match=message):
        list(load_speech_dataset(name, None, "train", streaming=way == "stream"))


@pytest.mark.parametrize("way", ["metadata.parquet", "parquet", "saved", "stream"])
@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_languages_of_every_type_of_text(tmp_path, way, kind):
    name = source_of(tmp_path / "x", "language", TEXTS[kind], way)
    speech = load_speech_dataset(name, None, "train", streaming=way == "stream")
    assert speech.features["language"] == Value("string")
    assert [row["language"] for row in speech] == ["a", None]


def test_classes_in_metadata_keep_their_names(tmp_path):
    features = Features(
        file_name=Value("string"), command=ClassLabel(names=["no", "yes"]), language=ClassLabel(names=["de", "fr"])
    )
    rows = {"file_name": ["0.wav", "1.wav"], "command": [1, None], "language": [1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "metadata.parquet")
    speech = load_speech_dataset(str(tmp_path), None, "train", text_column_name="command")
    assert speech["text"][:] == ["yes", None]
    assert speech.features["language"] == ClassLabel(names=["de", "fr"]) and speech["language"][:] == [1, 0]


def test_types_that_datasets_lacks(tmp_path, caplog):
    table = pa.table(
        {"file_name": ["0.wav"], "text": ["a"], "m": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8()))}
    )
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert load_speech_dataset(str(tmp_path), None, "train").column_names == ["audio", "clip", "text"]
    assert "column 'm' is ignored, because `datasets` doesn't support type map" in caplog.text
    audio = pa.array([{"bytes": b"x", "path": "0.wav"}])
    pq.write_table(table.drop(["file_name"]).append_column("audio", audio), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: Arrow type map.*remove this column"):
        load_speech_dataset(str(tmp_path / "x.parquet"), None, "train")


def strange(folder: Path, way: str) -> str:
    """Two clips in a directory, or a file, whose name is a pattern."""
    folder = folder / STRANGE
    plain = audiofolder(folder / "files", ["a", "b"])
    if way == "audiofolder":
        return str(plain)
    rows = load_speech_dataset(str(plain), None, "train")
    audio = [{"bytes": Path(row["audio"]["path"]).read_bytes(), "path": row["clip"]} for row in rows]
    rows = rows.select_columns("text").add_column("audio", audio, feature=Audio(decode=False))
    shutil.rmtree(plain)
    if way == "saved":
        rows.save_to_disk(folder)
        return str(folder)
    file = {"file": f"{STRANGE}.parquet", "shards": "data/train-00000-of-00001.parquet", "bare": "x.parquet"}[way]
    (folder / file).parent.mkdir(exist_ok=True)
    rows.to_parquet(folder / file)
    return str(folder / file if way == "file" else folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("way", ["audiofolder", "saved", "file", "shards", "bare"])
def test_names_that_are_patterns(tmp_path, way, streaming):
    got = load_speech_dataset(strange(tmp_path, way), None, "train", streaming=streaming)
    assert [row["text"] for row in got] == ["a", "b"]
    assert all(len(decode_audio(row["audio"])) == 8000 for row in got)


def test_folders_of_sounds_whose_names_are_patterns(tmp_path):
    folder = tmp_path / STRANGE / "UPPER[2]"
    folder.mkdir(parents=True)
    soundfile.write(folder / "0.WAV", tone(), RATE)
    clips = load_set(DatasetSpec("x", str(tmp_path / STRANGE), None, "train"), text_required=False)
    assert clips["clip"][:] == ["UPPER[2]/0.WAV"]
    pytest.importorskip("audiomentations")
    options = AugmentArguments(augmentations=["noise"], augment_probability=1.0, noise_dir=str(tmp_path / STRANGE))
    assert not np.array_equal(Augmenter(options)(tone(), (0, 1)), tone())


def test_skipped_clips_cost_no_copy_of_the_audio(tmp_path):
    audio = [{"bytes": encoded(tone(200.0 + i)), "path": f"{i}.wav"} for i in range(4)]
    audio[1] = {"bytes": b"no audio", "path": "1.wav"}
    rows = Dataset.from_dict({"audio": audio, "text": ["a", "b", "", "d"]}).cast_column("audio", Audio(decode=False))
    rows.save_to_disk(tmp_path / "saved")
    files = sorted(tmp_path.rglob("*"))
    spec = DatasetSpec("x", str(tmp_path / "saved"), None, "train")
    (prepared,) = prepare_set(spec, window=30.0, on_bad_audio="skip")
    assert sorted(prepared.clips["text"][:]) == ["", "a", "d"]
    assert {row["clip"]: row["text"] for row in prepared.clips} == {"0.wav": "a", "2.wav": "", "3.wav": "d"}
    chosen = load_from_disk(str(tmp_path / "saved")).select([3, 0])
    added = replace_column(replace_column(chosen, "text", ["x", None]), "row", [7, 8])
    assert [(row["audio"]["path"], row["text"], row["row"]) for row in added] == [
        ("3.wav", "x", 7),
        ("0.wav", None, 8),
    ]
    assert added.select([1])["row"][:] == [8]
    assert [file["filename"] for file in added.cache_files] == [file["filename"] for file in chosen.cache_files]
    assert sorted(tmp_path.rglob("*")) == files
    twice = replace_column(chosen.select([0, 0]), "row", [1, 2])  # one stored row has two values
    assert twice["row"][:] == [1, 2]
