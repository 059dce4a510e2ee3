"""Clips joined at random: what is in a joined row, its audio and its caches, and that nothing held out comes back."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, load_from_disk
from models import make_processor, make_whisper
from scripts import distill_options, run_here
from speech import write_csv

from askd_hf.data import (
    Limits,
    SpeechCollator,
    SpeechStream,
    cache_encoder,
    filter_invalid_clips,
    load_speech_dataset,
    select_training_columns,
    to_iterable_dataset,
)
from askd_hf.data.audio import waveform
from askd_hf.data.columns import SEGMENTS
from askd_hf.data.concatenation import with_concatenated
from askd_hf.data.mix import with_no_speech
from askd_hf.data.no_speech import synthetic_no_speech
from askd_hf.data.packing import Packing
from askd_hf.data.teacher_cache import _audio_bytes
from askd_hf.hub.training_summary import count_clips, count_concatenated
from askd_hf.training.held_out import hold_out

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 clips of 0.10 to 0.29 s of two speakers; each is a constant, so that it is found in joined audio."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for i in range(40):
        samples = np.full(int(RATE * (0.1 + i % 20 / 100)), (i + 1) / 64)
        samples[0] += 1 / 64  # not silent
        soundfile.write(folder / f"{i}.wav", samples, RATE, subtype="FLOAT")
        rows.append([f"{i}.wav", "abcdefgh"[i % 8] + " ", "ann" if i % 2 else "bob"])
    write_csv(folder / "metadata.csv", [["file_name", "transcription", "speaker"], *rows])
    return folder


@pytest.fixture(scope="module")
def speech(folder) -> Dataset:
    loaded = load_speech_dataset(str(folder), None, "train")
    collator = SpeechCollator(make_processor(), make_whisper(make_processor()).config)
    return filter_invalid_clips(loaded, collator.label_ids, Limits(1.0, 64), on_bad_audio="error")


@pytest.fixture(scope="module")
def joined(speech) -> Dataset:
    return with_concatenated(speech, 0.25, 1.0, 64, seed=3)


def parts(row: dict) -> list[int]:
    return [int(name.rpartition("/")[2].partition(".")[0]) for name in row["clip"].split(" + ")]


def test_the_share_of_joined_rows_is_as_asked(speech, joined):
    rows = [row for row in joined if row["more_audio"]]
    assert 0 < len(rows) <= round(40 / 3) and len(joined) == 40 + len(rows)
    assert joined.select(range(40))["clip"][:] == speech["clip"][:]  # every clip is there by itself as well
    assert {len(parts(row)) for row in with_concatenated(speech, 0.5, 1.2, 64, seed=0).select(range(40, 70))} == {2, 3}


def test_a_joined_row_has_text_and_audio_of_one_speaker_in_order(speech, joined):
    for row in joined.select(range(40, len(joined))):
        clips = [speech[i] for i in parts(row)]
        assert {clip["speaker"] for clip in clips} == {row["speaker"]}
        assert row["text"] == " ".join(clip["text"].strip() for clip in clips)
        wave, expected = waveform(row), []
        for clip in clips:
            expected += [waveform(clip), np.zeros(RATE // 10)]
        assert np.array_equal(wave, np.concatenate(expected[:-1]).astype(np.float32))
        assert row["duration"] == pytest.approx(len(wave) / RATE) and row["duration"] < 0.501


def test_joined_rows_are_in_a_file_not_in_memory(speech, joined):
    """They contain copies of embedded audio: those of a large corpus don't fit in the memory of each process."""
    files = {Path(file["filename"]) for file in joined.cache_files} - {
        Path(file["filename"]) for file in speech.cache_files
    }
    assert len(files) == 1 and all(file.is_file() and file.name.startswith("joined-") for file in files)


def test_the_choice_depends_on_the_seed_alone(speech, joined):
    assert with_concatenated(speech, 0.25, 1.0, 64, seed=3)["clip"][:] == joined["clip"][:]
    assert with_concatenated(speech, 0.25, 1.0, 64, seed=4)["clip"][:] != joined["clip"][:]


def test_times_of_segments_are_those_in_the_joined_audio(speech):
    segments = [[{"start": 0.0, "end": round(row["duration"], 2), "text": row["text"]}] for row in speech]
    with_times = speech.add_column("segments", segments)
    row = with_concatenated(with_times, 0.25, 1.0, 64, seed=3)[-1]
    offset = 0.0
    for segment, i in zip(row["segments"], parts(row), strict=True):
        assert segment["start"] == pytest.approx(offset, abs=0.006)
        offset += speech[i]["duration"] + 0.1


