"""Strings of spoken digits with known word times, composed of the demo's recordings, and a model that hears them."""

import csv
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile
from scripts import ROOT
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.modeling_whisper import sinusoids

from askd_hf.models.loading import load_processor, load_whisper

DIGITS = ROOT / "examples" / "demo" / "digits"
TEACHER = ROOT / "tests" / "digits_teacher"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas")  # whom the demo's teacher knows
RATE = 8_000
LOUD = 0.05  # of a recording's peak; what is softer at its ends is silence


@dataclass
class SpokenString:
    """`audio` float32 at 16 kHz, `text`, and when each of its words begins and ends, seconds."""

    audio: np.ndarray
    text: str
    times: list[tuple[float, float]]


def spoken_strings(count: int, digits: int = 3, pause: float = 0.2, seed: int = 0) -> list[SpokenString]:
    """`count` strings of `digits` digits by one speaker each, `pause` seconds before each digit."""
    rng = np.random.default_rng(seed)
    with (DIGITS / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    recordings = {name: soundfile.read(DIGITS / f"{name}.ogg", dtype="float32")[0] for name in SPEAKERS}
    strings = []
    for _ in range(count):
        speaker = rng.choice(SPEAKERS)
        pieces, times, samples, words = [], [], 0, []
        for row in rng.choice([row for row in rows if row["speaker"] == speaker], digits):
            clip = recordings[speaker][int(row["start_sample"]) : int(row["end_sample"])]
            loud = np.flatnonzero(np.abs(clip) > LOUD * np.abs(clip).max())
            samples += int(pause * RATE)
            times.append(((samples + loud[0]) / RATE, (samples + loud[-1]) / RATE))
            samples += len(clip)
            pieces += [np.zeros(int(pause * RATE), np.float32), clip]
            words.append(WORDS[int(row["digit"])])
        wave = librosa.resample(np.concatenate(pieces), orig_sr=RATE, target_sr=16_000, res_type="soxr_hq")
        strings.append(SpokenString(wave, " ".join(words), times))
    return strings


def long_teacher() -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The demo's teacher with windows of 30 s in place of 3, the only ones that faster-whisper knows.

    The encoder's positions are sinusoids: with more of them than it was trained with it hears nearly as well.
    """
    short, processor = load_whisper(str(TEACHER)), load_processor(str(TEACHER))
    config = short.config
    config.max_source_positions = 1500
    model = WhisperForConditionalGeneration(config)
    positions = sinusoids(1500, config.d_model)
    model.load_state_dict(short.state_dict() | {"model.encoder.embed_positions.weight": positions})
    model.generation_config = short.generation_config
    return model.eval(), WhisperProcessor(WhisperFeatureExtractor(feature_size=80), processor.tokenizer)


def save_long_teacher(directory: Path) -> Path:
    for part in long_teacher():
        part.save_pretrained(directory)
    return directory
