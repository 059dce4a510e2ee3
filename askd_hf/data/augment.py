"""Waveform augmentation of training clips: speed, reverb, noise, gain and codec, in this order.

All but reverb are those of `audiomentations`. SpecAugment, on the features, is `ASKDConfig.spec_augment`.
"""

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from ..arguments.augment import DIRECT_DB, GAIN_DB, MP3_KBPS, REVERB_SECONDS, SPEED, AugmentArguments
from ..errors import UserError
from ..progress import progress
from .audio import SAMPLING_RATE, AudioError, read_audio, silence
from .audiofolder import AUDIO_SUFFIXES, audio_files
from .degradations import reverberate

Transform = Callable[[np.ndarray, int], np.ndarray]

# of noises that audiomentations reads with libsndfile; it leaves out files with other ones
NOISE_SUFFIXES = (".aif", ".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav")
# shortest clip that LAME encodes, samples
MIN_MP3_SAMPLES = SAMPLING_RATE // 10


class Augmenter:
    """Apply each of `options.augmentations` to a waveform with the probability `options.augment_probability`.

    The result depends only on the clip and its `rng_key`: not on the global random states, which are restored, and not
    on the number of workers.

    Args:
        max_samples: longest result, samples. A clip that would become longer keeps its speed. Default: 30 s.

    Raises `UserError` if `audiomentations` isn't installed, or as `noise_files`.
    """

    def __init__(self, options: AugmentArguments, max_samples: int = 30 * SAMPLING_RATE):
        self.options = options
        library = _audiomentations()
        p = options.augment_probability
        self.max_samples = max_samples
        self.speed: Transform | None = None
        self.transforms: list[Transform] = []
        if "speed" in options.augmentations:
            slowest, fastest = SPEED
            self.speed = library.Resample(round(SAMPLING_RATE / fastest), round(SAMPLING_RATE / slowest), p=p)
        if "reverb" in options.augmentations:
            self.transforms.append(Reverb(p))
        if "noise" in options.augmentations and options.noise_dir is None:
            self.transforms.append(library.AddGaussianSNR(*options.snr_db, p=p))
        elif "noise" in options.augmentations:
            self.transforms.append(library.AddBackgroundNoise(noise_files(options.noise_dir), *options.snr_db, p=p))
        if "gain" in options.augmentations:
            self.transforms.append(library.Gain(*GAIN_DB, p=p))
        self.codec: Transform | None = None
        if "codec" in options.augmentations:
            self.codec = library.Mp3Compression(*MP3_KBPS, backend="fast-mp3-augment", p=p)

    def __call__(self, wave: np.ndarray, rng_key: Sequence[int]) -> tuple[np.ndarray, float]:
        """Augment one clip.

        Args:
            wave: float32 `(samples,)`, mono at 16 kHz, not empty.
            rng_key: non-negative integers that seed the random choices, such as `(seed, epoch, row)`.

        Returns:
            The augmented waveform and its duration relative to that of `wave`, by which times in the clip are to be
            multiplied. The waveform is float32 `(samples,)`, clipped to [-1, 1], and no longer than `max_samples` if
            `wave` isn't. The relative duration differs from 1 only if the speed was changed.
        """
        with _seeded(rng_key), warnings.catch_warnings():
            # audiomentations warns if noise has another sampling rate, or is silent and has no effect
            warnings.filterwarnings("ignore", module="audiomentations")
            changed = self._change_speed(wave)
            time_factor = len(changed) / len(wave)
            for transform in self.transforms:
                changed = transform(changed, SAMPLING_RATE)
            changed = np.clip(changed, -1.0, 1.0)
            if self.codec is not None and len(changed) >= MIN_MP3_SAMPLES:
                changed = np.clip(self.codec(changed, SAMPLING_RATE), -1.0, 1.0)  # decoded MP3 can exceed 1 slightly
        return changed, time_factor

    def _change_speed(self, wave: np.ndarray) -> np.ndarray:
        if self.speed is None:
            return wave
        # resampled to another rate and played at 16 kHz, the clip has another speed
        changed = self.speed(wave, SAMPLING_RATE)
        return changed if len(changed) <= self.max_samples else wave


@dataclass
class Reverb:
    """Put clips into random rooms with the probability `p`. The random numbers are those of the global generators."""

    p: float

    def __call__(self, wave: np.ndarray, rate: int) -> np.ndarray:
        if random.random() >= self.p:
            return wave
        rng = np.random.default_rng(np.random.randint(2**32, size=4, dtype=np.uint32))
        return reverberate(wave, rng.uniform(*REVERB_SECONDS), rng.uniform(*DIRECT_DB), rng)


@contextlib.contextmanager
def _seeded(rng_key: Sequence[int]) -> Iterator[None]:
    """Seed the global generators of `random` and numpy, which `audiomentations` uses, and restore them afterwards."""
    states = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(rng_key).generate_state(8)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _audiomentations():
    """Import `audiomentations`. Raise `UserError` if it or its MP3 codec isn't installed."""
    try:
        import audiomentations
        import fast_mp3_augment  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--augmentations requires audiomentations and fast-mp3-augment ({error}): install them with pip install "
            "'askd-hf[augment]'"
        ) from error
    return audiomentations


def noise_files(folder: str) -> list[str]:
    """Return the audio files in the folder, sorted.

    Raises `UserError` if there are none, or one is silent or can't be decoded by `audiomentations`, which would leave
    it out, or loop forever on a truncated file.
    """
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"--noise_dir {folder}: no such directory")
    files = [os.path.abspath(file) for file in audio_files(Path(folder).expanduser())]
    if not files:
        raise UserError(f"--noise_dir {folder}: no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})")
    for file in progress(files, "Checking noises", "file"):
        if problem := _problem(file):
            raise UserError(f"--noise_dir: {file}: {problem}")
    return files


def _problem(file: str) -> str:
    """Return why a noise can't be used, or "" if it can."""
    try:
        with soundfile.SoundFile(file) as sound:
            sound.seek(max(0, sound.frames - 1))
            complete = len(sound.read()) > 0
        is_silent = silence(read_audio({"path": file})[0]) if complete else ""
    except soundfile.LibsndfileError as error:
        return f"can't be read ({error.error_string}): convert it to WAV or FLAC"
    except AudioError as error:
        return str(error)
    if not complete:
        return "empty or truncated"
    known = file.lower().endswith(NOISE_SUFFIXES)
    return is_silent or ("" if known else f"must be one of {', '.join(NOISE_SUFFIXES)}: convert it to WAV or FLAC")
