"""What the check of clips keeps on disk: each file is decoded once, in any process and start."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, Features, Value
from processes import launch
from scripts import ROOT
from speech import write_speech
from torch.utils.data import DataLoader

from askd_hf import progress
from askd_hf.data import Limits, audio_checks, checks, filter_invalid_clips, load_speech_dataset
from askd_hf.data.audio import read_audio
from askd_hf.data.columns import AUDIO_FILE
from askd_hf.errors import UserError

RUN = ROOT / "tests" / "support" / "audio_checks_run.py"


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch) -> Path:
    """A directory of this test for what the checks find."""
    monkeypatch.setattr(audio_checks, "kept_in", lambda: tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that this process decodes."""
    names: list[str] = []

    def read(audio):
        names.append(Path(audio.get("path") or "").name)
        return read_audio(audio)

    monkeypatch.setattr(audio_checks, "read_audio", read)
    return names


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_speech(tmp_path / "speech", clips=6, seed=3)


def check(folder: Path, **options) -> Dataset:
    speech = load_speech_dataset(str(folder), None, "train")
    return filter_invalid_clips(speech, None, Limits(30.0), on_bad_audio="error", num_proc=0, **options)


def columns(dataset: Dataset) -> list:
    return [dataset[name][:] for name in ("clip", "duration", "audio_key")]


def test_a_second_check_decodes_nothing_and_finds_the_same(folder, decoded):
    first = check(folder)
    assert len(decoded) == 6
    again = check(folder)
    assert len(decoded) == 6 and columns(again) == columns(first)
    assert columns(check(folder, recheck=True)) == columns(first) and len(decoded) == 12


