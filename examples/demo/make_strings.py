"""Compose the audio folder of the demo: spoken digit strings on a noisy telephone line, and without one.

python examples/demo/make_strings.py
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile as sf
from digits import HERE, MAX_SECONDS, SAMPLE_RATE, compose, empty_folder, load_takes, telephone, write_metadata

# split -> (generator, number of strings, whether they are calls); "studio" is what the teacher was made for
STRINGS = {"train": (0, 200, True), "studio": (4, 80, False), "validation": (2, 80, True), "calls": (3, 120, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=HERE / "data")
    args = parser.parse_args()

    for split, (number, count, is_call) in STRINGS.items():
        # A generator for each split: changing the size of one leaves the others as they are.
        rng = np.random.default_rng([args.seed, number])
        takes = load_takes(split)
        folder = args.output_dir / split
        empty_folder(folder)
        rows = []
        for speaker in takes:
            for index in range(count // len(takes)):
                # the codec appends up to 0.06 s
                wave, text = compose(rng, takes[speaker], max_duration_in_seconds=2.9 if is_call else MAX_SECONDS)
                if is_call:
                    name = f"audio/{speaker}-{index:03}.wav"
                    (folder / name).write_bytes(telephone(rng, wave))
                else:
                    # Opus, not Vorbis: its headers are small. In clips of 2 s Vorbis headers would be half the file
                    name = f"audio/{speaker}-{index:03}.ogg"
                    sf.write(folder / name, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.97)
                rows.append((name, text, speaker, round(len(wave) / SAMPLE_RATE, 3)))
        write_metadata(folder, rows)


if __name__ == "__main__":
    main()
