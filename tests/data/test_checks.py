"""Every kind of bad row, by name and number."""

import csv

import numpy as np
import pytest
import soundfile
from speech import RATE, encoded, noise, tone, write_csv

from askd_hf.data import Limits, filter_invalid_clips, load_speech_dataset
from askd_hf.data.labels import timestamp_error
from askd_hf.errors import UserError

TEXTS = ["ab", "ab", "ab", "ab", "ab", "ab", "ab", "a" * 30, "", "  ", "fine"]
BAD = {
    1: ("1.wav", "missing file"),
    2: ("2.wav", "not an audio file"),
    3: ("3.wav", "truncated"),
    4: ("4.wav", "empty"),
    5: ("5.wav", "NaN"),
    6: ("6.wav", "too long: 1.50 s, the limit is 1 s"),
    7: ("7.wav", "transcript too long: 30 tokens, the limit is 20"),
    8: ("8.wav", "empty transcript"),
    9: ("9.wav", "empty transcript"),
}


@pytest.fixture
def mixed(tmp_path):
    """Rows 0 and 10 are good, each of the others is bad in its own way."""
    rows = [["file_name", "text"], *([f"{i}.wav", text] for i, text in enumerate(TEXTS))]
    write_csv(tmp_path / "metadata.csv", rows)
    for i in (0, 7, 8, 9, 10):
        soundfile.write(tmp_path / f"{i}.wav", tone(seconds=0.25 + i / 100), RATE)
    (tmp_path / "2.wav").write_bytes(b"<html>not found</html>")
    (tmp_path / "3.wav").write_bytes(encoded(noise())[:9000])
    (tmp_path / "4.wav").write_bytes(encoded(tone()[:0]))
    soundfile.write(tmp_path / "5.wav", np.array([0.0, np.nan]), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "6.wav", tone(seconds=1.5), RATE)
    return load_speech_dataset(str(tmp_path), None, "train")


def check(dataset, **changes):
    options = dict(limits=Limits(1.0, 20), on_bad_audio="error", split="train")
    return filter_invalid_clips(dataset, lambda row: list(map(ord, row["text"])), **(options | changes))


def test_a_list_of_skipped_clips_goes_when_none_is_skipped(mixed, tmp_path):
    report = tmp_path / "skipped.csv"
    check(mixed, on_bad_audio="skip", report_file=report)
    assert report.exists()
    assert len(check(mixed.select([0, 10]), report_file=report)) == 2
    assert not report.exists()


def test_one_audio_with_two_transcripts_is_a_warning(tmp_path, caplog):
    """A corrected row beside the wrong one; the same row twice, and a translation, are none."""
    rows = [["file_name", "text", "task"], ["0.wav", "zero", ""], ["1.wav", "one", ""], ["1.wav", "one", ""]]
    write_csv(tmp_path / "metadata.csv", [*rows, ["1.wav", "eins", "translate"]])
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", tone(200 + 100 * i), RATE)
    check(load_speech_dataset(str(tmp_path), None, "train"))
    assert not caplog.text
    write_csv(tmp_path / "metadata.csv", [*rows, ["0.wav", "seven", ""]])
    assert len(check(load_speech_dataset(str(tmp_path), None, "train"))) == 4
    warning = "train: 1 of 4 clips have the audio of an earlier row and another transcript, such as 0.wav: "
    assert f"{warning}'zero' and 'seven'" in caplog.text


def test_error_names_every_bad_row(mixed):
    with pytest.raises(UserError) as error:
        check(mixed)
    message = str(error.value)
    lines = message.splitlines()
    assert lines[0].startswith("train: 9 of 11 clips are invalid (2 empty transcript, 1 missing file, ")
    assert "--on_bad_audio skip" in lines[-1]
    listed = lines[1:-1]
    assert len(listed) == len(BAD)
    for line, (row, (clip, reason)) in zip(listed, BAD.items(), strict=True):
        assert line.startswith(f"  row {row}, {clip}: {reason}")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_skip_keeps_the_good_rows_and_lists_the_bad_ones(mixed, tmp_path, caplog, num_proc):
    report = tmp_path / "run" / "skipped.csv"
    kept = check(mixed, on_bad_audio="skip", report_file=report, num_proc=num_proc)
    assert kept["clip"][:] == ["0.wav", "10.wav"]
    assert kept["text"][:] == ["ab", "fine"]
    assert kept["duration"][:] == pytest.approx([0.25, 0.35])
    assert kept["label_tokens"][:] == [2, 4]
    with report.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["row", "clip", "reason"]
    assert [(int(row), clip) for row, clip, _ in rows] == [(row, clip) for row, (clip, _) in BAD.items()]
    assert all(reason.startswith(BAD[int(row)][1]) for row, _, reason in rows)
    assert "9 of 11 clips" in caplog.text
    assert str(report) in caplog.text


