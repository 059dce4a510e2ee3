"""Training clips made faster or slower, noisier, louder or quieter, and compressed, by `audiomentations`.

In the order in which it happens to a voice: how fast it speaks, the noise around it, the gain of the microphone, the
codec of the transmission. SpecAugment, on the features, is the model's: `apply_spec_augment` in its config.
"""

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from ..errors import UserError
from .audio import SAMPLING_RATE
from .audiofolder import AUDIO, audio_files

Transform = Callable[[np.ndarray, int], np.ndarray]

# Uniform in these. Speed by resampling, pitch and all, which did better than tempo alone (Ko et al. 2015)
SPEED = (0.9, 1.1)
SNR_DB = (5.0, 30.0)
GAIN_DB = (-12.0, 6.0)
MP3_KBPS = (16, 64)
# LAME takes no less
SHORTEST_MP3 = SAMPLING_RATE // 10
EFFECTS = ("speed", "noise", "gain", "codec")


@dataclass
class AugmentArguments:
    """What training clips are changed by, each clip in another way in every epoch."""

    _argument_group_name = "augmentation"

    augment: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Changes of training clips: speed ({SPEED[0]} to {SPEED[1]} times, with the pitch), noise "
            f"({SNR_DB[0]:g} to {SNR_DB[1]:g} dB below the speech), gain ({GAIN_DB[0]:g} to {GAIN_DB[1]:g} dB), codec "
            f"(MP3 of {MP3_KBPS[0]} to {MP3_KBPS[1]} kbit/s). Needs pip install 'askd-hf[augment]'. Default: none."
        },
    )
    augment_probability: float = field(
        default=0.5, metadata={"help": "Of each change of --augment, for each clip in each epoch."}
    )
    noise_folder: str | None = field(
        default=None,
        metadata={
            "help": "Directory of recorded noises for --augment noise, of any length, with all its subdirectories. "
            "Default: Gaussian noise."
        },
    )

    def __post_init__(self):
        for effect in self.augment:
            if effect not in EFFECTS:
                raise UserError(f"augment: {effect!r} is none of {', '.join(EFFECTS)}")
        if not 0.0 < self.augment_probability <= 1.0:
            raise UserError(f"augment_probability: {self.augment_probability} is not in (0, 1]")
        if self.noise_folder is not None and "noise" not in self.augment:
            raise UserError(f"noise_folder: {self.noise_folder} has no effect without `noise` in augment")


class Augmenter:
    """Changes waveforms by what `options.augment` names, each with the probability there.

    What happens to a clip is a function of the clip and its `draw`: not of the global random states, which are left
    as they were, nor of the number of workers or what they did before.

    Args:
        options: with at least one effect.
        max_samples: of a result. A clip that would be longer when slowed down keeps its speed.

    Raises:
        UserError: `audiomentations` is missing; or there is no noise in `noise_folder`, or some that can't be read.
    """

    def __init__(self, options: AugmentArguments, max_samples: int = 30 * SAMPLING_RATE):
        self.options = options
        library = _audiomentations()
        p = options.augment_probability
        self.max_samples = max_samples
        self.speed: Transform | None = None
        self.others: list[Transform] = []
        if "speed" in options.augment:
            slowest, fastest = SPEED
            self.speed = library.Resample(round(SAMPLING_RATE / fastest), round(SAMPLING_RATE / slowest), p=p)
        if "noise" in options.augment and options.noise_folder is None:
            self.others.append(library.AddGaussianSNR(*SNR_DB, p=p))
        elif "noise" in options.augment:
            self.others.append(library.AddBackgroundNoise(_noises(options.noise_folder), *SNR_DB, p=p))
        if "gain" in options.augment:
            self.others.append(library.Gain(*GAIN_DB, p=p))
        self.codec: Transform | None = None
        if "codec" in options.augment:
            self.codec = library.Mp3Compression(*MP3_KBPS, backend="fast-mp3-augment", p=p)

    def __call__(self, wave: np.ndarray, draw: Sequence[int]) -> np.ndarray:
        """The waveform of `augment`."""
        return self.augment(wave, draw)[0]

    def augment(self, wave: np.ndarray, draw: Sequence[int]) -> tuple[np.ndarray, float]:
        """Change one clip.

        Args:
            wave: float32 `(samples,)`, mono at 16 kHz, not empty.
            draw: non-negative integers that stand for the clip in this epoch, such as `(seed, epoch, row)`.

        Returns:
            The new waveform, float32 `(samples,)`, at most `max_samples` long if `wave` is, in [-1, 1]: what noise or
            gain take beyond is clipped, as a converter would. And its duration as a multiple of that of `wave`, by
            which times in the clip are to be multiplied: other than 1 only by a change of speed.
        """
        with _drawing_from(draw), warnings.catch_warnings():
            # of a noise of another sampling rate; of one that is silent, which changes nothing
            warnings.filterwarnings("ignore", module="audiomentations")
            changed = self._at_another_speed(wave)
            time_factor = len(changed) / len(wave)
            for transform in self.others:
                changed = transform(changed, SAMPLING_RATE)
            changed = np.clip(changed, -1.0, 1.0)
            if self.codec is not None and len(changed) >= SHORTEST_MP3:
                changed = np.clip(self.codec(changed, SAMPLING_RATE), -1.0, 1.0)  # decoded it may overshoot a little
        return changed, time_factor

    def _at_another_speed(self, wave: np.ndarray) -> np.ndarray:
        if self.speed is None:
            return wave
        # as if it had been recorded at that rate: played at ours it has another speed
        changed = self.speed(wave, SAMPLING_RATE)
        return changed if len(changed) <= self.max_samples else wave


@contextlib.contextmanager
def _drawing_from(draw: Sequence[int]) -> Iterator[None]:
    """Within it the global generators of `random` and numpy, which `audiomentations` uses, are seeded with `draw`."""
    states = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(draw).generate_state(8)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _audiomentations():
    """The library. Raises `UserError` if it, or its MP3 codec, isn't installed."""
    try:
        import audiomentations
        import fast_mp3_augment  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--augment needs audiomentations and fast-mp3-augment ({error}): install them with pip install "
            "'askd-hf[augment]'"
        ) from error
    return audiomentations


def _noises(folder: str) -> list[str]:
    """The audio files in the folder, in an order that doesn't depend on the file system."""
    files = [os.path.abspath(file) for file in audio_files(Path(folder).expanduser())]
    if not files:
        raise UserError(f"noise_folder: no {', '.join(sorted(suffix[1:] for suffix in AUDIO))} files in {folder}")
    for file in files:
        _check_end(file)
    return files


def _check_end(file: str) -> None:
    """Raise `UserError` unless the file can be read where it ends: one cut off would make the library loop forever."""
    try:
        with soundfile.SoundFile(file) as sound:
            sound.seek(max(0, sound.frames - 1))
            complete = len(sound.read()) > 0
    except soundfile.LibsndfileError as error:
        raise UserError(f"noise_folder: {file} can't be read ({error.error_string})") from None
    if not complete:
        raise UserError(f"noise_folder: {file} is empty or cut off")
