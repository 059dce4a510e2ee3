"""Packs of random clips: what must hold of all, and that their audio and times are those of the clips."""

import io
import itertools
import random

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, Features, Value
from models import make_processor
from tiny_teacher import RATE, tone

from askd_hf.data import decode_audio
from askd_hf.errors import UserError
from askd_hf.pseudo_labels import check_can_concatenate, concatenate_clips
from askd_hf.pseudo_labels.concatenation import plan_groups
from askd_hf.pseudo_labels.result import SCORES, SEGMENTS


def wav(wave: np.ndarray, rate: int = RATE) -> dict:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype="PCM_16")
    return {"path": None, "bytes": file.getvalue()}


def labeled(waves, speakers, segments=None, rate: int = RATE) -> Dataset:
    rows = [
        dict(
            audio=wav(wave, rate),
            clip=f"c{i}",
            duration=len(wave) / rate,
            speaker=speakers[i],
            text=f"text {chr(97 + i % 26)}",
            segments=None if segments is None else segments[i],
            prompt=None,
            avg_logprob=-float(i),
            compression_ratio=1.0 + i,
            repeated_5gram_rate=0.0,
            wer=None if i % 2 else float(i),
        )
        for i, wave in enumerate(waves)
    ]
    texts = {name: Value("string") for name in ("clip", "speaker", "text", "prompt")}
    numbers = {name: Value("float64") for name in ("duration", *SCORES)}
    audio = {"path": Value("string"), "bytes": Value("binary")}
    dataset = Dataset.from_list(rows, features=Features(audio=audio, segments=SEGMENTS, **texts, **numbers))
    return dataset.cast_column("audio", Audio(decode=False))


def packed(clips: Dataset, directory, max_duration_in_seconds: float, max_label_length: int = 448) -> list[dict]:
    options = dict(
        max_duration_in_seconds=max_duration_in_seconds, max_label_length=max_label_length, directory=directory
    )
    return list(concatenate_clips(clips, make_processor().tokenizer, **options))


@pytest.mark.parametrize("seed", range(20))
def test_packs_are_consecutive_of_one_speaker_and_as_long_as_they_can_be(seed):
    rng = random.Random(seed)
    seconds = [rng.choice([0.5, 3, 7.25, 10, 29.99, 30]) for _ in range(60)]
    speakers = [speaker for speaker in rng.choices(["a", "b", None], k=20) for _ in range(3)]
    tokens = [rng.randrange(1, 200) for _ in seconds]
    packs = plan_groups(seconds, speakers, tokens, 30, 400)
    assert [i for members in packs for i in members] == list(range(60))
    for members in packs:
        assert len({speakers[i] for i in members}) == 1
        assert sum(seconds[i] for i in members) <= 30
        assert sum(tokens[i] for i in members) <= 400
        assert len(members) == 1 or speakers[members[0]] is not None
    for one, after in itertools.pairwise(packs):
        fits = sum(seconds[i] for i in [*one, after[0]]) <= 30 and sum(tokens[i] for i in [*one, after[0]]) <= 400
        same = speakers[one[0]] is not None and speakers[one[0]] == speakers[after[0]]
        assert not (fits and same)


def test_three_clips_of_ten_seconds_fill_a_window():
    assert plan_groups([10.0] * 4, ["a"] * 4, [5] * 4, 30, 448) == [[0, 1, 2], [3]]


def test_audio_and_times_are_those_of_the_clips(tmp_path):
    waves = [tone(0.312, 0), tone(0.405, 1), tone(0.2, 2), tone(0.9, 3), tone(0.25, 4)]
    segments = [
        [dict(start=0.0, end=0.14, text="text"), dict(start=0.16, end=0.3, text="a")],
        [dict(start=0.02, end=0.4, text="text b")],
        [dict(start=0.0, end=0.2, text="text c")],
        [dict(start=0.1, end=0.9, text="text d")],
        [dict(start=0.0, end=0.24, text="text e")],
    ]
    first, second, third = packed(labeled(waves, ["a", "a", "a", "a", "b"], segments), tmp_path, 1.0)

    whole = np.concatenate([decode_audio(wav(wave)) for wave in waves[:3]])
    assert soundfile.info(io.BytesIO(first["audio"]["bytes"])).format == "FLAC"
    assert first["audio"]["path"] is None
    np.testing.assert_array_equal(decode_audio(first["audio"]), whole)  # 16 bits stay what they were
    assert first["duration"] == pytest.approx(0.917)
    assert first["text"] == "text a text b text c"
    assert first["clip"] == "c0..c2"
    times = [(segment["start"], segment["end"], segment["text"]) for segment in first["segments"]]
    # 0.312 and 0.717 s before, to the nearest 0.02 s, and not after the end at 0.917 s
    assert times == [(0.0, 0.14, "text"), (0.16, 0.3, "a"), (0.34, 0.72, "text b"), (0.72, 0.9, "text c")]
    assert (first["avg_logprob"], first["compression_ratio"], first["wer"]) == (-2.0, 3.0, 2.0)
    assert first["prompt"] is None and second["prompt"] == "text a text b text c"
    assert second["clip"] == "c3" and second["wer"] is None
    assert third["speaker"] == "b" and third["prompt"] is None