@pytest.mark.parametrize("change", ["content", "time", "copy"])
def test_a_changed_file_is_decoded_again(folder, decoded, change):
    before = check(folder)
    file = sorted(folder.rglob("*.wav"))[2]
    if change == "content":
        samples, rate = soundfile.read(file)
        soundfile.write(file, samples[: len(samples) // 2], rate)
    elif change == "time":
        os.utime(file, ns=(1, 1))
    else:
        folder = Path(shutil.copytree(folder, folder.with_name("copy")))
    del decoded[:]
    after = check(folder)
    assert decoded == [file.name] if change != "copy" else len(decoded) == 6
    assert (after["duration"][2] != before["duration"][2]) == (change == "content")
    assert (after["audio_key"][2] != before["audio_key"][2]) == (change == "content")


def test_an_added_clip_is_the_only_one_that_is_decoded(folder, decoded):
    check(folder)
    soundfile.write(folder / "audio" / "added.wav", np.sin(np.arange(16_000) / 20), 16_000)
    with (folder / "metadata.csv").open("a") as metadata:
        metadata.write("audio/added.wav,bad\n")
    del decoded[:]
    assert len(check(folder)) == 7 and decoded == ["added.wav"]


def test_silence_is_kept_and_bad_audio_is_not(folder, decoded):
    silent, broken = sorted(folder.rglob("*.wav"))[:2]
    soundfile.write(silent, np.zeros(16_000), 16_000)
    broken.write_bytes(broken.read_bytes()[:-500])
    messages = []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            check(folder)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "2 of 6 clips are invalid" in messages[0] and silent.name in messages[0]
    assert decoded[6:] == [broken.name]


def test_audio_in_the_rows_is_known_by_its_bytes(folder, decoded):
    files = sorted(folder.rglob("*.wav"))
    rows = [{"path": file.name, "bytes": file.read_bytes()} for file in files]
    for names in (rows, [row | {"path": None} for row in rows]):
        infos = audio_checks.audio_infos(
            Dataset.from_dict({"audio": names}, Features(audio=AUDIO_FILE)), 0, False, lambda clips: None
        )
    assert len(decoded) == 6
    assert [(info.duration, info.key) for info in infos] == [
        (len(samples) / rate, audio_checks.audio_key(samples, rate))
        for samples, rate in (read_audio(row) for row in rows)
    ]


@pytest.fixture
def hashed(monkeypatch) -> list[bytes]:
    """The embedded audio that this process hashes to know whether it was checked before."""
    contents: list[bytes] = []
    file_key = audio_checks.file_key

    def note(audio):
        contents.append(audio["bytes"])
        return file_key(audio)

    monkeypatch.setattr(audio_checks, "file_key", note)
    return contents


@pytest.fixture
def embed(tmp_path, monkeypatch):
    """A function that writes the clips of a directory, with their audio, to a Parquet file or a saved dataset."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(folder: Path, target: Path) -> Path:
        files = sorted(folder.rglob("*.wav"))
        rows = [{"path": file.name, "bytes": file.read_bytes()} for file in files]
        table = {"audio": rows, "text": [file.stem for file in files]}
        dataset = Dataset.from_dict(table, Features(audio=AUDIO_FILE, text=Value("string")))
        dataset = dataset.cast_column("audio", Audio(decode=False))
        if target.suffix:
            target.parent.mkdir(exist_ok=True)
            dataset.to_parquet(target)
            return target.parent
        dataset.save_to_disk(target)
        return target

    return write


@pytest.mark.parametrize("target", ["parquet/train.parquet", "saved"])
def test_embedded_audio_is_read_once(folder, tmp_path, embed, decoded, hashed, kept, target):
    """As long as the Arrow files are the same: a later start reads only what is kept of them."""
    target = tmp_path / target
    first = check(embed(folder, target))
    assert len(decoded) == len(hashed) == 6
    again = check(embed_of(target))
    assert columns(again) == columns(first) and len(decoded) == len(hashed) == 6
    # other rows of them are other rows, and a recheck reads all
    speech = load_speech_dataset(str(embed_of(target)), None, "train")
    for chosen in ([1, 3], [0, 3]):
        some = filter_invalid_clips(speech.select(chosen), None, Limits(30.0), on_bad_audio="error", num_proc=0)
        assert some["audio_key"][:] == [first["audio_key"][row] for row in chosen]
    assert len(hashed) == 10
    check(embed_of(target), recheck=True)
    assert len(hashed) == 16 and len(decoded) == 12
    # a file that isn't whole isn't used
    for file in kept.glob("*.keys"):
        file.write_bytes(bytes(len(file.read_bytes())))
    assert columns(check(embed_of(target))) == columns(first) and len(hashed) == 22
    # other audio in files of the same names
    file = sorted(folder.rglob("*.wav"))[2]
    samples, rate = soundfile.read(file)
    soundfile.write(file, samples[::-1], rate)
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    changed = check(embed(folder, target))
    assert len(hashed) == 28 and len(decoded) == 13
    expected = [*first["audio_key"][:]]
    expected[2] = audio_checks.audio_key(*read_audio({"bytes": file.read_bytes()}))
    assert changed["audio_key"][:] == expected != first["audio_key"][:]


def embed_of(target: Path) -> Path:
    return target.parent if target.suffix else target


def test_an_arrow_file_that_was_replaced_is_read_again(folder, tmp_path, embed, decoded, hashed):
    """Its dataset has the same fingerprint, as `datasets` has not been told of it."""
    saved = embed(folder, tmp_path / "saved")
    first = check(saved)
    (file,) = saved.glob("*.arrow")
    stored = Dataset.from_file(str(file))
    files = stored["audio"][:]
    swapped = [{"path": row["path"], "bytes": other["bytes"]} for row, other in zip(files, files[::-1], strict=True)]
    table = {"audio": swapped, "text": stored["text"][:]}
    other = Dataset.from_dict(table, Features(audio=AUDIO_FILE, text=Value("string")))
    other.cast_column("audio", Audio(decode=False)).save_to_disk(tmp_path / "other")
    (tmp_path / "other" / file.name).replace(file)
    again = check(saved)
    assert again["text"][:] == first["text"][:] and again["audio_key"][:] == first["audio_key"][::-1]
    assert len(hashed) == 12 and len(decoded) == 6


def test_files_that_a_parquet_file_names_may_change(folder, tmp_path, decoded, kept, monkeypatch):
    """Their paths are in its rows, and not their audio."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = sorted(folder.rglob("*.wav"))
    rows = [{"audio": {"path": str(file), "bytes": None}, "text": file.stem} for file in files]
    rows[0]["audio"]["bytes"] = files[0].read_bytes()
    (tmp_path / "paths").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "paths" / "train.parquet")
    check(tmp_path / "paths")
    soundfile.write(files[2], soundfile.read(files[2])[0][::-1], 16_000)
    check(tmp_path / "paths")
    assert len(decoded) == 7 and not list(kept.glob("*.keys"))


def test_the_keys_of_few_datasets_are_kept(folder, tmp_path, embed, hashed, kept, monkeypatch):
    monkeypatch.setattr(audio_checks, "MAX_ROW_KEYS", 2)
    saved = [embed(folder, tmp_path / name) for name in "abc"]
    for one in (*saved[:2], saved[0], saved[2]):  # b is the one that was used longest ago
        check(one)
    assert len(list(kept.glob("*.keys"))) == 2 and len(hashed) == 18
    check(saved[0])
    assert len(hashed) == 18
    check(saved[1])
    assert len(hashed) == 24


@pytest.mark.parametrize("merged", [False, True])
def test_what_a_recheck_finds_replaces_what_was_found_before(folder, decoded, kept, monkeypatch, merged):
    check(folder)
    file = sorted(folder.rglob("*.wav"))[0]
    stat = file.stat()
    samples, rate = soundfile.read(file)
    soundfile.write(file, samples[::-1], rate)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = audio_checks.audio_key(*read_audio({"path": str(file), "bytes": None}))
    assert check(folder)["audio_key"][0] != changed  # path, size and time are the same
    if merged:
        monkeypatch.setattr(audio_checks, "MAX_FILES", 1)
    assert check(folder, recheck=True)["audio_key"][0] == changed
    assert check(folder)["audio_key"][0] == changed and len(decoded) == 12
    if merged:
        assert [pq.read_metadata(file).num_rows for file in kept.iterdir()] == [6]


def test_many_clips_are_decoded_by_a_process_per_core(folder, monkeypatch, kept):
    started: list[int] = []

    def loader(*args, num_workers: int, **options):
        started.append(num_workers)
        return DataLoader(*args, num_workers=num_workers, **options)

    monkeypatch.setattr(audio_checks, "DataLoader", loader)
    monkeypatch.setattr(audio_checks.os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    speech = load_speech_dataset(str(folder), None, "train")
    found = []
    for clips_per_process in (500, 3, 1):
        monkeypatch.setattr(audio_checks, "CLIPS_PER_PROCESS", clips_per_process)
        found.append(filter_invalid_clips(speech, None, Limits(30.0), on_bad_audio="error", recheck=True))
    assert started == [0, 2, 3] and columns(found[0]) == columns(found[1]) == columns(found[2])


def test_a_file_that_cannot_be_read_costs_its_clips_only(folder, decoded, kept, caplog):
    first = check(folder)
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert columns(check(folder)) == columns(first) and len(decoded) == 12
    assert f"{file}: can't be read" in caplog.text


def test_a_cache_that_cannot_be_written_is_only_a_warning(folder, kept, caplog):
    kept.write_text("a file in place of the directory")
    assert len(check(folder)) == 6
    assert "can't be written, so the next start decodes the clips again" in caplog.text


def test_many_files_are_merged_and_nothing_is_lost(folder, decoded, kept, monkeypatch):
    monkeypatch.setattr(audio_checks, "PART_CLIPS", 1)
    monkeypatch.setattr(audio_checks, "MAX_FILES", 4)
    check(folder)
    files = list(kept.iterdir())
    assert len(files) == 2 and sum(pq.read_metadata(file).num_rows for file in files) == 6
    check(folder)
    assert len(decoded) == 6


def test_an_interrupted_check_goes_on_where_it_was(folder, decoded, monkeypatch):
    monkeypatch.setattr(audio_checks, "PART_CLIPS", 2)
    decode = audio_checks.read_audio

    def interrupted(audio):
        if len(decoded) == 5:
            raise KeyboardInterrupt
        return decode(audio)

    monkeypatch.setattr(audio_checks, "read_audio", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(folder)
    monkeypatch.setattr(audio_checks, "read_audio", decode)
    check(folder)
    assert len(decoded) == 5 + 2  # four were kept


def run(processes: int, folder: Path, home: Path, result: Path) -> tuple[list[list[str]], list[dict]]:
    """Return the files that each process decoded, and what each found."""
    done = launch(processes, RUN, folder, home, result)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(result.with_name(f"{result.name}-{rank}.json").read_text()) for rank in range(processes)]
    return [process["decoded"] for process in found], [process["columns"] for process in found]


def test_processes_share_the_clips_and_find_what_one_finds(tmp_path):
    folder = write_speech(tmp_path / "speech", clips=13, seed=4)
    files = sorted(folder.rglob("*.wav"))
    files[7].write_bytes(files[7].read_bytes()[:-500])
    (one,), (expected,) = run(1, folder, tmp_path / "one", tmp_path / "result-1")
    assert one == [file.name for file in files]
    skipped = (tmp_path / "skipped.csv").read_text()
    assert (
        len(expected["clip"]) < 12 and "audio/007.wav,truncated" in skipped and "under --min_label_length" in skipped
    )
    for processes in (2, 4):
        home, result = tmp_path / str(processes), tmp_path / f"result-{processes}"
        (tmp_path / "skipped.csv").unlink()
        decoded, found = run(processes, folder, home, result)
        assert sorted(chain(*decoded)) == one and all(decoded)
        assert found == [expected] * processes
        assert (tmp_path / "skipped.csv").read_text() == skipped
    (again,), found = run(1, folder, tmp_path / "4", tmp_path / "again")
    assert again == [files[7].name] and found == [expected]  # bad audio is decoded again


def test_the_progress_of_several_processes_is_said_to_be_an_estimate(folder, monkeypatch, capsys):
    """It is that of the first one, which has three of six clips, times two."""
    monkeypatch.setattr(checks, "PartialState", lambda: SimpleNamespace(num_processes=2, process_index=0))
    monkeypatch.setattr(checks, "gather_object", lambda found: [*found, *found])
    monkeypatch.setattr(audio_checks, "BATCH", 1)
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    check(folder, share_work=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Checking train: ")]
    assert [line.split()[2] for line in lines] == ["2/6,", "4/6,", "6/6,"]
    assert all(line.endswith(" left (estimated from the first process)") for line in lines[:2])
