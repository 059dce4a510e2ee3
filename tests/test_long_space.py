"""Long recordings decoded window by window: the texts of a student's segments join to words.

The student learns labels of this package, two windows of 30 s by heart; what writes the space between the segments is
then transformers' pipeline and faster-whisper, on the model as it is saved and exported.
"""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from scripts import ROOT
from speech import RATE
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from askd_hf.data import SpeechCollator, clean_texts
from askd_hf.export.ctranslate2 import export_ctranslate2
from askd_hf.models.loading import load_processor

WINDOW = 30
SAID = {300: ["one two", "three"], 2000: ["nine", "zero six"]}  # by the tone's Hz, in its two halves


def wave(hertz: int) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(WINDOW * RATE) / RATE)).astype(np.float32)


def row(hertz: int, folder: Path, timed: bool) -> dict:
    """With times as distil-whisper writes them, which `clean_texts` reads, or as plain text."""
    soundfile.write(folder / f"{hertz}.wav", wave(hertz), RATE, subtype="FLOAT")
    first, second = SAID[hertz]
    text = f"<|0.00|> {first}<|15.00|><|15.00|> {second}<|30.00|>" if timed else f"{first} {second}"
    return {"audio": {"path": str(folder / f"{hertz}.wav"), "bytes": None}, "text": text, "clip": str(hertz)}


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    folder = tmp_path_factory.mktemp("windows")
    tokenizer = load_processor(str(ROOT / "tests" / "digits_teacher")).tokenizer
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)
    ids = dict(
        zip(
            ("eos", "start", "plain"),
            tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]),
            strict=True,
        )
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=ids["plain"] + 1 + 1501,
            num_mel_bins=80,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=64,
            max_target_positions=64,
            decoder_start_token_id=ids["start"],
            bos_token_id=ids["eos"],
            eos_token_id=ids["eos"],
            pad_token_id=ids["eos"],
            suppress_tokens=None,
            begin_suppress_tokens=None,
            init_std=0.1,
        )
    )
    rows = [row(hertz, folder, timed) for hertz in SAID for timed in (True, False)]
    rows = list(clean_texts(Dataset.from_list(rows), "auto", "windows"))
    rows = [row | {"rng_key": (0, 0, i)} if row["segments"] else row for i, row in enumerate(rows)]
    batch = SpeechCollator(processor, model.config, timestamp_probability=1.0)(rows)
    with torch.no_grad():  # of tones a random encoder says enough
        encoded = model.model.encoder(batch["input_features"][::2]).last_hidden_state.repeat_interleave(2, 0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(180):
        loss = model(encoder_outputs=(encoded,), labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.15  # whether with times or without is open: ln 2 at one token of a label
    settings = dict(
        is_multilingual=False, no_timestamps_token_id=ids["plain"], max_length=64, _from_model_config=False
    )
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model.eval(), processor


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    return np.concatenate([wave(hertz) for hertz in SAID])


def recognize(student, recording, **options) -> dict:
    model, processor = student
    recognizer = AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor, device="cpu"
    )
    return recognizer({"raw": recording, "sampling_rate": RATE}, generate_kwargs={"num_beams": 1}, **options)


def test_windows_of_the_pipeline_are_words(student, recording):
    heard = recognize(student, recording, return_timestamps=True)
    assert heard["text"] == " one two three nine zero six"
    assert [chunk["text"] for chunk in heard["chunks"]] == [" one two", " three", " nine", " zero six"]
    chunked = recognize(student, recording, chunk_length_s=WINDOW, stride_length_s=0, ignore_warning=True)
    assert chunked["text"] == " one two three nine zero six"


def test_windows_of_faster_whisper_are_words(student, recording, tmp_path):
    faster_whisper = pytest.importorskip("faster_whisper")
    export_ctranslate2(*student, tmp_path / "student")
    model = faster_whisper.WhisperModel(str(tmp_path / "student"), device="cpu", compute_type="float32")
    segments, _ = model.transcribe(
        recording, beam_size=1, temperature=0.0, condition_on_previous_text=False, suppress_tokens=None
    )
    assert [segment.text for segment in segments] == [" one two", " three", " nine", " zero six"]
