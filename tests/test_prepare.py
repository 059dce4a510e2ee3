"""`askd-hf prepare`: a CSV file with names of its own becomes a dataset whose splits share no speaker."""

import csv
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech import encoded, write_speech

from askd_hf.commands import prepare
from askd_hf.commands.main import main
from askd_hf.commands.next_steps import better_step
from askd_hf.commands.options import parse
from askd_hf.data import load_speech_dataset

SPLITS = ("train", "validation", "test")
NAMES = ["--audio_column", "recording", "--text_column", "what was said", "--speaker_column", "who"]


@pytest.fixture
def recordings(tmp_path) -> Path:
    """24 clips of 12 speakers."""
    return write_speech(tmp_path / "speech", clips=24) / "audio"


def write_list(
    path: Path, recordings: Path, separator: str = ";", header=("recording", "what was said", "who", "city")
):
    """A list of the recordings, two of each speaker. The text has commas and quotes."""
    rows = [
        (file.name, f'one, "two" {file.stem}', f"speaker {number // 2:02}", "Rome")
        for number, file in enumerate(sorted(recordings.iterdir()))
    ]
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheet programs write
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def run(*arguments, error: str | None = None, capsys) -> str:
    if error is None:
        main(["prepare", *map(str, arguments)])
    else:
        with pytest.raises(SystemExit) as stop:
            main(["prepare", *map(str, arguments)])
        assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert error is None or error in err, err
    return out


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_splits_share_no_speaker_and_lose_no_clip(tmp_path, recordings, capsys, separator):
    listed = write_list(tmp_path / "list.csv", recordings, separator)
    target = tmp_path / "out"
    printed = run("--source", listed, "--audio_dir", recordings, "--target", target, *NAMES, capsys=capsys)
    speakers, clips = {}, []
    for split in SPLITS:
        dataset = load_speech_dataset(str(target / split), None, "train")
        speakers[split] = set(dataset["speaker"])
        for row in dataset:
            name = Path(row["clip"]).name
            assert row["text"] == f'one, "two" {Path(name).stem}' and row["city"] == "Rome"
            assert (target / split / name).read_bytes() == (recordings / name).read_bytes()
            clips.append(name)
    assert sorted(clips) == sorted(file.name for file in recordings.iterdir())
    numbers = {name: sorted(int(speaker.split()[1]) for speaker in those) for name, those in speakers.items()}
    assert numbers == dict(train=[2, 3, 4, 6, 7, 8, 9], validation=[1, 11], test=[0, 5, 10])
    assert "train: 14 clips of 7 speakers, 42 words" in printed
    assert "few speakers: a smaller --validation_every" in printed and "--test_every makes" not in printed


def test_an_audiofolder_is_split_and_keeps_its_directories(tmp_path, recordings, capsys):
    folder = recordings.parent
    rows = list(csv.DictReader((folder / "metadata.csv").open(newline="")))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription", "speaker"])
        writer.writerows((row["file_name"], row["transcription"], i) for i, row in enumerate(rows))
    run("--source", folder, "--target", tmp_path / "out", capsys=capsys)
    assert sum(len(list((tmp_path / "out" / split / "audio").iterdir())) for split in SPLITS) == 24


def test_lengths_are_those_of_the_files(tmp_path, recordings, capsys):
    first, *others = sorted(recordings.iterdir())
    first.write_bytes(b"RIFF")  # of an unknown length: it stays, and training names it
    soundfile.write(others[0], np.zeros(8_000 * 31), 8_000)
    content = encoded(np.zeros(16_000 * 8))
    at = content.index(b"data") + 4  # a program that writes to a pipe may state a length of 0
    others[1].write_bytes(content[:at] + bytes(4) + content[at + 4 :])
    seconds = {file: soundfile.info(file).duration for file in (others[0], *others[2:])} | {others[1]: 8.0}
    listed = write_list(tmp_path / "list.csv", recordings)
    options = "--source", listed, "--audio_dir", recordings, *NAMES
    for limit in (None, 9, 0.7):
        target = tmp_path / f"out{limit}"
        printed = run(*options, "--target", target, *(["--max_seconds", limit] if limit else []), capsys=capsys)
        chosen = {file for file in recordings.iterdir() if not limit or seconds.get(file, 0) <= limit}
        assert {file.name for file in target.rglob("*.wav")} == {file.name for file in chosen}
        assert printed.count("1 clip can't be decoded: askd-hf distill names them") == 1
        assert ("1 clip longer than 30 s" in printed) == (limit is None)
        left_out = (
            f"{24 - len(chosen)} of 24 clips left out: longer than --max_seconds {limit:g}" if limit else "left out"
        )
        assert (left_out in printed) == (limit is not None)
        for split in SPLITS:
            names = {recordings / file.name for file in (target / split).glob("*.wav")} - {first}
            lengths = sorted(seconds[file] for file in names)
            shares = [100 * sum(length <= window for length in lengths) / len(lengths) for window in (6, 10)]
            assert f"\n  {lengths[0]:.1f} to {lengths[-1]:.1f} s, median {np.median(lengths):.1f} s; " in printed
            assert f"{shares[0]:.0f} % fit in 6 s, {shares[1]:.0f} % fit in 10 s" in printed
    shutil.copyfile(others[0], first)
    error = f"no clip is as short as --max_seconds 0.1: the shortest has {min(seconds.values()):.1f} s"
    run(*options, "--target", tmp_path / "no", "--max_seconds", 0.1, error=error, capsys=capsys)


