"""Long-form transcription through the pipeline, and concatenation of clips."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from models import MULTILINGUAL, make_processor, make_whisper
from scripts import ROOT
from speech import write_speech
from transformers import WhisperFeatureExtractor, WhisperProcessor

from askd_hf.data import decode_audio, load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.evaluation import long_form
from askd_hf.evaluation.long_form import concatenate_clips, transcribe_long
from askd_hf.evaluation.metrics import error_rates
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.models.student import init_student

DEMO = ROOT / "examples/demo"
DIGITS_TEACHER = ROOT / "tests/digits_teacher"


def with_timestamps(more_tokens: tuple[str, ...] = ()):
    """Return a random model with 30 s windows and timestamp tokens, and its processor."""
    tokenizer = make_processor(more_tokens).tokenizer
    tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(1501)])
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer)
    model = make_whisper(processor, max_source_positions=1500).eval()
    model.generation_config.no_timestamps_token_id = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    model.generation_config.alignment_heads = [[1, 0], [3, 1]]
    return model, processor


@pytest.fixture(scope="module")
def timestamped():
    return with_timestamps()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(int(16_000 * seconds)).astype(np.float32)


def recordings(*waves: np.ndarray) -> list[dict]:
    return [{"audio": {"array": wave, "sampling_rate": 16_000}, "clip": f"clip {i}"} for i, wave in enumerate(waves)]


# ---- sequential ----


def test_sequential_gives_what_generate_gives(timestamped):
    model, processor = timestamped
    waves = noise(65), noise(12, seed=1)
    found = list(transcribe_long(model, processor, recordings(*waves), "sequential", timestamps="segment"))
    for wave, transcript in zip(waves, found, strict=True):
        long = len(wave) > 30 * 16_000
        padding = dict(truncation=False, padding="longest") if long else {}
        features = processor.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt", **padding)
        expected = model.generate(features.input_features, return_timestamps=True, return_segments=True)
        segments = expected["segments"][0]
        assert transcript.text == processor.tokenizer.decode(expected["sequences"][0], skip_special_tokens=True)
        assert transcript.text == "".join(text for _, _, text in transcript.chunks)
        assert transcript.chunks[0][0] == pytest.approx(float(segments[0]["start"]), abs=0.011)
        assert transcript.duration == len(wave) / 16_000
        assert transcript.transcription_time > 0
        assert transcript.tokens == len(processor.tokenizer(transcript.text, add_special_tokens=False).input_ids) > 0
    assert found[0].chunks[-1][1] > 30  # beyond the first window
    assert all(0 <= start <= end for found_one in found for start, end, _ in found_one.chunks)


def test_sequential_without_chunks_has_the_same_text(timestamped):
    model, processor = timestamped
    (plain,) = transcribe_long(model, processor, recordings(noise(40)), "sequential")
    (timed,) = transcribe_long(model, processor, recordings(noise(40)), "sequential", timestamps="segment")
    assert plain.chunks is None
    assert plain.text == timed.text


def test_word_timestamps(timestamped):
    model, processor = timestamped
    (transcript,) = transcribe_long(model, processor, recordings(noise(35)), "sequential", timestamps="word")
    assert "".join(text for _, _, text in transcript.chunks) == transcript.text
    assert len(transcript.chunks) > 3
    ends = [end for _, end, _ in transcript.chunks]
    assert ends == sorted(ends) and 30 < ends[-1] <= 35
    assert all(start <= end for start, end, _ in transcript.chunks)
    # the attention implementation is restored after word timestamps
    assert model.config._attn_implementation == model.model.decoder.config._attn_implementation == "sdpa"


def test_words_of_a_language_without_spaces():
    model, processor = with_timestamps(MULTILINGUAL)
    token = processor.tokenizer.convert_tokens_to_ids
    model.generation_config.is_multilingual = True
    model.generation_config.lang_to_id = {name: token(name) for name in ("<|en|>", "<|zh|>")}
    model.generation_config.task_to_id = {name: token(f"<|{name}|>") for name in ("transcribe", "translate")}
    set_language(model, processor, "chinese", "transcribe")
    (transcript,) = transcribe_long(model, processor, recordings(noise(5)), "short_form", timestamps="word")
    assert len(transcript.text.replace(" ", "")) > 3
    assert [len(text) for _, _, text in transcript.chunks] == [1] * len(transcript.text)
    assert processor.tokenizer.language == "zh"


# ---- short ----


def test_timestamps_of_short_clips_in_batches(timestamped):
    model, processor = timestamped
    clips = recordings(*(noise(seconds, seed=seconds) for seconds in (3, 9, 5)))
    alone = list(transcribe_long(model, processor, clips, "short_form", timestamps="segment"))
    together = list(transcribe_long(model, processor, clips, "short_form", batch_size=2, timestamps="segment"))
    assert [t.text for t in alone] == [t.text for t in together]
    assert [t.chunks for t in alone] == [t.chunks for t in together]
    assert all(t.chunks for t in alone)
    assert together[0].transcription_time == together[1].transcription_time != together[2].transcription_time


def test_a_long_recording_is_not_short(timestamped):
    model, processor = timestamped
    clips = recordings(noise(3), noise(31))
    transcripts = transcribe_long(model, processor, clips, "short_form", timestamps="segment")
    next(transcripts)
    with pytest.raises(UserError, match=r"clip 1: .* got 31\.0 s"):
        next(transcripts)


# ---- chunked, by a model that has learnt something ----


def test_chunked_hears_joined_digits():
    model, processor = load_whisper(str(DIGITS_TEACHER)), load_processor(str(DIGITS_TEACHER))
    digits = load_speech_dataset(str(DEMO / "data/studio"), None, "train").select(range(10))
    long = concatenate_clips(digits, max_duration=12)
    assert len(long) < 4
    found = list(transcribe_long(model, processor, long, "chunked", batch_size=4))
    assert all(transcript.duration > 6 for transcript in found[:-1])  # the window is 3 s
    # without spaces: the model writes none before the first word of a window
    errors = error_rates([t.text for t in found], long["text"], lambda text: text.replace(" ", ""))["cer"]
    assert errors < 45  # 70 to 80 if only the first window were transcribed
    one_by_one = list(transcribe_long(model, processor, long, "chunked", batch_size=1))
    assert [t.text for t in found] == [t.text for t in one_by_one]


def test_the_limit_of_tokens_and_the_beams_are_passed_on(timestamped, monkeypatch):
    model, processor = timestamped
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: seen.append(options) or generate(**options))
    list(transcribe_long(model, processor, recordings(noise(3)), "chunked"))
    list(transcribe_long(model, processor, recordings(noise(3)), "chunked", num_beams=2, max_length=7))
    assert [(options["num_beams"], options.get("max_length")) for options in seen] == [(1, None), (2, 7)]
    assert not any("max_new_tokens" in options for options in seen)


# ---- refusals, before anything is decoded ----


def refuses(model, processor, *args, match: str, **options):
    def never(*_, **__):
        raise AssertionError("decoding has begun")

    model.generate = never
    with pytest.raises(UserError, match=match):
        transcribe_long(model, processor, recordings(noise(1)), *args, **options)


def test_no_timestamp_tokens(processor):
    model = make_whisper(processor)
    refuses(model, processor, "sequential", match="no timestamp tokens .*the vocabulary is too small.* chunked")
    refuses(
        model,
        processor,
        "short_form",
        timestamps="segment",
        match="no timestamp tokens",
    )
    del model.generation_config.no_timestamps_token_id
    refuses(model, processor, "sequential", match="no_timestamps_token_id is not set")


def test_no_alignment_heads():
    model, processor = with_timestamps()
    del model.generation_config.alignment_heads
    refuses(model, processor, "sequential", timestamps="word", match="require alignment_heads")


def test_alignment_heads_of_another_model():
    model, processor = with_timestamps()
    heads = model.generation_config.alignment_heads
    student = init_student(model, 2)
    list(
        transcribe_long(student, processor, recordings(noise(1)), "short_form", timestamps="word")
    )  # its own alignment heads are valid
    student.generation_config.alignment_heads = heads
    refuses(student, processor, "short_form", timestamps="word", match=r"2 decoder layers .*\[\[3, 1\]\]")


# ---- joining clips ----


@pytest.fixture
def clips(tmp_path):
    """Six clips of 0.3 to 1 s, of the speakers a a a b b a."""
    speech = load_speech_dataset(str(write_speech(tmp_path, clips=6)), None, "train")
    return speech.add_column("speaker", list("aaabba"))


def wave_of(row) -> np.ndarray:
    return soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0]


def test_joined_audio_is_the_clips_with_silence_between(clips):
    joined = concatenate_clips(clips, max_duration=60, pause_duration=0.25)
    waves = [decode_audio(row["audio"]) for row in clips]
    pause = np.zeros(4000, dtype=np.float32)
    expected = [
        np.concatenate([waves[0], pause, waves[1], pause, waves[2]]),
        np.concatenate([waves[3], pause, waves[4]]),
        waves[5],
    ]
    for row, wave in zip(joined, expected, strict=True):
        assert np.array_equal(wave_of(row), wave)
        assert np.array_equal(decode_audio(row["audio"]), wave)
    texts = clips["text"]
    assert list(joined["text"]) == [" ".join(texts[:3]), " ".join(texts[3:5]), texts[5]]
    assert list(joined["speaker"]) == ["a", "b", "a"]
    names = [Path(name).name for name in joined["clip"]]
    assert names == ["000.wav and 2 more", "003.wav and 1 more", "005.wav"]


def test_joined_clips_are_no_longer_than_asked(clips):
    clips = clips.remove_columns("speaker")
    joined = concatenate_clips(clips, max_duration=1.9, pause_duration=0.4)
    assert "speaker" not in joined.column_names
    lengths = [len(wave_of(row)) / 16_000 for row in joined]
    assert max(lengths) <= 1.9
    assert 1 < len(joined) < 6
    spoken = sum(len(decode_audio(row["audio"])) for row in clips)
    assert sum(lengths) * 16_000 == pytest.approx(spoken + 6400 * (6 - len(joined)), abs=1)
    # the next clip fits in none of the recordings
    starts = [Path(name).name[:3] for name in joined["clip"]]
    for length, start in zip(lengths, starts[1:], strict=False):
        assert length + 0.4 + len(decode_audio(clips[int(start)]["audio"])) / 16_000 > 1.9


def test_a_clip_over_the_limit_stays_alone_and_silence_adds_no_text(clips):
    texts = list(clips["text"])
    texts[1], texts[2] = None, "  "
    silent = clips.remove_columns("text").add_column("text", texts)
    assert concatenate_clips(silent, max_duration=60)[0]["text"] == texts[0]
    assert len(concatenate_clips(clips, max_duration=0.1)) == 6


def test_all_windows_of_joined_clips_are_heard(timestamped, clips, monkeypatch):
    model, processor = timestamped
    joined = concatenate_clips(clips, max_duration=60, pause_duration=20)
    durations = [len(wave_of(row)) / 16_000 for row in joined]
    assert 40 < durations[0] < 50 and 20 < durations[1] < 30 and durations[2] < 30
    frames = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **options: frames.append(options["input_features"].shape[-1]) or generate(**options)
    )
    chunked = list(transcribe_long(model, processor, joined, "chunked"))
    assert frames == [3000] * (2 + 1 + 1)  # the first recording has two windows, from 0 s and from 20 s
    sequential = list(transcribe_long(model, processor, joined, "sequential"))
    assert frames[4:] == [int(100 * durations[0]), 3000, 3000]
    assert [t.duration for t in chunked] == [t.duration for t in sequential] == durations


def test_joined_recordings_are_in_parts_that_arrow_can_hold(monkeypatch, tmp_path):
    folder = write_speech(tmp_path / "speech", clips=6)
    clips = load_speech_dataset(str(folder), None, "train")
    whole = concatenate_clips(clips, 1.0)
    monkeypatch.setattr(long_form, "PART_BYTES", 1)
    assert concatenate_clips(clips, 1.0).to_list() == whole.to_list()
    parts = list(long_form._parts([{"audio": {"bytes": b"123"}}] * 3))
    assert [len(part) for part in parts] == [1, 1, 1]
