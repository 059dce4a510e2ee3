"""Compose strings of spoken digits without a telephone line: an audio folder for a study of noise.

    python examples/demo/make_clean_strings.py --output_dir digit_strings

Its test split has other speakers than train and validation.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile as sf
from digits import SAMPLE_RATE, Takes, load_takes, write_split

# split -> (generator, number of strings, splits of the demo whose recordings it takes)
STRINGS = {
    "train": (0, 400, ("teacher",)),
    "validation": (1, 80, ("studio",)),
    "test": (2, 200, ("train", "validation", "calls")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True, help="directory to write")
    args = parser.parse_args()

    for split, (number, count, sources) in STRINGS.items():
        rng = np.random.default_rng([args.seed, number])
        write_split(args.output_dir / split, rng, joined_takes(sources), count, 3.9, ".flac", save)


def save(file: Path, wave: np.ndarray) -> None:
    sf.write(file, wave, SAMPLE_RATE)


def joined_takes(splits: tuple[str, ...]) -> Takes:
    """Return the single digits of all these splits of the demo, which have the same speakers."""
    first, *others = (load_takes(split) for split in splits)
    for other in others:
        for speaker, digits in first.items():
            for clips, more in zip(digits, other[speaker], strict=True):
                clips.extend(more)
    return first


if __name__ == "__main__":
    main()