@pytest.mark.parametrize("seconds, text", [(128, "29 min 52 s"), (129, "30 min 6 s")])
def test_less_than_half_an_hour_is_told(tmp_path, recordings, capsys, seconds, text):
    for file in recordings.iterdir():
        soundfile.write(file, np.zeros(1000 * seconds), 1000)
    options = "--source", write_list(tmp_path / "list.csv", recordings), "--audio_dir", recordings, *NAMES
    printed = run(*options, "--target", tmp_path / "my speech", capsys=capsys)
    assert f"train: 14 clips of 7 speakers, 42 words, {text}\n" in printed
    assert (f"{text} for training may be too little" in printed) == (seconds * 14 < 1800)
    command = next(line for line in printed.splitlines() if line.startswith("  askd-hf plan "))
    (args,) = parse("plan", shlex.split(command)[2:])
    assert (args.speedup, args.teacher, args.dataset) == (5, "openai/whisper-small", str(tmp_path / "my speech"))
    command = next(line for line in printed.splitlines() if line.startswith("  askd-hf evaluate "))
    (args,) = parse("evaluate", shlex.split(command)[2:])
    assert args.language == "en" and args.eval_splits == ["test"]  # a multilingual model requires a language


def test_without_speakers_clips_are_split(tmp_path, recordings, capsys):
    listed = write_list(tmp_path / "list.csv", recordings)
    options = "--source", listed, "--audio_dir", recordings, *NAMES[:4]
    run(*options, "--target", tmp_path / "out", error="has no column 'speaker'", capsys=capsys)
    for name in ("out", "again"):
        run(*options, "--speaker_column", "none", "--target", tmp_path / name, capsys=capsys)
    first, second = (
        [(tmp_path / name / split / "metadata.csv").read_text() for split in SPLITS] for name in ("out", "again")
    )
    assert first == second and [text.count("\n") - 1 for text in first] == [16, 3, 5]


def test_files_are_copied_where_they_cannot_be_linked(tmp_path, recordings, capsys, monkeypatch):
    def link(*args):
        raise OSError("another disk")

    monkeypatch.setattr(prepare.os, "link", link)
    listed = write_list(tmp_path / "list.csv", recordings)
    run("--source", listed, "--audio_dir", recordings, "--target", tmp_path / "out", *NAMES, capsys=capsys)
    assert len(list((tmp_path / "out").rglob("*.wav"))) == 24


def test_absolute_paths_are_themselves(tmp_path, recordings, capsys):
    listed = write_list(tmp_path / "list.csv", recordings)
    text = listed.read_text(encoding="utf-8-sig")
    for file in recordings.iterdir():
        text = text.replace(f"\n{file.name};", f"\n{file};")
    listed.write_text(text)
    run("--source", listed, "--target", tmp_path / "out", *NAMES, capsys=capsys)
    assert len(list((tmp_path / "out").rglob("*.wav"))) == 24


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_quoted_headers_are_read(tmp_path, recordings, capsys, separator):
    """As pandas and databases write them; a list may quote one name only."""
    listed = write_list(tmp_path / "list.csv", recordings, separator, ("recording", "what was said", "who", "a, b;c"))
    rows = list(csv.reader(listed.open(newline="", encoding="utf-8-sig"), delimiter=separator))
    with listed.open("w", newline="") as file:
        csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL).writerows(rows)
    run("--source", listed, "--audio_dir", recordings, "--target", tmp_path / "out", *NAMES, capsys=capsys)
    rows = load_speech_dataset(str(tmp_path / "out"), None, "train")
    assert len(rows) == 14 and set(rows["a, b;c"][:]) == {"Rome"}