def test_languages_and_clips_without_speech_are_not_mixed(speech):
    languages = speech.add_column("language", ["en" if i < 20 else "fr" for i in range(40)])
    languages = languages.add_column("task", ["transcribe"] * 40)
    noise = filter_invalid_clips(
        synthetic_no_speech(max_duration_in_seconds=0.3), None, Limits(1.0), on_bad_audio="error"
    )
    mixed = with_no_speech(languages, noise, 0.3, seed=0)
    rows = [row for row in with_concatenated(mixed, 0.3, 1.0, 64, seed=1) if row["more_audio"]]
    assert len(rows) > 5
    for row in rows:
        assert not row["no_speech"] and {i < 20 for i in parts(row)} == {row["language"] == "en"}


def test_transcripts_and_translations_are_not_joined(speech):
    tasks = speech.add_column("language", ["fr"] * 40)
    tasks = tasks.add_column("task", ["transcribe" if i < 20 else "translate" for i in range(40)])
    rows = [row for row in with_concatenated(tasks, 0.3, 1.0, 64, seed=1) if row["more_audio"]]
    assert len(rows) > 5 and all({i < 20 for i in parts(row)} == {row["task"] == "transcribe"} for row in rows)


def test_the_encoder_cache_has_the_output_for_the_joined_audio(joined, tmp_path):
    processor = make_processor()
    model = make_whisper(processor).eval()
    cache = cache_encoder(
        model, processor, [joined], tmp_path, batch_size=4, device=torch.device("cpu"), dtype=torch.float32
    )
    row = joined[-1]
    features = processor.feature_extractor(waveform(row), sampling_rate=RATE, return_tensors="pt").input_features
    with torch.no_grad():
        expected = model.model.encoder(features).last_hidden_state
    torch.testing.assert_close(cache.read([row["audio_key"]]).float(), expected, atol=2e-3, rtol=0)


def test_held_out_clips_are_not_trained_on_in_a_joined_row(speech):
    many = Dataset.from_list([row | {"audio_key": f"{i}"} for i in range(5) for row in speech]).cast(speech.features)
    many = many.remove_columns("audio_key").add_column("audio_key", [f"key{i}" for i in range(200)])
    training, held = hold_out(with_concatenated(many, 0.5, 1.0, 64, seed=0))
    names = set(held["audio_key"][:])
    assert len(names) == 10 and not any(held["joined_keys"][:])
    trained = [keys or [key] for keys, key in zip(training["joined_keys"][:], training["audio_key"][:], strict=True)]
    assert names.isdisjoint(key for keys in trained for key in keys)
    assert sum(len(keys) > 1 for keys in trained) > 50


def test_joined_rows_are_no_further_clips_in_the_summary(speech, joined):
    assert count_clips(joined)[:2] == count_clips(speech)[:2]
    assert count_concatenated(joined) == len(joined) - 40 and count_concatenated(speech) == 0


def test_a_window_that_few_pairs_fit_in_gets_its_share(speech, caplog):
    """Of random pairs, an eighth fits in 0.4 s with the pause between them."""
    found = with_concatenated(speech, 0.25, 0.9, 64, seed=0).select(range(40, 53))
    assert not caplog.text and max(found["duration"][:]) <= 0.4 + 1e-6
    assert len(set(found["clip"][:])) == 13


def test_a_window_without_room_joins_nothing_and_says_so(speech, caplog):
    found = with_concatenated(speech, 0.25, 0.6, 64, seed=0)
    assert len(found) == 40 and count_concatenated(found) == 0
    assert "joined 0 clips instead of 13, as few clips of a speaker fit in 0.6 s together" in caplog.text


def test_an_open_segment_ends_with_its_clip(speech):
    segments = [[{"start": 0.0, "end": None, "text": row["text"]}] for row in speech]
    with_times = speech.add_column("segments", segments, feature=SEGMENTS)
    row = with_concatenated(with_times, 0.25, 1.0, 64, seed=3)[-1]
    assert row["segments"][0]["end"] == pytest.approx(speech[parts(row)[0]]["duration"])


