"""Compose the audio folder of the demo: spoken digit strings on a noisy telephone line, and without one.

python examples/demo/make_strings.py
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import soundfile as sf
from digits import HERE, MAX_SECONDS, SAMPLE_RATE, load_takes, telephone, write_split

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
        folder, takes = args.output_dir / split, load_takes(split)
        if is_call:  # the codec appends up to 0.06 s
            write_split(folder, rng, takes, count, 2.9, ".wav", partial(save_call, rng))
        else:
            write_split(folder, rng, takes, count, MAX_SECONDS, ".ogg", save_studio)


def save_call(rng: np.random.Generator, file: Path, wave: np.ndarray) -> None:
    file.write_bytes(telephone(rng, wave))


def save_studio(file: Path, wave: np.ndarray) -> None:
    # Opus, not Vorbis: its headers are small. In clips of 2 s Vorbis headers would be half the file
    sf.write(file, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.97)


if __name__ == "__main__":
    main()