@pytest.mark.parametrize("given", [True, False])
def test_a_directory_per_speaker_keeps_files_of_one_name_apart(tmp_path, recordings, capsys, given):
    """The paths are absolute, or of Windows; without --audio_dir they are relative to the list."""
    files = sorted(recordings.iterdir())
    rows = []
    for number, file in enumerate(files):
        folder = recordings / f"s{number // 2:02}"
        folder.mkdir(exist_ok=True)
        file.rename(folder / f"{number % 2}.wav")
        path = f"{folder.name}\\{number % 2}.wav" if number < 4 else folder / f"{number % 2}.wav"
        rows.append((path, f"words {number}", folder.name))
    listed = (tmp_path if given else recordings) / "list.csv"
    with listed.open("w", newline="") as opened:
        csv.writer(opened).writerows([("file_name", "transcription", "speaker"), *rows])
    where = ["--audio_dir", recordings] if given else []
    run("--source", listed, *where, "--target", tmp_path / "out", capsys=capsys)
    assert {file.relative_to(tmp_path / "out").parts[1] for file in (tmp_path / "out").rglob("*.wav")} == {
        f"s{number:02}" for number in range(12)
    }
    if given:
        shutil.rmtree(tmp_path / "out")
        other = tmp_path / "elsewhere"
        other.mkdir()
        text = listed.read_text().replace("s00\\", f"{recordings}/s00/").replace("s01\\", f"{recordings}/s01/")
        listed.write_text(text)
        error = "have the same name outside of"
        run("--source", listed, "--audio_dir", other, "--target", tmp_path / "out", error=error, capsys=capsys)


