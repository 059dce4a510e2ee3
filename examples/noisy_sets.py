r"""Make noisy copies of held-out speech, to measure how a student does in noise, in a room and on the telephone.

    python examples/noisy_sets.py --dataset my_speech --split test --noise_dir noises --output_dir noisy_speech

writes noisy_speech/clean, snr20, snr10, snr5, snr0, reverb and codec: the same clips as FLAC at 16 kHz. The columns
`condition`, `noise` and `source` of each metadata.csv say what was done to which clip. A clip has the same piece of
the same noise at all ratios. reverb is a synthetic room, codec is GSM 06.10 at 8 kHz. Each directory is a split for
askd-hf evaluate, which gives the error rate of each with its interval:

    askd-hf evaluate --model runs/my-student --dataset noisy_speech \
        --eval_splits clean snr20 snr10 snr5 snr0 reverb codec

Noises of the test mustn't be those of the training. --noise_every 2 --training_noises DIRECTORY takes every second
file of --noise_dir, and copies the others, for --augmentations noise --noise_dir DIRECTORY.
"""

import csv
import functools
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from askd_hf.arguments.parser import parse_args
from askd_hf.arguments.ranges import COUNT, SEED, Range, check_ranges
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import UserError, exit_on_user_error

if TYPE_CHECKING:  # else imported in the functions, as --help needs none of it
    import numpy as np
    from datasets import Dataset

REVERB_SECONDS = (0.4, 0.8)  # time in which the reverberation falls by 60 dB
DIRECT_DB = (-3.0, 3.0)  # direct sound over reverberation
QUIET = 0.1  # of the RMS of a whole noise: its quieter pieces aren't taken
TRIES = 20


