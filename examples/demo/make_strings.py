"""Compose the audio folder of the demo: spoken digit strings in data/train, data/known and data/unseen.

python examples/demo/make_strings.py
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
import soundfile as sf
from digits import HERE, SAMPLE_RATE, compose, load_takes

STRINGS = {"train": 560, "known": 80, "unseen": 80}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=HERE / "data")
    args = parser.parse_args()

    for number, (split, count) in enumerate(STRINGS.items()):
        # A generator for each split: changing the size of one leaves the others as they are.
        rng = np.random.default_rng([args.seed, number])
        takes = load_takes(split)
        folder = args.output_dir / split
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "audio").mkdir(parents=True)
        rows = []
        for speaker in takes:
            for index in range(count // len(takes)):
                wave, text = compose(rng, takes[speaker])
                name = f"audio/{speaker}-{index:03}.ogg"
                # Opus, not Vorbis: its headers are small, and in clips of 2 s Vorbis headers would be half the file.
                sf.write(folder / name, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.97)
                rows.append([name, text, speaker, round(len(wave) / SAMPLE_RATE, 3)])
        with open(folder / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file_name", "transcription", "speaker", "duration"])
            table.writerows(rows)
        words = sum(len(row[1].split()) for row in rows)
        print(f"{split}: {len(rows)} strings, {words} words, {sum(row[3] for row in rows):.0f} s")


if __name__ == "__main__":
    main()