def test_columns_that_are_not_chosen_are_kept_under_names_of_their_own(tmp_path, recordings, capsys):
    header = ("recording", "what was said", "who", "transcription", "text", "other_text")
    rows = [
        (file.name, f"words {number}", f"speaker {number}", "machine", "raw", "kept")
        for number, file in enumerate(sorted(recordings.iterdir()))
    ]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    options = "--source", tmp_path / "list.csv", "--audio_dir", recordings, "--target", tmp_path / "out", *NAMES
    run(*options, capsys=capsys)
    loaded = load_speech_dataset(str(tmp_path / "out"), None, "train")
    values = {name: set(loaded[name][:]) for name in ("other_transcription", "other_text", "other_other_text")}
    assert values == dict(other_transcription={"machine"}, other_text={"kept"}, other_other_text={"raw"})
    assert all(text.startswith("words ") for text in loaded["text"][:])


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        (None, [], "has no column 'file_name'; it has recording, what was said, who, city: give --audio_column"),
        (None, [*NAMES[:2], *NAMES[4:]], "has no column 'transcription'"),
        ("missing", NAMES, "audio: give another --audio_dir\n  row 3: 003.wav\n  row 17: 017.wav"),
        ("twice", NAMES, "000.wav and 000.wav are one file, or have the same name"),
        ("target", NAMES, "already exists: choose another --target"),
        ("speaker", NAMES, "2 of 24 rows have no speaker in column 'who', the first is row 6 (counted from 0)"),
        ("latin", NAMES, "list.csv, line 2: not UTF-8; save it as UTF-8, in Excel as `CSV UTF-8`"),
        (None, [*NAMES, "--validation_every", "2", "--test_every", "2"], "no clip for train"),
        ("two", NAMES, "no clip for train, of 2 speakers: give --speaker_column none to split by clip"),
        (None, [*NAMES, "--validation_every", "2", "--test_every", "2"], "give a larger --test_every"),
        (None, [*NAMES, "--test_every", "1"], "--test_every must be at least 2"),
        ("blank", NAMES, "2 of 24 rows have no file in column 'recording', the first is row 3 (counted from 0)"),
        ("json", NAMES, "list.jsonl: expected a CSV file, with the names of its columns in the first line"),
        ("none", NAMES, "expected a CSV file, or a directory with a metadata.csv"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, recordings, capsys, change, options, error):
    listed = write_list(tmp_path / "list.csv", recordings)
    if change == "missing":
        for name in ("003.wav", "017.wav"):
            (recordings / name).unlink()
    elif change == "twice":
        listed.write_text(listed.read_text().replace("001.wav;", "000.wav;"))
    elif change == "target":
        shutil.copytree(recordings, tmp_path / "out")
    elif change == "two":
        listed.write_text(re.sub(r"speaker \d(\d)", lambda found: f"speaker {int(found[1]) % 2}", listed.read_text()))
    elif change == "none":
        listed.unlink()
    elif change == "blank":
        listed.write_text(listed.read_text().replace("003.wav;", ";").replace("004.wav;", " ;"))
    elif change == "json":
        listed = listed.rename(tmp_path / "list.jsonl")
        listed.write_text('{"file_name": "000.wav", "text": "one"}\n')
    elif change == "speaker":
        listed.write_text(listed.read_text().replace("speaker 03", " "))
    elif change == "latin":
        listed.write_bytes(listed.read_bytes().replace(b"one, ", "é".encode("latin-1"), 2)[:-1])
    arguments = "--source", listed, "--audio_dir", recordings, "--target", tmp_path / "out", *options
    before = sorted(tmp_path.rglob("*"))
    run(*arguments, error=error, capsys=capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_spaces_make_no_other_speaker_and_untranscribed_clips_are_counted(tmp_path, recordings, capsys):
    listed = write_list(tmp_path / "list.csv", recordings)
    rows = listed.read_text().splitlines()
    rows[1] = rows[1].replace("speaker 00", "speaker 00 ")
    rows[3] = f"{rows[3].split(';')[0]}; ;Speaker 01;Rome"
    listed.write_text("\n".join(rows))
    main(
        ["prepare", "--source", str(listed), "--audio_dir", str(recordings), "--target", str(tmp_path / "out"), *NAMES]
    )
    printed = capsys.readouterr()
    assert "'Speaker 01' and 'speaker 01' are taken for two speakers" in printed.err
    assert printed.out.count("1 clip without a transcript") == 1
    of = {}
    for split in SPLITS:
        for speaker in load_speech_dataset(str(tmp_path / "out"), None, split)["speaker"]:
            of.setdefault(speaker, set()).add(split)
    assert len(of) == 13 and all(len(splits) == 1 for splits in of.values())


def test_without_speakers_a_column_of_that_name_is_kept(tmp_path, recordings, capsys):
    listed = write_list(tmp_path / "list.csv", recordings, header=("recording", "what was said", "speaker", "city"))
    columns = [*NAMES[:4], "--speaker_column", "none"]
    run("--source", listed, "--audio_dir", recordings, "--target", tmp_path / "out", *columns, capsys=capsys)
    names = load_speech_dataset(str(tmp_path / "out"), None, "train")["speaker"][:]
    assert names and all(name.startswith("speaker ") for name in names)


def test_a_better_step_than_the_last_is_named():
    steps = [{"step": 9, "loss": 1.0}, *({"step": step, "eval_wer": wer} for step, wer in ((9, 30.5), (18, 36.2)))]
    assert better_step(steps) == "the student is that of step 18, eval_wer 36.2 %; step 9 had 30.5 %"
    assert better_step(steps[:2]) is None and better_step(steps[:1]) is None
    sorted_keys = [dict(sorted({**row, "eval_capped_wer": 10.0 * number}.items())) for number, row in enumerate(steps)]
    assert better_step(sorted_keys) == better_step(steps)  # as trainer_state.json has them
    sets = [
        {"step": step, f"eval_{name}_wer": wer}
        for step, name, wer in [(1, "a", 9), (1, "b", 5), (2, "a", 8), (2, "b", 6)]
    ]
    assert better_step(sets) is None


def test_the_chosen_transcripts_are_the_loaded_ones(tmp_path, recordings, capsys):
    """A column `text` comes before `transcription` when a dataset is loaded."""
    listed = write_list(tmp_path / "list.csv", recordings, header=("recording", "what was said", "who", "text"))
    target = tmp_path / "out"
    run("--source", listed, "--audio_dir", recordings, "--target", target, *NAMES, capsys=capsys)
    rows = load_speech_dataset(str(target), None, "train")
    assert set(rows["other_text"][:]) == {"Rome"} and all(text.startswith("one, ") for text in rows["text"])
