"""Options of waveform augmentation."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .ranges import Range, check_ranges
from .renamed import accepts_renamed

# Uniform ranges. Speed is changed by resampling, which shifts the pitch too: better than tempo alone (Ko et al. 2015).
SPEED = (0.9, 1.1)
SNR_DB = (5.0, 30.0)
GAIN_DB = (-12.0, 6.0)
MP3_KBPS = (16, 64)
AUGMENTATIONS = ("speed", "noise", "gain", "codec")


@accepts_renamed
@dataclass
class AugmentArguments:
    """Waveform augmentation options. Each clip is augmented differently in every epoch."""

    _argument_group_name = "augmentation"

    augmentations: list[str] = HfArg(
        default_factory=list,
        help=f"Augmentations of training clips: speed ({SPEED[0]} to {SPEED[1]} times, pitch included), noise "
        f"(SNR {SNR_DB[0]:g} to {SNR_DB[1]:g} dB), gain ({GAIN_DB[0]:g} to {GAIN_DB[1]:g} dB), codec (MP3, "
        f"{MP3_KBPS[0]} to {MP3_KBPS[1]} kbit/s). Requires pip install 'askd-hf[augment]'. Default: none.",
    )
    augment_probability: float = HfArg(
        default=0.5, help="Probability of each of --augmentations, for each clip in each epoch."
    )
    noise_dir: str | None = HfArg(
        default=None,
        help="Directory of noise recordings of any length for --augmentations noise, including subdirectories. "
        "Default: Gaussian noise.",
    )

    def __post_init__(self):
        for name in self.augmentations:
            if name not in AUGMENTATIONS:
                raise UserError(f"--augmentations must be among {', '.join(AUGMENTATIONS)}, got {name!r}")
        check_ranges(self, augment_probability=Range(above=0, high=1))
        if self.noise_dir is not None and "noise" not in self.augmentations:
            raise UserError("--noise_dir requires --augmentations noise")
