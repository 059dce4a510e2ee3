"""What the check of clips keeps on disk: each file is decoded once, in any process and start."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Dataset, Features
from processes import launch
from scripts import ROOT
from speech import write_speech
from torch.utils.data import DataLoader

from askd_hf.data import Limits, audio_checks, filter_invalid_clips, load_speech_dataset
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
    skipped = (tmp_path / "skipped-0.csv").read_text()
    assert (
        len(expected["clip"]) < 12 and "audio/007.wav,truncated" in skipped and "under --min_label_length" in skipped
    )
    for processes in (2, 4):
        home, result = tmp_path / str(processes), tmp_path / f"result-{processes}"
        decoded, found = run(processes, folder, home, result)
        assert sorted(chain(*decoded)) == one and all(decoded)
        assert found == [expected] * processes
        assert {(tmp_path / f"skipped-{rank}.csv").read_text() for rank in range(processes)} == {skipped}
    (again,), found = run(1, folder, tmp_path / "4", tmp_path / "again")
    assert again == [files[7].name] and found == [expected]  # bad audio is decoded again