def test_only_the_first_ten_are_shown(tmp_path):
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], *([f"{i}.wav", "x"] for i in range(13))])
    with pytest.raises(UserError) as error:
        check(load_speech_dataset(str(tmp_path), None, "train"))
    lines = str(error.value).splitlines()
    assert lines[0] == "train: 13 of 13 clips are invalid (13 missing file):"
    assert lines[10:12] == ["  row 9, 9.wav: missing file", "  and 3 more"]


def test_nothing_left_is_an_error(tmp_path):
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], ["0.wav", "x"]])
    with pytest.raises(UserError, match=r"1 of 1 clips .* no clip is left"):
        check(
            load_speech_dataset(str(tmp_path), None, "train"),
            on_bad_audio="skip",
            report_file=tmp_path / "skipped.csv",
        )


def test_good_rows_leave_no_report(mixed, tmp_path):
    report = tmp_path / "skipped.csv"
    kept = check(mixed.select([0, 10]), report_file=report)
    assert len(kept) == 2
    assert not report.exists()


def test_a_second_check_sees_files_that_changed(mixed, tmp_path):
    # A dataset on disk, from which `datasets` would cache what is computed
    good = mixed.select([0, 10]).map(lambda row: row, cache_file_name=str(tmp_path / "good.arrow"))
    assert len(check(good)) == 2
    (tmp_path / "10.wav").unlink()
    with pytest.raises(UserError, match=r"row 1, 10\.wav: missing file"):
        check(good)


def test_the_audio_key_is_of_the_content(tmp_path):
    wave = (32767 * tone()).astype(np.int16)
    changed = wave.copy()
    changed[100] += 1
    stereo = np.stack([wave, wave], axis=1)
    files = {
        "a.wav": dict(data=wave, samplerate=RATE),
        "other name.wav": dict(data=wave, samplerate=RATE),
        "a.flac": dict(data=wave, samplerate=RATE, subtype="PCM_16"),
        "stereo.wav": dict(data=stereo, samplerate=RATE),
        "one sample.wav": dict(data=changed, samplerate=RATE),
        "faster.wav": dict(data=wave, samplerate=2 * RATE),
        "shorter.wav": dict(data=wave[:-1], samplerate=RATE),
    }
    for name, content in files.items():
        soundfile.write(tmp_path / name, **content)
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], *([name, "x"] for name in files)])
    same, named, flac, stereo, *others = check(load_speech_dataset(str(tmp_path), None, "train"))["audio_key"][:]
    assert same == named == flac == stereo
    assert len({same, *others}) == 4
    assert len(same) == 32


def test_without_a_tokenizer_any_transcript_is_good(mixed):
    kept = filter_invalid_clips(mixed, None, Limits(1.0), on_bad_audio="skip")
    assert kept["clip"][:] == ["0.wav", "7.wav", "8.wav", "9.wav", "10.wav"]
    assert kept["text"][:] == [TEXTS[i] for i in (0, 7, 8, 9, 10)]
    assert "label_tokens" not in kept.column_names


def test_filters_leave_out_and_count_what_is_not_wanted(tmp_path, caplog):
    seconds, texts = [0.2, 0.4, 0.6, 0.8], ["abcdef", "abc", "a", "abcd"]
    for i, duration in enumerate(seconds):
        soundfile.write(tmp_path / f"{i}.wav", tone(seconds=duration), RATE)
    write_csv(
        tmp_path / "metadata.csv", [["file_name", "text"], *([f"{i}.wav", text] for i, text in enumerate(texts))]
    )
    speech = load_speech_dataset(str(tmp_path), None, "train")
    wanted = Limits(1.0, 20, min_duration_in_seconds=0.3, max_duration_in_seconds=0.7, min_label_length=2)
    kept = check(speech, limits=wanted, report_file=tmp_path / "left-out.csv")  # not bad, so no error
    assert kept["clip"][:] == ["1.wav"]
    assert (
        "3 of 4 clips are filtered out (1 under --min_duration_in_seconds, 1 under --min_label_length, 1 over"
        in caplog.text
    )
    with (tmp_path / "left-out.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["row", "clip", "reason"],
            ["0", "0.wav", "under --min_duration_in_seconds: 0.20 s"],
            ["2", "2.wav", "under --min_label_length: 1"],
            ["3", "3.wav", "over --max_duration_in_seconds: 0.80 s"],
        ]
    with pytest.raises(
        UserError, match=r"4 of 4 clips are filtered out \(4 over --max_label_length\), so no clip is left"
    ):
        check(speech, limits=Limits(1.0, 20, max_label_length=0))


