"""Audio files and metadata for the data tests, written with soundfile."""

import csv
import io
from pathlib import Path

import numpy as np
import soundfile
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

RATE = 16_000
# The ids of `tiny_processor`: a 0, b 1, c 2, space 3, then
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
END, START, ENGLISH, TRANSCRIBE, NO_TIMESTAMPS = 4, 5, 6, 8, 9


def tiny_processor() -> WhisperProcessor:
    """Windows of one second, 8 mel bins, a vocabulary of three letters."""
    tokenizer = WhisperTokenizer(vocab={"a": 0, "b": 1, "c": 2, "Ġ": 3}, merges=[])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.set_prefix_tokens()  # those of before, when there was no start token, would stay otherwise
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)


def tone(hertz: float = 440.0, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    """Hardly compressible, so that a cut falls into the audio and not into padding."""
    return (0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate))).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, container: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def write_csv(file: Path, rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def audiofolder(folder: Path, texts: list[str], column: str = "transcription") -> Path:
    """`folder/metadata.csv` and `folder/audio/N.wav`, tones of 200, 300... Hz, with a column `speaker`."""
    write_csv(
        folder / "metadata.csv",
        [["file_name", column, "speaker"], *([f"audio/{i}.wav", text, f"s{i}"] for i, text in enumerate(texts))],
    )
    (folder / "audio").mkdir(exist_ok=True)
    for i in range(len(texts)):
        soundfile.write(folder / "audio" / f"{i}.wav", tone(200 + 100 * i), RATE)
    return folder
