"""Audio files and metadata for the data tests, written with soundfile."""

import csv
import io
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000


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


def write_speech(folder, clips: int = 16, seed: int = 0):
    """An audiofolder of tones: `folder/metadata.csv` and one wav a clip, 0.3 to 1 s, longer texts higher."""
    rng = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows = ["file_name,transcription"]
    for i in range(clips):
        text = "".join(rng.choice(list("abcdef"), size=rng.integers(2, 9)))
        seconds = rng.uniform(0.3, 1.0)
        time = np.arange(int(16_000 * seconds)) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * (200 + 100 * len(text)) * time) + 0.01 * rng.standard_normal(len(time))
        soundfile.write(folder / "audio" / f"{i:03d}.wav", wave, 16_000)
        rows.append(f"audio/{i:03d}.wav,{text}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder
