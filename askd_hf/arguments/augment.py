"""Options of waveform augmentation."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .ranges import Range, check_ranges
from .renamed import accepts_renamed

AUGMENT_PROBABILITY = 0.5
# Uniform ranges. Speed is changed by resampling, which shifts the pitch too: better than tempo alone (Ko et al. 2015).
SPEED = (0.9, 1.1)
SNR_DB = (5.0, 30.0)
REVERB_SECONDS = (0.2, 0.8)  # time in which the reverberation falls by 60 dB
DIRECT_DB = (-3.0, 9.0)  # direct sound over reverberation
GAIN_DB = (-12.0, 6.0)
MP3_KBPS = (16, 64)
AUGMENTATIONS = ("speed", "reverb", "noise", "gain", "codec")


@accepts_renamed
@dataclass
class AugmentArguments:
    """Waveform augmentation options. Each clip is augmented differently in every epoch."""

    _argument_group_name = "augmentation"

    augmentations: list[str] = HfArg(
        default_factory=list,
        help="Augmentations of the audio that the student takes in training; the teacher's targets are those of the "
        f"clean clips, and the self-teacher takes the student's audio. speed ({SPEED[0]} to {SPEED[1]} times, pitch "
        f"included), reverb (synthetic rooms, {REVERB_SECONDS[0]} to {REVERB_SECONDS[1]} s), noise (--snr_db), gain "
        f"({GAIN_DB[0]:g} to {GAIN_DB[1]:g} dB), codec (MP3, {MP3_KBPS[0]} to {MP3_KBPS[1]} kbit/s). A frozen "
        "encoder stays as it is, and the decoder adapts to its noisy outputs; --freeze_encoder False trains both. A "
        "hidden-state loss (--hidden_weight) draws the encoder's states of the augmented clip to the teacher's of the "
        "clean one. Requires pip install 'askd-hf[augment]'. Default: none.",
    )
    augment_probability: float = HfArg(
        default=AUGMENT_PROBABILITY, help="Probability of each of --augmentations, for each clip in each epoch."
    )
    noise_dir: str | None = HfArg(
        default=None,
        help="Directory of noise recordings of any length for --augmentations noise, including subdirectories. "
        "Default: Gaussian noise.",
    )
    snr_db: list[float] = HfArg(
        default_factory=lambda: list(SNR_DB),
        help="Lowest and highest signal-to-noise ratio of --augmentations noise in dB, over the whole clip. For "
        "speech at 0 dB, train with -5 15.",
    )
    augment_teacher: bool = HfArg(
        default=False, help="The teacher takes the augmented audio, too. Its labels can't be cached then."
    )

    def __post_init__(self):
        for name in self.augmentations:
            if name not in AUGMENTATIONS:
                raise UserError(f"--augmentations must be among {', '.join(AUGMENTATIONS)}, got {name!r}")
        check_ranges(self, augment_probability=Range(above=0, high=1), snr_db=Range())
        if len(self.snr_db) != 2 or self.snr_db[0] > self.snr_db[1]:
            values = " ".join(f"{value:g}" for value in self.snr_db)
            raise UserError(f"--snr_db must be two numbers, the lowest first, such as 0 30, got {values}")
        if "noise" not in self.augmentations:
            for name, is_given in (("noise_dir", self.noise_dir is not None), ("snr_db", self.snr_db != [*SNR_DB])):
                if is_given:
                    raise UserError(f"--{name} requires --augmentations noise")
        if self.augment_teacher and not self.augmentations:
            raise UserError("--augment_teacher True requires --augmentations")
        if self.augment_probability != AUGMENT_PROBABILITY and not self.augmentations:
            raise UserError("--augment_probability requires --augmentations")