def test_a_clip_without_text_is_good_only_where_nobody_speaks(mixed):
    with pytest.raises(UserError, match="2 empty transcript"):
        check(mixed)
    kept = check(mixed, limits=Limits(1.0, 20, allow_empty_text=True), on_bad_audio="skip")
    assert kept["clip"][:] == ["0.wav", "8.wav", "9.wav", "10.wav"]


@pytest.mark.parametrize("segment", [(-0.04, 0.2), (0.3, 0.2), (0.0, 0.6), (None, 0.2)])
def test_times_that_cannot_be_are_bad_rows_if_they_are_used(tmp_path, segment):
    soundfile.write(tmp_path / "0.wav", tone(seconds=0.5), RATE)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.wav,ab\n")
    speech = load_speech_dataset(str(tmp_path), None, "train")
    speech = speech.add_column("segments", [[{"start": segment[0], "end": segment[1], "text": "ab"}]])
    assert len(check(speech)) == 1
    with pytest.raises(UserError, match="invalid segment times: "):
        check(speech, limits=Limits(1.0, 20, check_timestamps=True))
    right = speech.remove_columns("segments").add_column("segments", [[{"start": 0.0, "end": 0.51, "text": "ab"}]])
    assert len(check(right, limits=Limits(1.0, 20, check_timestamps=True))) == 1


def test_only_the_last_segment_may_be_open():
    """It goes on after the clip; within it, its text would be followed by the next start."""
    first, second = {"start": 0.0, "end": None, "text": "a"}, {"start": 0.2, "end": None, "text": "b"}
    assert timestamp_error([first | {"end": 0.2}, second], 0.5) is None
    assert timestamp_error([first, second], 0.5) == "invalid segment times: 0.0 to None s in a clip of 0.50 s"


def test_silence_is_good_only_without_a_transcript(tmp_path):
    texts = {"zeros.wav": "one", "offset.wav": "one", "quiet.wav": "one", "none.wav": ""}
    for name, wave in zip(texts, (0 * tone(), 0 * tone() + 0.25, tone() / 3000, 0 * tone()), strict=True):
        soundfile.write(tmp_path / name, wave, RATE)
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], *texts.items()])
    speech = load_speech_dataset(str(tmp_path), None, "train")
    with pytest.raises(UserError) as error:
        check(speech.select(range(3)))
    lines = str(error.value).splitlines()
    assert lines[0] == "train: 2 of 3 clips are invalid (2 silent):"
    assert lines[1:3] == [
        "  row 0, zeros.wav: silent: every sample is 0",
        "  row 1, offset.wav: silent: every sample is 0.25",
    ]
    kept = check(speech, limits=Limits(1.0, 20, allow_empty_text=True), on_bad_audio="skip")
    assert kept["clip"][:] == ["quiet.wav", "none.wav"]


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("three", 0.19),  # the shortest of real recordings of digits
        ("pneumonoultramicroscopicsilicovolcanoconiosis", 1.5),
        ("the quick brown fox jumps over the lazy dog " * 4, 6.0),  # 23 letters a second
        ("今天天气很好我们去公园散步", 1.3),  # 10 syllables a second
        ("ありがとうございました", 0.8),
        ("!? ... " * 100, 0.5),
    ],
)
def test_fast_speech_is_good(text, seconds):
    assert Limits(30.0, 448).invalid_reason("", seconds, {"text": text}, 10) is None


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("the quick brown fox jumps over the lazy dog", 0.2),
        ("the quick brown fox jumps over the lazy dog " * 5, 3.0),
        ("今天天气很好我们去公园散步" * 3, 1.5),
        ("ありがとうございました" * 3, 1.5),
        ("안녕하세요반갑습니다" * 3, 1.5),
    ],
)
def test_text_that_nobody_says_in_the_time_is_bad(text, seconds):
    reason = Limits(30.0, 448).invalid_reason("", seconds, {"text": text}, 10)
    assert reason.startswith("transcript too long for its audio: ")
    assert Limits(30.0).invalid_reason("", seconds, {"text": text}, None) is None  # nothing is trained


def test_each_kind_of_bad_sound_is_counted_by_its_name(tmp_path):
    waves = [1e4 * tone(), 9e3 * tone(), np.stack([tone(), -tone()], axis=1), np.stack([tone(), -tone()], axis=1)]
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{i}.wav", wave, RATE, subtype="FLOAT")
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], *([f"{i}.wav", "x"] for i in range(4))])
    with pytest.raises(UserError, match=r"\(2 samples must be between -1 and 1, 2 left and right cancel out\)"):
        check(load_speech_dataset(str(tmp_path), None, "train"))
