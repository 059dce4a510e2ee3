"""Clips without speech and with an empty transcript, on which a model learns to say nothing."""

import io

import numpy as np
import soundfile
from datasets import Audio, Dataset

from .audio import SAMPLING_RATE
from .columns import replace_column

KINDS = ("silence", "white-noise", "pink-noise", "hum")
LEVEL_DBFS = (-70.0, -20.0)  # RMS; 0 is that of a square wave of full scale
MAINS_HZ = (50.0, 60.0)
# of the row, not of what was said
KEPT_COLUMNS = ("audio", "clip", "speaker")


def synthetic_negatives(number: int = 64, seed: int = 0, max_duration_in_seconds: float = 30.0) -> Dataset:
    """Digital silence, white noise, pink noise and mains hum in turn.

    Args:
        number: of clips.
        seed: which decides, with the number of a clip, all about it.
        max_seconds: of a clip; the shortest has a thirtieth of that. All levels from -70 to -20 dBFS, and all lengths
            between, are equally likely.

    Returns:
        `audio`: `{"path": None, "bytes": a FLAC file of 16 bits}`; `text`: ""; `clip`: as `pink-noise-02`;
            `negative`: True.
    """
    names = [f"{KINDS[i % len(KINDS)]}-{i // len(KINDS):02d}" for i in range(number)]
    sounds = [
        _sound(KINDS[i % len(KINDS)], np.random.default_rng((seed, i)), max_duration_in_seconds) for i in range(number)
    ]
    audio = [{"path": None, "bytes": _flac(sound)} for sound in sounds]
    dataset = Dataset.from_dict({"audio": audio, "text": [""] * number, "clip": names, "negative": [True] * number})
    return dataset.cast_column("audio", Audio(decode=False))


def negatives_from(dataset: Dataset) -> Dataset:
    """The clips of `load_speech_dataset` as clips without speech: their transcripts, and what goes with these, are dropped."""
    kept = dataset.select_columns([name for name in KEPT_COLUMNS if name in dataset.column_names])
    kept = replace_column(kept, "text", [""] * len(dataset))
    return replace_column(kept, "negative", [True] * len(dataset))


def _sound(kind: str, rng: np.random.Generator, max_duration_in_seconds: float) -> np.ndarray:
    """Mono at 16 kHz, float64 `(samples,)`."""
    samples = round(SAMPLING_RATE * rng.uniform(max_duration_in_seconds / 30, max_duration_in_seconds))
    level = 10 ** (rng.uniform(*LEVEL_DBFS) / 20)
    if kind == "silence":
        return np.zeros(samples)
    if kind == "hum":
        sound = _hum(samples, rng)
    else:
        sound = rng.standard_normal(samples)
        if kind == "pink-noise":  # half the power at twice the frequency
            spectrum = np.fft.rfft(sound)
            sound = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)).clip(1)), samples)
    return sound * level / np.sqrt(np.mean(sound**2))


def _hum(samples: int, rng: np.random.Generator) -> np.ndarray:
    """The mains frequency of Europe or America and its first harmonics, at random phases, the higher the weaker."""
    time = np.arange(samples) / SAMPLING_RATE
    mains = rng.choice(MAINS_HZ)
    waves = [rng.uniform(0, 1 / n) * np.sin(2 * np.pi * (n * mains * time + rng.uniform())) for n in range(1, 9)]
    return np.sum(waves, axis=0)


def _flac(sound: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