def test_without_the_teachers_times_those_of_the_clips_count(tmp_path):
    (row,) = packed(labeled([tone(0.31), tone(0.4)], ["a", "a"]), tmp_path, 1.0)
    times = [(segment["start"], segment["end"], segment["text"]) for segment in row["segments"]]
    assert times[0][0] == 0.0 and times[0][1] == times[1][0] == pytest.approx(0.31, abs=0.0101)
    assert times[1][1] == 0.7 and [text for _, _, text in times] == ["text a", "text b"]


def test_random_packs_keep_their_times_inside_and_in_order(tmp_path):
    rng = np.random.default_rng(0)
    waves = [tone(seconds, i) for i, seconds in enumerate(rng.uniform(0.05, 0.6, size=40))]
    speakers = [speaker for speaker in "abab" for _ in range(10)]
    clips = labeled(waves, speakers)
    rows = packed(clips, tmp_path, 1.0)
    assert len(rows) < 30
    for row in rows:
        length = len(decode_audio(row["audio"])) / RATE
        assert length == pytest.approx(row["duration"], abs=1e-4) and length <= 1.0
        times = [time for segment in row["segments"] for time in (segment["start"], segment["end"])]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= length
        assert all(round(time / 0.02) * 0.02 == pytest.approx(time, abs=1e-9) for time in times)
    whole = np.concatenate([decode_audio(row["audio"]) for row in rows])
    np.testing.assert_array_equal(whole, np.concatenate([decode_audio(audio) for audio in clips["audio"]]))


def test_resampled_packs_are_not_over_the_window(tmp_path):
    """Resampling rounds every clip's length up."""
    rate = 11_025
    lengths = [1102, 2205, 1103, 3307, 3308]  # a second together
    assert sum(lengths) == rate
    (row,) = packed(labeled([tone(1)[:length] for length in lengths], ["a"] * 5, rate=rate), tmp_path, 1.0)
    assert len(decode_audio(row["audio"])) == RATE


def test_a_clip_longer_than_a_pack_stays_whole(tmp_path):
    waves = [tone(0.3, 0), tone(1.4, 1), tone(0.2, 2)]
    rows = packed(labeled(waves, ["a"] * 3), tmp_path, 1.0)
    assert [row["clip"] for row in rows] == ["c0", "c1", "c2"]
    for row, wave in zip(rows, waves, strict=True):
        assert len(decode_audio(row["audio"])) == len(wave) == round(RATE * row["duration"])
    assert rows[1]["segments"] == [dict(start=0.0, end=1.4, text="text b")]


@pytest.mark.parametrize(
    ("language", "task", "text"),
    [
        ("ja", "transcribe", "text atext b"),
        ("ja", "translate", "text a text b"),
        ("fr", "transcribe", "text a text b"),
    ],
)
def test_texts_are_joined_as_their_language_is_written(tmp_path, language, task, text):
    clips = labeled([tone(0.3), tone(0.2)], ["a", "a"])
    clips = clips.add_column("reference", clips["text"][:])
    (row,) = packed(clips.add_column("language", [language] * 2).add_column("task", [task] * 2), tmp_path, 1.0)
    assert row["text"] == row["reference"] == text


def test_a_reference_of_some_clips_is_none_of_their_pack(tmp_path):
    clips = labeled([tone(0.3), tone(0.2)], ["a", "a"]).add_column("reference", ["text a", None])
    (row,) = packed(clips, tmp_path, 1.0)
    assert row["reference"] is None and row["wer"] == 0.0


def test_labels_too_long_for_the_decoder_are_not_made(tmp_path):
    clips = labeled([tone(0.1, i) for i in range(6)], ["a"] * 6)
    tokens = len(make_processor().tokenizer(" text a", add_special_tokens=False).input_ids) + 2
    rows = packed(clips, tmp_path, 1.0, max_label_length=4 + 2 * tokens)
    assert [row["clip"] for row in rows] == ["c0..c1", "c2..c3", "c4..c5"]


def test_packing_needs_speakers_and_a_window():
    clips = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(UserError, match="--speaker_column"):
        check_can_concatenate(clips, 30, None)
    with pytest.raises(UserError, match=r"--concatenate_seconds must be at most 30, .* got 40"):
        check_can_concatenate(clips.add_column("speaker", ["a"]), 30, 40)