@dataclass
class Arguments:
    """The speech and the noises."""

    dataset: str = field(metadata={"help": "Speech: as of askd-hf evaluate."})
    noise_dir: str = field(metadata={"help": "Directory of noise recordings, including subdirectories."})
    output_dir: str = field(metadata={"help": "Directory to write."})
    split: str = field(default="test", metadata={"help": "Split of --dataset."})
    audio_column_name: str | None = field(default=None, metadata={"help": "Audio column. Default: the only one."})
    text_column_name: str | None = field(default=None, metadata={"help": "Transcript column. Default: by its name."})
    snr_db: list[float] = field(
        default_factory=lambda: [20.0, 10.0, 5.0, 0.0],
        metadata={"help": "Signal-to-noise ratios over the whole clip, in dB."},
    )
    noise_every: int = field(
        default=1, metadata={"help": "Take every so many of the noises, in the order of their names."}
    )
    training_noises: str | None = field(
        default=None, metadata={"help": "Directory to copy the other noises to. Default: they aren't copied."}
    )
    max_clips: int | None = field(
        default=None, metadata={"help": "Take this many clips, at equal distances. Default: all."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noises and the rooms."})

    def __post_init__(self):
        check_ranges(self, noise_every=COUNT, max_clips=COUNT, seed=SEED, snr_db=Range())
        if self.training_noises is not None and self.noise_every < 2:
            raise UserError("--training_noises requires --noise_every of at least 2, which leaves noises for training")
        for name in ("output_dir", "training_noises"):
            directory = getattr(self, name)
            if directory is not None and Path(directory).exists():
                raise UserError(f"--{name} {directory} already exists: choose another, or remove it first")


def main() -> None:
    (args,) = parse_args((Arguments,), prog="python examples/noisy_sets.py", description=__doc__)
    clips = load_clips(args)
    noises = split_noises(args)
    splits = write_splits(args, clips, noises)
    print(f"{len(clips)} clips in each of {len(splits)} conditions, with {len(noises)} noises. To evaluate a model:")
    print(f"askd-hf evaluate --model MODEL --dataset {args.output_dir} --eval_splits {' '.join(splits)}")


def split_noises(args: Arguments) -> list[str]:
    """Return the noise files for the test, and copy the others to `--training_noises`.

    Raises `UserError` if there are none, or one is silent or can't be decoded.
    """
    from askd_hf.data.augment import noise_files

    files = noise_files(args.noise_dir)
    test = files[:: args.noise_every]
    if args.training_noises is not None:
        if len(test) == len(files):
            raise UserError(f"--noise_dir {args.noise_dir} has one noise: none is left for training")
        root = os.path.abspath(Path(args.noise_dir).expanduser())
        for file in sorted({*files} - {*test}):
            target = Path(args.training_noises) / Path(file).relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
    return test


def load_clips(args: Arguments) -> "Dataset":
    """Return the clips with a transcript. Invalid clips are left out with a warning that names them.

    Raises `UserError` if no clip is left.
    """
    from askd_hf.data import Limits, filter_invalid_clips, load_speech_dataset
    from askd_hf.evaluation.prepared_sets import spread
    from askd_hf.evaluation.suites import with_speakers

    columns = dict(audio_column_name=args.audio_column_name, text_column_name=args.text_column_name)
    speech = with_speakers(load_speech_dataset(args.dataset, None, args.split, **columns))
    speech = speech.select([row for row, text in enumerate(speech["text"][:]) if text and text.strip()])
    if not len(speech):
        raise UserError(f"{args.dataset}: no clip of split {args.split!r} has a transcript")
    clips = spread(speech, args.max_clips or len(speech))
    return filter_invalid_clips(clips, None, Limits(math.inf), on_bad_audio="skip", split=args.split)


def write_splits(args: Arguments, clips: "Dataset", noises: list[str]) -> list[str]:
    """Write all conditions of all clips, and return the names of their directories."""
    import soundfile

    from askd_hf.data.audio import SAMPLING_RATE, waveform
    from askd_hf.progress import progress

    output = Path(args.output_dir)
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, clip in enumerate(progress(clips, "Noisy clips", "clip")):
        file = Path("audio", f"{number:05d}.flac")
        speaker = {"speaker": clip["speaker"]} if "speaker" in clip else {}
        for name, condition, noise, wave in conditions(args, clip["clip"], waveform(clip), noises):
            target = unfinished / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, wave, SAMPLING_RATE, subtype="PCM_16")
            row = {"file_name": file.as_posix(), "transcription": clip["text"], **speaker}
            rows.setdefault(name, []).append(row | {"condition": condition, "noise": noise, "source": clip["clip"]})
    for name, of_split in rows.items():
        with (unfinished / name / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, of_split[0].keys())
            writer.writeheader()
            writer.writerows(of_split)
    unfinished.rename(output)
    return list(rows)


def conditions(
    args: Arguments, clip: str, wave: "np.ndarray", noises: list[str]
) -> Iterator[tuple[str, str, str, "np.ndarray"]]:
    """Yield directory, condition, noise and waveform of each copy. They depend on the seed and the clip's name."""
    import numpy as np

    from askd_hf.data.degradations import add_noise, reverberate, telephone

    rng = np.random.default_rng([args.seed, zlib.crc32(clip.encode())])
    noise = noises[rng.integers(len(noises))]
    piece = noise_piece(load_noise(noise), len(wave), rng)
    name = Path(noise).name
    yield "clean", "clean", "", within_scale(wave)
    for snr_db in dict.fromkeys(args.snr_db):
        yield f"snr{snr_db:g}", f"{snr_db:g} dB", name, within_scale(add_noise(wave, piece, snr_db))
    room = reverberate(wave, rng.uniform(*REVERB_SECONDS), rng.uniform(*DIRECT_DB), rng)
    yield "reverb", "reverb", "", within_scale(room)
    yield "codec", "codec", "", within_scale(telephone(within_scale(wave)))


@functools.lru_cache(maxsize=64)
def load_noise(file: str) -> "np.ndarray":
    """Return a noise at 16 kHz, without zeros at its ends."""
    import numpy as np

    from askd_hf.data.audio import decode_audio

    return np.trim_zeros(decode_audio({"path": file, "bytes": None}))


def noise_piece(noise: "np.ndarray", samples: int, rng: "np.random.Generator") -> "np.ndarray":
    """Return a random piece of a noise, which is repeated where it is too short, `(samples,)`."""
    import numpy as np

    from askd_hf.data.degradations import rms

    repeated = np.tile(noise, math.ceil(samples / len(noise)) + 1)
    for _ in range(TRIES):
        start = rng.integers(len(noise))
        piece = repeated[start : start + samples]
        if rms(piece) >= QUIET * rms(noise):
            return piece
    start = max(int(np.abs(noise).argmax()) - samples // 2, 0)
    return repeated[start : start + samples]


def within_scale(wave: "np.ndarray") -> "np.ndarray":
    """Return the wave, quieter if its peak exceeds what 16 bits hold, so that nothing is clipped."""
    import numpy as np

    return wave / max(1.0, float(np.abs(wave).max()) * 32768 / 32767)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
