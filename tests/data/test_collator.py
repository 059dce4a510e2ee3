"""Batches against the processor itself and labels written by hand."""

import re

import numpy as np
import pytest
import soundfile
import torch
from models import END, ENGLISH, NO_TIMESTAMPS, START, TRANSCRIBE, tiny_processor
from speech import RATE, audiofolder, encoded, tone
from torch.utils.data import DataLoader
from transformers import WhisperConfig, WhisperProcessor
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from askd_hf.data import Limits, SpeechCollator, load_speech_dataset
from askd_hf.errors import UserError


@pytest.fixture
def small() -> WhisperProcessor:
    return tiny_processor()


@pytest.fixture
def rows(tmp_path):
    return load_speech_dataset(str(audiofolder(tmp_path, ["ab", "c ab", "b"])), None, "train")


def config(**changes) -> WhisperConfig:
    return WhisperConfig(decoder_start_token_id=START, **changes)


def test_labels_of_an_english_only_tokenizer(small, rows):
    batch = SpeechCollator(small, config())(list(rows))
    expected = [
        [NO_TIMESTAMPS, 3, 0, 1, END, -100, -100],  # 3 is the space
        [NO_TIMESTAMPS, 3, 2, 3, 0, 1, END],
        [NO_TIMESTAMPS, 3, 1, END, -100, -100, -100],
    ]
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == expected
    assert batch["clip"] == ["audio/0.wav", "audio/1.wav", "audio/2.wav"]
    assert set(batch) == {"input_features", "decoder_input_ids", "labels", "label_positions", "clip"}
    assert batch["labels"].flatten()[batch["label_positions"]].tolist() == [
        i for row in expected for i in row if i >= 0
    ]


def test_labels_of_a_multilingual_tokenizer_decode_to_the_text(small):
    small.tokenizer.set_prefix_tokens(language="english", task="transcribe")
    ids = SpeechCollator(small, config()).label_ids({"text": "c ab"})
    assert ids == [ENGLISH, TRANSCRIBE, NO_TIMESTAMPS, 3, 2, 3, 0, 1, END]
    assert small.tokenizer.decode(ids, skip_special_tokens=True) == " c ab"


def test_shifted_labels_start_with_one_start_token(small, rows):
    labels = SpeechCollator(small, config())(list(rows))["labels"]
    shifted = shift_tokens_right(labels, END, START)
    assert (shifted == START).sum(dim=1).tolist() == [1, 1, 1]
    assert shifted[1].tolist() == [START, NO_TIMESTAMPS, 3, 2, 3, 0, 1]


def test_features_are_the_processors(small, rows):
    batch = SpeechCollator(small, config())(list(rows))
    waves = [soundfile.read(row["audio"]["path"], dtype="float32")[0] for row in rows]
    expected = small.feature_extractor(waves, sampling_rate=RATE, return_tensors="pt").input_features
    assert batch["input_features"].shape == (3, 8, 100)
    assert batch["input_features"].dtype == torch.float32
    torch.testing.assert_close(batch["input_features"], expected, rtol=0, atol=0)


def test_the_mask_of_spec_augment_covers_the_speech(small, rows):
    batch = SpeechCollator(small, config(apply_spec_augment=True))(list(rows))
    assert batch["attention_mask"].shape == (3, 100)
    assert batch["attention_mask"].sum(dim=1).tolist() == [50, 50, 50]  # half a second of a second
    assert batch["attention_mask"][:, :50].all()


def test_a_clip_that_changed_since_its_check_is_named(small, rows, tmp_path):
    (tmp_path / "audio" / "1.wav").unlink()
    with pytest.raises(UserError, match=r"audio/1\.wav: missing file"):
        SpeechCollator(small, config())(list(rows))


LONG = dict(array=np.full(RATE * 31, 0.1, np.float32), sampling_rate=RATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(text=None), "no transcript"),
        (dict(text="abc" * 200), r"transcript too long: \d+ tokens, the limit is 448"),
        (dict(audio=LONG), "too long: 31.00 s, the limit is 1 s"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_clip_that_was_not_validated_and_does_not_fit_is_named(small, rows, change, message):
    bad = dict(rows[1]) | change
    pattern = f"{re.escape(bad['clip'])}: {message}. askd_hf.filter_invalid_clips leaves out such clips"
    with pytest.raises(UserError, match=pattern):
        SpeechCollator(small, config())([rows[0], bad])


def test_a_tokenizer_of_another_model_is_refused(small):
    with pytest.raises(UserError, match="starts labels with token 5, the model with 50257"):
        SpeechCollator(small, WhisperConfig(decoder_start_token_id=50257)).label_ids({"text": "a"})


def test_worker_processes_make_the_same_batches(small, rows):
    collator = SpeechCollator(small, config())
    alone = list(DataLoader(rows, batch_size=2, collate_fn=collator))
    workers = list(DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=2))
    for a, b in zip(alone, workers, strict=True):
        torch.testing.assert_close(a["input_features"], b["input_features"])
        assert a["labels"].tolist() == b["labels"].tolist()
        assert a["clip"] == b["clip"]


def test_another_rate_gives_almost_the_same_features(small, tmp_path):
    features = []
    for rate in (RATE, 44_100):
        soundfile.write(tmp_path / "a.wav", tone(500, 0.9, rate), rate, subtype="FLOAT")
        row = {"audio": {"path": str(tmp_path / "a.wav"), "bytes": None}, "text": "a", "clip": "a.wav"}
        features.append(SpeechCollator(small, config())([row])["input_features"][0].numpy())
    loud = features[0] > features[0].max() - 1  # within 40 dB of the peak
    assert loud.sum() > 50
    assert np.abs(features[0] - features[1])[loud].max() < 0.05


def test_rows_of_a_stream_are_judged_by_their_sound_and_pace(small):
    """As `filter_invalid_clips` judges those of a dataset."""
    collator = SpeechCollator(small, config(), limits=Limits(1.0, 60))
    sounds = {"good": tone(), "zeros": 0 * tone(), "hasty": tone(), "canceled": np.stack([tone(), -tone()], axis=1)}
    rows = [
        {"audio": {"bytes": encoded(wave), "path": None}, "text": "ab", "clip": name, "rng_key": (0, 0, i)}
        for i, (name, wave) in enumerate(sounds.items())
    ]
    rows[2]["text"] = "ab" * 25
    batch = collator(rows)
    assert batch["clip"] == ["good"]
    reasons = {clip: (reason.partition(":")[0], invalid) for clip, reason, invalid in batch["skipped"]}
    assert reasons == {
        "zeros": ("silent", True),
        "hasty": ("transcript too long for its audio", True),
        "canceled": ("left and right cancel out", True),
    }