def test_a_run_with_both_caches_has_joined_rows(monkeypatch, capsys, tmp_path, folder):
    """The teacher's targets of a joined row are those of its joined audio: cached and live runs give equal losses."""
    processor = make_processor()
    make_whisper(processor).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    losses = []
    for name, caches in (("live", []), ("cached", ["--encoder_cache_dir", "e", "--teacher_cache_dir", "t"])):
        monkeypatch.chdir(tmp_path)
        more = ["--concatenate_probability", 0.3, "--logging_steps", 1, "--max_steps", 3, "--learning_rate", 1e-4]
        more += [*caches, *(["--teacher_top_k", 30] if caches else [])]
        status, _, err = run_here(
            monkeypatch, capsys, *distill_options(tmp_path / "teacher", folder, tmp_path / name, *more)
        )
        assert status == 0, err
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append([row["loss"] for row in history if "loss" in row])
        assert "joined at random" in (tmp_path / name / "README.md").read_text()
    live, cached = losses
    assert live == pytest.approx(cached, rel=2e-3) and len(live) == 3


def test_runs_with_joined_clips_and_without_share_a_teacher_cache(monkeypatch, capsys, tmp_path, folder):
    processor = make_processor()
    make_whisper(processor).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    counts = []
    for name, probability in (("single", 0), ("joined", 0.3), ("again", 0)):
        more = ["--concatenate_probability", probability, "--teacher_cache_dir", tmp_path / "t", "--max_steps", 1]
        given = distill_options(tmp_path / "teacher", folder, tmp_path / name, *more, "--teacher_top_k", 5)
        status, out, err = run_here(monkeypatch, capsys, *given)
        assert status == 0, err
        counts.append(re.search(r"(\d+) of (\d+) cached", out).groups())
    (none, single), (found, joined), (all_of, again) = (map(int, count) for count in counts)
    assert none == 0 and found == single == all_of == again < joined  # the single clips are computed once


def test_cached_joined_clips_are_whole_after_the_speech_has_moved(monkeypatch, capsys, tmp_path, folder):
    """As in a job that unpacks its speech into a temporary directory."""
    processor = make_processor()
    make_whisper(processor).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    cache, losses = tmp_path / "t", []
    for name in ("first", "second"):
        speech = tmp_path / f"speech-{name}"
        shutil.copytree(folder, speech)
        more = ["--concatenate_probability", 0.3, "--teacher_cache_dir", cache, "--max_steps", 2, "--logging_steps", 1]
        more += ["--teacher_top_k", 5]
        given = distill_options(tmp_path / "teacher", speech, tmp_path / name, *more)
        ended = run_here(monkeypatch, capsys, *given)
        assert ended.returncode == 0, ended.stderr
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append([row["loss"] for row in history if "loss" in row])
        shutil.rmtree(speech)
    assert losses[0] == losses[1] and len(losses[0]) == 2
    saved = load_from_disk(cache)
    joined = saved.filter(lambda files: files is not None, input_columns="more_audio")
    assert len(joined) > 5
    others = [file for row in joined for file in row["more_audio"]]
    assert all(file["bytes"] and file["path"].endswith(".wav") and "/" not in file["path"] for file in others)
    files = [file for row in joined for file in [row["audio"], *row["more_audio"]]]
    assert _audio_bytes(joined) == sum(len(file["bytes"]) for file in files)


# ---- streams ----

LIMITS = Limits(1.0, 64)


def packed(
    folder: Path, probability: float, limits: Limits = LIMITS, **options
) -> tuple[SpeechCollator, SpeechStream]:
    collator = SpeechCollator(make_processor(), make_whisper(make_processor()).config, limits=limits)
    rows = select_training_columns(to_iterable_dataset(load_speech_dataset(str(folder), None, "train")))
    packing = Packing(probability, limits, lambda row: len(collator.label_ids(row)))
    return collator, SpeechStream([rows], packing=packing, seed=3, **options)


def epoch_of(stream: SpeechStream) -> list[dict]:
    return list(itertools.takewhile(lambda row: row["rng_key"][1] == 0, stream.rows()))


