"""Single spoken digits (Free Spoken Digit Dataset) and the strings composed of them.

Used by make_strings.py (the audio folder of the demo) and by train_teacher.py (strings composed on the fly).
"""

import csv
from pathlib import Path

import numpy as np
import soundfile as sf

HERE = Path(__file__).parent
SAMPLE_RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN_SPEAKERS = ("george", "jackson", "lucas", "nicolas")
UNSEEN_SPEAKERS = ("theo", "yweweler")
HELD_OUT = frozenset({4, 9, 14, 19, 24})  # positions among the 25 sorted takes of each speaker and digit
MAX_SECONDS = 3.0

# takes[speaker][digit] is a list of waveforms
Takes = dict[str, list[list[np.ndarray]]]


def load_takes(split: str, folder: Path = HERE / "digits") -> Takes:
    """The single digits of one split: "train" and "known" share speakers but no take; "unseen" has its own."""
    speakers = UNSEEN_SPEAKERS if split == "unseen" else KNOWN_SPEAKERS
    with open(folder / "index.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["speaker"], int(row["digit"]), int(row["take"])))
    audio = {speaker: sf.read(folder / f"{speaker}.ogg", dtype="float32")[0] for speaker in speakers}
    every: Takes = {speaker: [[] for _ in WORDS] for speaker in speakers}
    for row in rows:
        if row["speaker"] in audio:
            clip = audio[row["speaker"]][int(row["start_sample"]) : int(row["end_sample"])]
            every[row["speaker"]][int(row["digit"])].append(clip)
    if split == "unseen":
        return every
    return {
        speaker: [
            [clip for position, clip in enumerate(clips) if (position in HELD_OUT) == (split == "known")]
            for clips in digits
        ]
        for speaker, digits in every.items()
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
