"""Pack every second take of the Free Spoken Digit Dataset into one Ogg Vorbis file a speaker, with an index.

git clone https://github.com/Jakobovski/free-spoken-digit-dataset
python examples/demo/make_digits.py --fsdd free-spoken-digit-dataset
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import soundfile as sf
from digits import CALLERS, HERE, SAMPLE_RATE, TEACHERS, WORDS

TAKES = range(0, 50, 2)
GAP = np.zeros(SAMPLE_RATE // 50, dtype=np.float32)  # 20 ms, so that coding one clip does not smear into the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path, required=True, help="a clone of the Free Spoken Digit Dataset")
    parser.add_argument("--output_dir", type=Path, default=HERE / "digits")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # One file a clip would be mostly Vorbis headers (3 to 4 KB each); one file a speaker has them once.
    with open(args.output_dir / "index.csv", "w", newline="") as file:
        index = csv.writer(file, lineterminator="\n")
        index.writerow(["speaker", "digit", "take", "start_sample", "end_sample"])
        for speaker in TEACHERS + CALLERS:
            pieces: list[np.ndarray] = [GAP]
            position = len(GAP)
            for digit in range(len(WORDS)):
                for take in TAKES:
                    path = args.fsdd / "recordings" / f"{digit}_{speaker}_{take}.wav"
                    wave, sample_rate = sf.read(path, dtype="float32")
                    assert sample_rate == SAMPLE_RATE and wave.ndim == 1, path
                    index.writerow([speaker, digit, take, position, position + len(wave)])
                    pieces += [wave, GAP]
                    position += len(wave) + len(GAP)
            audio = np.concatenate(pieces)
            sf.write(
                args.output_dir / f"{speaker}.ogg",
                audio,
                SAMPLE_RATE,
                format="OGG",
                subtype="VORBIS",
                compression_level=0.5,
            )
            print(f"{speaker}: {len(audio) / SAMPLE_RATE:.0f} s")


if __name__ == "__main__":
    main()
