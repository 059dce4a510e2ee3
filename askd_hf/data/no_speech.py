"""Clips without speech and with an empty transcript, which train a model not to hallucinate."""

import io

import numpy as np
import soundfile
from datasets import Audio, Dataset

from .audio import SAMPLING_RATE
from .columns import replace_column

KINDS = ("silence", "white-noise", "pink-noise", "hum")
LEVEL_DBFS = (-70.0, -20.0)  # RMS; 0 dBFS is a full-scale square wave
MAINS_HZ = (50.0, 60.0)
# columns that don't describe the transcript
KEPT_COLUMNS = ("audio", "clip", "speaker")


def synthetic_no_speech(num_clips: int = 64, seed: int = 0, max_duration_in_seconds: float = 30.0) -> Dataset:
    """Generate digital silence, white noise, pink noise and mains hum in turn.

    Levels are uniform between -70 and -20 dBFS, durations between a thirtieth of the maximum and the maximum.

    Args:
        seed: a clip depends only on the seed and its index.
        max_duration_in_seconds: longest clip. Default: 30 s.

    Returns:
        `audio`: `{"path": None, "bytes": 16-bit FLAC file}`; `text`: ""; `clip`: such as `pink-noise-02`;
        `no_speech`: True.
    """
    names = [f"{KINDS[i % len(KINDS)]}-{i // len(KINDS):02d}" for i in range(num_clips)]
    sounds = [
        _sound(KINDS[i % len(KINDS)], np.random.default_rng((seed, i)), max_duration_in_seconds)
        for i in range(num_clips)
    ]
    audio = [{"path": None, "bytes": _flac(sound)} for sound in sounds]
    dataset = Dataset.from_dict(
        {"audio": audio, "text": [""] * num_clips, "clip": names, "no_speech": [True] * num_clips}
    )
    return dataset.cast_column("audio", Audio(decode=False))


def as_no_speech(dataset: Dataset) -> Dataset:
    """Mark all clips of `load_speech_dataset` as clips without speech, and drop transcripts and related columns."""
    kept = dataset.select_columns([name for name in KEPT_COLUMNS if name in dataset.column_names])
    kept = replace_column(kept, "text", [""] * len(dataset))
    return replace_column(kept, "no_speech", [True] * len(dataset))


def _sound(kind: str, rng: np.random.Generator, max_duration_in_seconds: float) -> np.ndarray:
    """Return mono at 16 kHz, float64 `(samples,)`."""
    samples = round(SAMPLING_RATE * rng.uniform(max_duration_in_seconds / 30, max_duration_in_seconds))
    level = 10 ** (rng.uniform(*LEVEL_DBFS) / 20)
    if kind == "silence":
        return np.zeros(samples)
    if kind == "hum":
        sound = _hum(samples, rng)
    else:
        sound = rng.standard_normal(samples)
        if kind == "pink-noise":  # power is inversely proportional to frequency
            spectrum = np.fft.rfft(sound)
            sound = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)).clip(1)), samples)
    return sound * level / np.sqrt(np.mean(sound**2))


def _hum(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the mains frequency of Europe or America and its first harmonics with decaying amplitudes."""
    time = np.arange(samples) / SAMPLING_RATE
    mains = rng.choice(MAINS_HZ)
    waves = [rng.uniform(0, 1 / n) * np.sin(2 * np.pi * (n * mains * time + rng.uniform())) for n in range(1, 9)]
    return np.sum(waves, axis=0)


def _flac(sound: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
