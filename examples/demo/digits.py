"""Single spoken digits (Free Spoken Digit Dataset) and the strings composed of them.

Used by make_strings.py (the audio folder of the demo), make_clean_strings.py (that of a study) and train_teacher.py
(strings composed on the fly).
"""

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile as sf

HERE = Path(__file__).parent
SAMPLE_RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_SECONDS = 3.0
# split -> speakers, and positions among the 25 sorted takes of each of their digits. No two splits share a recording.
# The settings of the teacher's training were selected on its speakers' positions 4, 9, 14, 19 and 24, which it is now
# trained on. Nothing was selected on "studio"
TEACHERS, CALLERS = ("george", "jackson", "lucas", "nicolas"), ("theo", "yweweler")
SPLITS = {
    "teacher": (TEACHERS, [take for take in range(25) if take % 5 != 3]),  # what the teacher is trained on
    "studio": (TEACHERS, [take for take in range(25) if take % 5 == 3]),
    "train": (CALLERS, [take for take in range(25) if take % 5 < 3]),
    "validation": (CALLERS, [take for take in range(25) if take % 5 == 3]),
    "calls": (CALLERS, [take for take in range(25) if take % 5 == 4]),
}

# takes[speaker][digit] is a list of waveforms
Takes = dict[str, list[list[np.ndarray]]]


def load_takes(split: str, folder: Path = HERE / "digits") -> Takes:
    """Return the single digits of a split. No two splits share a recording."""
    speakers, positions = SPLITS[split]
    with open(folder / "index.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["speaker"], int(row["digit"]), int(row["take"])))
    audio = {speaker: sf.read(folder / f"{speaker}.ogg", dtype="float32")[0] for speaker in speakers}
    every: Takes = {speaker: [[] for _ in WORDS] for speaker in speakers}
    for row in rows:
        if row["speaker"] in audio:
            clip = audio[row["speaker"]][int(row["start_sample"]) : int(row["end_sample"])]
            every[row["speaker"]][int(row["digit"])].append(clip)
    return {
        speaker: [[clips[position] for position in positions] for clips in digits] for speaker, digits in every.items()
    }


def compose(
    rng: np.random.Generator,
    takes: list[list[np.ndarray]],
    min_digits: int = 2,
    max_digits: int = 5,
    pause: tuple[float, float] = (0.03, 0.25),
    max_duration_in_seconds: float = MAX_SECONDS,
) -> tuple[np.ndarray, str]:
    """One string of digits of one speaker at 8 kHz, with a pause before, between and after, and its text."""
    while True:
        digits = rng.integers(len(WORDS), size=rng.integers(min_digits, max_digits + 1))
        pieces = []
        for digit in digits:
            pieces.append(np.zeros(int(rng.uniform(*pause) * SAMPLE_RATE), dtype=np.float32))
            pieces.append(takes[digit][rng.integers(len(takes[digit]))])
        pieces.append(np.zeros(int(rng.uniform(*pause) * SAMPLE_RATE), dtype=np.float32))
        wave = np.concatenate(pieces)
        if len(wave) <= max_duration_in_seconds * SAMPLE_RATE:  # else draw again: a few takes are very long
            return wave, " ".join(WORDS[digit] for digit in digits)


def telephone(rng: np.random.Generator, wave: np.ndarray, snr: tuple[float, float] = (3.0, 12.0)) -> bytes:
    """Return a string with pink noise, `snr` dB below the speech, as a WAV file of a GSM 06.10 telephone line."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE), 50.0))
    noise = np.fft.irfft(spectrum, len(wave))
    noise *= np.sqrt(np.mean(wave**2) / np.mean(noise**2)) * 10 ** (-rng.uniform(*snr) / 20)
    noisy = wave + noise
    file = io.BytesIO()
    sf.write(file, 0.5 * noisy / np.abs(noisy).max(), SAMPLE_RATE, format="WAV", subtype="GSM610")
    return file.getvalue()


def write_split(
    folder: Path,
    rng: np.random.Generator,
    takes: Takes,
    count: int,
    longest: float,
    suffix: str,
    save: Callable[[Path, np.ndarray], object],
) -> None:
    """Compose the strings of a split, write its audio folder in place of an earlier one, and print its size.

    Args:
        count: number of strings of all speakers.
        longest: seconds of the longest string.
        suffix: of the files, with the dot.
        save: writes a string, at 8 kHz, to a file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "audio").mkdir(parents=True)
    rows = []
    for speaker in takes:
        for index in range(count // len(takes)):
            wave, text = compose(rng, takes[speaker], max_duration_in_seconds=longest)
            name = f"audio/{speaker}-{index:03}{suffix}"
            save(folder / name, wave)
            rows.append((name, text, speaker, round(len(wave) / SAMPLE_RATE, 3)))
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file_name", "transcription", "speaker", "duration"])
        table.writerows(rows)
    words = sum(len(row[1].split()) for row in rows)
    print(f"{folder.name}: {len(rows)} strings, {words} words, {sum(row[3] for row in rows):.0f} s")