@pytest.mark.parametrize("probability", [1.0, 0.3])
def test_a_packed_stream_has_each_clip_once_and_fills_the_window(folder, probability):
    collator, stream = packed(folder, probability)
    single, rows = epoch_of(replace(stream, packing=None)), epoch_of(stream)
    assert [part for row in rows for part in parts(row)] == [parts(row)[0] for row in single]  # and in the same order
    durations = {parts(row)[0]: soundfile.info(row["audio"]["path"]).duration for row in single}
    joined = [row for row in rows if len(parts(row)) > 1]
    for row, following in itertools.pairwise(rows):
        seconds = sum(durations[part] for part in parts(row)) + 0.1 * (len(parts(row)) - 1)
        assert seconds <= 0.5 + 1e-9  # of the window of 1 s, 0.5 s stay free
        if probability == 1.0:
            assert seconds + 0.1 + durations[parts(following)[0]] > 0.5  # no further one fits
    assert joined if probability == 1.0 else 0 < len(joined) < len(rows) / 2
    assert epoch_of(stream) == rows
    batch = collator(joined[:2])
    assert not batch["skipped"] and len(batch["labels"]) == 2
    for row, labels in zip(joined[:2], batch["labels"].tolist(), strict=True):
        texts = [next(one["text"] for one in single if parts(one)[0] == part).strip() for part in parts(row)]
        assert labels[: len(collator.label_ids(row))] == collator.label_ids({**row, "text": " ".join(texts)})
        wave = waveform(row)
        for part in parts(row):
            assert np.isclose(wave, (part + 1) / 64).sum() == round(RATE * durations[part]) - 1


def test_a_stream_does_not_join_what_differs_or_is_broken(folder, tmp_path):
    _, stream = packed(folder, 1.0)
    rows = epoch_of(replace(stream, packing=None))[:8]
    for row in rows:
        row["audio"] = {"path": str(folder / "0.wav"), "bytes": None}
    rows[1]["language"], rows[3]["text"], rows[5]["no_speech"] = "fr", "", True
    rows[7]["audio"] = {"path": None, "bytes": b"broken"}
    clips = [row["clip"] for row in rows]
    found = [row["clip"] for row in stream.packing.pack(rows, (0,))]
    assert found == clips


def test_a_stream_does_not_join_transcripts_and_translations(folder):
    _, stream = packed(folder, 1.0)
    rows = epoch_of(replace(stream, packing=None))[:4]
    for row, task in zip(rows, ("transcribe", "translate", "translate", "transcribe"), strict=True):
        row |= {"audio": {"path": str(folder / "0.wav"), "bytes": None}, "task": task}
    clips = [row["clip"] for row in rows]
    found = [row["clip"] for row in stream.packing.pack(rows, (0,))]
    assert found == [clips[0], f"{clips[1]} + {clips[2]}", clips[3]]


def test_filters_are_those_of_the_clips_that_are_joined(folder):
    single = epoch_of(packed(folder, 0.0)[1])
    durations = {row["clip"]: soundfile.info(row["audio"]["path"]).duration for row in single}
    low, high = np.quantile([*durations.values()], [0.2, 0.8])
    limits = replace(LIMITS, min_duration_in_seconds=low, max_duration_in_seconds=high)
    collator, stream = packed(folder, 1.0, limits)
    kept = {parts(row)[0] for row in single if low <= durations[row["clip"]] <= high}
    rows = epoch_of(stream)
    batch = collator(rows)
    skipped = {name for name, _, invalid in batch["skipped"] if not invalid}
    assert skipped == {clip for clip, seconds in durations.items() if not low <= seconds <= high}
    trained_on = [part for row in rows if row["clip"] not in skipped for part in parts(row)]
    assert len(trained_on) == len(kept) and {*trained_on} == kept
    assert any(len(parts(row)) > 1 for row in rows)


def test_a_joined_row_that_exceeds_the_window_is_filtered_out(folder, tmp_path):
    """As with an MP3 whose header states a shorter duration, by which it was joined."""
    limits = replace(LIMITS, min_duration_in_seconds=2.0, min_label_length=50, skip_long=True)
    collator, stream = packed(folder, 1.0)
    collator = replace(collator, limits=limits)
    row = next(row for row in epoch_of(stream) if row.get("more_audio"))
    assert not collator([row])["skipped"]  # the filters are those of the single clips
    soundfile.write(tmp_path / "longer.wav", np.linspace(0.0, 0.5, RATE), RATE)
    row["more_audio"][0]["path"] = str(tmp_path / "longer.wav")
    ((name, reason, is_invalid),) = collator([row])["skipped"]
    assert name == row["clip"] and reason.startswith("longer than the window of 1 s") and not is_invalid


def test_a_bad_clip_of_a_joined_one_is_named(folder, tmp_path):
    collator, stream = packed(folder, 1.0)
    row = next(row for row in epoch_of(stream) if row.get("more_audio"))
    truncated = tmp_path / "truncated.wav"
    truncated.write_bytes(Path(row["more_audio"][0]["path"]).read_bytes()[:1000])
    row["more_audio"][0]["path"] = str(truncated)
    ((name, reason, is_invalid),) = collator([row])["skipped"]
    assert name == row["clip"] and "truncated" in reason and is_invalid
