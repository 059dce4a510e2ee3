"""All kinds of sources give the same rows, and say clearly what is wrong with them."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Audio, DatasetDict
from speech import audiofolder, tone, write_csv

from askd_hf.data import clean_texts, decode_audio, load_speech_dataset
from askd_hf.errors import UserError, warn_once

TRAPS = ["null", "NA", "007", "a, b", 'say "hi"', "1e5", "żółć 你好", "True"]
README = """---
configs:
- config_name: clean
  data_files:
  - split: train.100
    path: clean/train.100/*.parquet
  - split: train.360
    path: clean/train.360/*.parquet
- config_name: other
  data_files:
  - split: test
    path: other/*.parquet
dataset_info:
- config_name: clean
  features:
  - name: audio
    dtype: audio
  - name: transcription
    dtype: string
  - name: speaker
    dtype: string
  splits:
  - name: train.100
    num_bytes: 1000
    num_examples: 8
  - name: train.360
    num_bytes: 1000
    num_examples: 8
  download_size: 30000000000000000
  dataset_size: 30000000000000000
- config_name: other
  splits:
  - name: test
    num_bytes: 100
    num_examples: 1
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    return audiofolder(tmp_path / "speech", TRAPS)


def embedded(folder: Path):
    """The audiofolder's rows with the bytes of the files inside, as datasets on the Hub have them."""

    def with_bytes(row):
        path = Path(row["audio"]["path"])
        return {"audio": {"path": path.name, "bytes": path.read_bytes()}}

    dataset = load_speech_dataset(str(folder), None, "train").map(with_bytes)
    return dataset.rename_column("text", "transcription").remove_columns("clip").cast_column("audio", Audio())


def write_parquet(dataset, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.cast_column("audio", Audio(decode=False)).to_parquet(str(file))


def make_source(kind: str, folder: Path, target: Path) -> tuple[str, str | None, str]:
    """Name, configuration and split of a copy of `folder` of the given kind."""
    dataset = embedded(folder)
    plain = dataset.cast_column("audio", Audio(decode=False))
    if kind == "saved dict":
        DatasetDict({"validation": plain}).save_to_disk(str(target))
        return str(target), None, "validation"
    if kind == "saved":
        plain.save_to_disk(str(target))
    elif kind == "parquet file":
        target = target.with_suffix(".parquet")
        write_parquet(dataset, target)
    elif kind == "parquet shards":
        write_parquet(dataset.select(range(5)), target / "data" / "train-00000-of-00002.parquet")
        write_parquet(dataset.select(range(5, 8)), target / "data" / "train-00001-of-00002.parquet")
        write_parquet(dataset.select([0]), target / "data" / "test-00000-of-00001.parquet")
    elif kind == "hub layout":
        for split in ("train.100", "train.360"):
            write_parquet(dataset, target / "clean" / split / "0000.parquet")
        write_parquet(dataset.select([0]), target / "other" / "0000.parquet")
        (target / "README.md").write_text(README)
        return str(target), "clean", "train.100"
    return str(target), None, "train"


@pytest.mark.parametrize("kind", ["saved", "saved dict", "parquet file", "parquet shards", "hub layout"])
def test_every_source_gives_the_rows_of_the_audiofolder(folder, tmp_path, kind):
    expected = load_speech_dataset(str(folder), None, "train")
    got = load_speech_dataset(*make_source(kind, folder, tmp_path / "copy"))
    assert expected["text"][:] == TRAPS
    assert expected["clip"][:] == [f"audio/{i}.wav" for i in range(len(TRAPS))]
    assert got["clip"][:] == [f"{i}.wav" for i in range(len(TRAPS))]
    assert got.features["audio"] == Audio(decode=False)
    for a, b in zip(expected, got, strict=True):
        assert (a["text"], a["speaker"]) == (b["text"], b["speaker"])
        assert (decode_audio(a["audio"]) == decode_audio(b["audio"])).all()


def test_only_the_files_of_the_split_are_read(folder, tmp_path):
    name, config, split = make_source("hub layout", folder, tmp_path / "copy")
    (tmp_path / "copy" / "clean" / "train.360" / "0000.parquet").write_bytes(b"would raise if it were read")
    assert len(load_speech_dataset(name, config, split)) == len(TRAPS)
    with pytest.raises(Exception, match=r"parquet|Parquet"):
        load_speech_dataset(name, config, "train.360")


def test_configurations(folder, tmp_path):
    name, _, _ = make_source("hub layout", folder, tmp_path / "copy")
    with pytest.raises(UserError, match=r"'cleen' not found. Available: \['clean', 'other'\]"):
        load_speech_dataset(name, "cleen", "train.100")
    with pytest.raises(UserError, match=r"\['clean', 'other'\].*--dataset_config"):
        load_speech_dataset(name, None, "train.100")
    with pytest.raises(UserError, match=r"no split 'dev'; it has train\.100, train\.360"):
        load_speech_dataset(name, "clean", "dev")
    with pytest.raises(UserError, match="has no configurations"):
        load_speech_dataset(str(folder), "clean", "train")


def test_splits_in_subdirectories(tmp_path):
    audiofolder(tmp_path / "train", ["a"])
    audiofolder(tmp_path / "test-other", ["b", "c"])
    dataset = load_speech_dataset(str(tmp_path), None, "test-other")
    assert dataset["text"][:] == ["b", "c"]
    assert dataset["clip"][:] == ["test-other/audio/0.wav", "test-other/audio/1.wav"]
    with pytest.raises(UserError, match="no split 'test'; it has test-other, train"):
        load_speech_dataset(str(tmp_path), None, "test")


def test_metadata_at_the_top_is_train_only(folder):
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        load_speech_dataset(str(folder), None, "test")


@pytest.mark.parametrize(
    "split, rows",
    [
        ("train[:3]", [0, 1, 2]),
        ("train[-2:]", [6, 7]),
        ("train[:25%]", [0, 1]),
        ("test-a[1:]", [9]),
        ("train[7:]+test-a", [7, 8, 9]),
    ],
)
def test_slices_and_sums(tmp_path, split, rows):
    audiofolder(tmp_path / "train", TRAPS)
    audiofolder(tmp_path / "test-a", ["eight", "nine"])
    texts = [*TRAPS, "eight", "nine"]
    assert load_speech_dataset(str(tmp_path), None, split)["text"][:] == [texts[row] for row in rows]


@pytest.mark.parametrize("split", ["train[:x]", "train[:3", "train[20:30]"])
def test_bad_slices(folder, split):
    with pytest.raises(UserError, match=r"train\["):
        load_speech_dataset(str(folder), None, split)


def test_jsonl_keeps_strings_and_parquet_metadata_works(folder):
    expected = load_speech_dataset(str(folder), None, "train")
    rows = [{"file_name": row["clip"], "sentence": row["text"], "speaker": row["speaker"]} for row in expected]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_json = load_speech_dataset(str(folder), None, "train")
    (folder / "metadata.jsonl").rename(folder / "old.jsonl")
    from_json.select_columns(["text", "speaker"]).add_column(
        "file_name", [row["file_name"] for row in rows]
    ).to_parquet(str(folder / "metadata.parquet"))
    from_parquet = load_speech_dataset(str(folder), None, "train")
    for dataset in (from_json, from_parquet):
        for column in ("audio", "text", "clip", "speaker"):
            assert dataset[column][:] == expected[column][:]


def test_byte_order_mark_is_no_part_of_the_header(folder):
    metadata = folder / "metadata.csv"
    metadata.write_bytes(b"\xef\xbb\xbf" + metadata.read_bytes())
    assert load_speech_dataset(str(folder), None, "train")["text"][:] == TRAPS


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbffile_name,text\r\naudio\\0.wav,007\r\n",
        b"file_name, text \n./audio/0.wav,007\n",
        b",file_name,text,\n0,audio/0.wav,007,\n",
        b'"file_name","text"\n"audio/0.wav","007"\n\n',
    ],
)
def test_tables_of_spreadsheets_and_of_pandas(tmp_path, content, caplog):
    audiofolder(tmp_path, ["a"])
    (tmp_path / "metadata.csv").write_bytes(content)
    speech = load_speech_dataset(str(tmp_path), None, "train")
    assert speech["text"][:] == ["007"] and set(speech.column_names) == {"audio", "clip", "text"}
    assert len(decode_audio(speech[0]["audio"])) == len(tone())
    assert ("column 1 has no name" in caplog.text) == content.startswith(b",")


def test_metadata_that_is_no_parquet(tmp_path):
    (tmp_path / "metadata.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"metadata\.parquet can't be read as parquet"):
        load_speech_dataset(str(tmp_path), None, "train")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x\.parquet can't be read as parquet"):
        load_speech_dataset(str(tmp_path / "x.parquet"), None, "train")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"file,text\n0.wav,a\n", "the columns are file, text; expected file_name"),
        (b"file_name\ttext\n0.wav\ta\n", "the columns are file_name\ttext; expected file_name.* not by tabs"),
        (b"file_name;text\n0.wav;a, b\n", "separated by commas, not by semicolons"),
        (b"path,text\n0.wav,a\n", "rename the column 'path' to file_name"),
        (b"audio,text\n0.wav,a\n", "rename the column 'audio' to file_name"),
        (b"File_Name,text\n0.wav,a\n", "rename the column 'File_Name' to file_name"),
        (b"file_name,text,text\n0.wav,a,b\n", "several columns are named 'text'"),
        (b"", "the columns are none"),
        (b"file_name,text\n", "has no rows"),
        (b"file_name,text\n0.wav,a\n1.wav,b,c\n", "metadata.csv, line 3: 3 fields, the header has 2 .file_name, text"),
        (b"file_name,text\n0.wav,a\n,b\n", r"row 1 \(counted from 0\) has no file_name"),
        (b'file_name,text\n0.wav,"a\n', "metadata.csv, line 2: unexpected end of data"),
        (b'file_name,text\n0.wav,a\n1.wav,"b\n2.wav,c\n3.wav,d\n', "line 3 to 5, of one row: unexpected end of data"),
        (b'file_name,text\n0.wav,"a\n1.wav,b\n2.wav,"c"\n', "line 2 to 4, of one row: ',' expected after '\"'"),
        (b'file_name,text\n0.wav,"a\nb"\n1.wav,b,c\n', "metadata.csv, line 4: 3 fields"),
        (b"file_name,text\n0.wav,\xe9\n", "metadata.csv, line 2: not UTF-8; save it as UTF-8"),
        (
            b"file_name,words\n0.wav,a\n",
            "the transcript; the columns are audio, clip, words. Choose one with --text_column_name",
        ),
    ],
)
def test_bad_csv(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_speech_dataset(str(tmp_path), None, "train")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"file_name": "0.wav", "text": "a"}\n{"file_name": \n', "metadata.jsonl, line 2: not JSON"),
        ('["0.wav", "a"]\n', "metadata.jsonl, line 1: expected an object"),
        ('[{"file_name": "0.wav", "text": "a"}]\n', "metadata.jsonl is a JSON array; expected one object per line"),
        ('[\n  {"file_name": "0.wav"}\n]\n', "metadata.jsonl is a JSON array; expected one object per line"),
        ('{"audio_filepath": "0.wav", "text": "a"}\n', "rename the column 'audio_filepath' to file_name"),
        ('{"file_name": "0.wav", "text": "a"}\n{"file_name": "1.wav", "text": ["b"]}\n', "mixes types from row 1 "),
        (
            "".join(f'{{"file_name": "{n}.wav", "text": {n if n == 2 else "null"}}}\n' for n in range(3))
            + '{"file_name": "3.wav", "text": "four"}\n',
            r"column 'text' mixes types from row 3 \(counted from 0\) on",
        ),
        (
            '{"file_name": "0.wav", "text": ["a"]}\n',
            "has type .* not text. Choose the transcript column with --text_column_name",
        ),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_speech_dataset(str(tmp_path), None, "train")


def test_columns_are_chosen_by_option(folder, tmp_path):
    name, _, _ = make_source("parquet file", folder, tmp_path / "copy")
    assert load_speech_dataset(name, None, "train", text_column_name="speaker")["text"][:] == [
        f"s{i}" for i in range(8)
    ]
    with pytest.raises(UserError, match=r"no column 'words' for the transcript; the columns are .*--text_column_name"):
        load_speech_dataset(name, None, "train", text_column_name="words")
    with pytest.raises(UserError, match=r"no column 'sound' for audio; the columns are .*--audio_column_name"):
        load_speech_dataset(name, None, "train", audio_column_name="sound")
    with pytest.raises(UserError, match=r"has type Value\('int64'\), not audio"):
        embedded(folder).remove_columns("audio").add_column("audio", list(range(8))).to_parquet(name)
        load_speech_dataset(name, None, "train")


def test_audio_is_found_by_its_type_and_the_chosen_text_wins(folder, tmp_path):
    dataset = embedded(folder).cast_column("audio", Audio(decode=False)).rename_column("audio", "recording")
    dataset.add_column("text", ["raw"] * 8).save_to_disk(str(tmp_path / "saved"))
    got = load_speech_dataset(str(tmp_path / "saved"), None, "train", text_column_name="transcription")
    assert got["text"][:] == TRAPS
    assert len(decode_audio(got[0]["audio"])) == len(tone())


@pytest.mark.parametrize("streaming", [False, True])
def test_another_column_of_audio_is_not_decoded(folder, tmp_path, streaming):
    dataset = embedded(folder).cast_column("audio", Audio(decode=False))
    noisy = dataset.add_column("noisy", dataset["audio"][:], feature=Audio())
    noisy.to_parquet(tmp_path / "a.parquet")
    rows = list(load_speech_dataset(str(tmp_path / "a.parquet"), None, "train", streaming=streaming))
    assert [row["noisy"] for row in rows] == [row["audio"] for row in rows]


def test_clips_without_a_path_are_named_by_split_and_row(folder, tmp_path):
    dataset = embedded(folder).cast_column("audio", Audio(decode=False))
    nameless = dataset.map(lambda row: {"audio": {"bytes": row["audio"]["bytes"], "path": None}})
    write_parquet(nameless, tmp_path / "a.parquet")
    got = load_speech_dataset(str(tmp_path / "a.parquet"), None, "train[6:]")
    assert got["clip"][:] == ["train[6]", "train[7]"]


def test_clips_of_streams_have_names_of_their_own_whatever_the_order(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s, at the end of every stream
    dataset = embedded(folder).cast_column("audio", Audio(decode=False))
    nameless = dataset.map(lambda row: {"audio": {"bytes": row["audio"]["bytes"], "path": None}})
    for i in range(4):
        write_parquet(
            nameless.select([2 * i, 2 * i + 1]), tmp_path / "copy" / "data" / f"train-0000{i}-of-00004.parquet"
        )
    stream = load_speech_dataset(str(tmp_path / "copy"), None, "train", streaming=True)
    names = {row["text"]: row["clip"] for row in stream}
    assert list(names) == TRAPS and len(set(names.values())) == len(TRAPS)
    shuffled = [row for epoch in range(3) for row in stream.shuffle(seed=epoch, buffer_size=2)]
    assert [row["text"] for row in shuffled] != TRAPS * 3
    assert all(row["clip"] == names[row["text"]] for row in shuffled)
    same = dataset.map(lambda row: {"audio": {"bytes": row["audio"]["bytes"], "path": "audio.wav"}})
    write_parquet(same, tmp_path / "same" / "train.parquet")
    stream = load_speech_dataset(str(tmp_path / "same"), None, "train", streaming=True)
    again = {row["clip"] for row in stream}
    assert len(again) == len(TRAPS) and all(name.startswith("audio.wav-") for name in again)


def test_directories_without_speech(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no speech in .*metadata\.csv"):
        load_speech_dataset(str(tmp_path / "empty"), None, "train")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not a dataset; expected"):
        load_speech_dataset(str(tmp_path / "notes.txt"), None, "train")
    audiofolder(tmp_path / "bare", ["a"])
    (tmp_path / "bare" / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"no metadata\.csv.*: add one with the columns file_name and transcription"):
        load_speech_dataset(str(tmp_path / "bare"), None, "train")
    sounds = load_speech_dataset(str(tmp_path / "bare"), None, "train", text_required=False)  # such as noises
    assert sounds["text"][:] == [None] and Path(sounds[0]["audio"]["path"]).is_file()


@pytest.mark.parametrize("damage", ["cut", "missing", "state"])
def test_a_damaged_dataset_is_named(tmp_path, damage):
    """As an interrupted copy or a full disk leaves it."""
    rows = load_speech_dataset(str(audiofolder(tmp_path / "speech", ["a", "b"])), None, "train")
    rows.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "missing":
        file.unlink()
    else:
        (tmp_path / "saved" / "state.json").write_text('{"_data_files": [')
    with pytest.raises(UserError, match=r"saved is incomplete or damaged \(.*\): copy it or save it again"):
        load_speech_dataset(str(tmp_path / "saved"), None, "train")


def cased(tmp_path, texts: list[str], text_case: str) -> list[str]:
    warn_once.cache_clear()
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], *([f"{i}.wav", t] for i, t in enumerate(texts))])
    return clean_texts(load_speech_dataset(str(tmp_path), None, "train"), text_case, "mine")["text"][:]


@pytest.mark.parametrize(
    "text_case, texts, expected",
    [
        ("auto", ["HELLO  THERE ", "IT'S 5"], ["hello there", "it's 5"]),
        ("auto", ["HELLO", "Dr. No"], ["HELLO", "Dr. No"]),
        ("auto", ["1 2", "3"], ["1 2", "3"]),
        ("lower", ["Dr.\tNo"], ["dr. no"]),
        ("keep", ["HELLO  THERE"], ["HELLO THERE"]),
    ],
)
def test_case(tmp_path, caplog, text_case, texts, expected):
    with caplog.at_level(logging.INFO):
        assert cased(tmp_path, texts, text_case) == expected
    assert ("all upper-case" in caplog.text) == (text_case == "auto" and texts[0].startswith("HELLO  "))
