"""Compute log-mel features on the device of the models, in place of the worker processes."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor

from ..errors import UserError

LOWEST_POWER, DYNAMIC_RANGE = 1e-10, 8.0  # those of `WhisperFeatureExtractor`; the range in powers of ten


def check_extractor(extractor: WhisperFeatureExtractor) -> None:
    """Raise `UserError` for a feature extractor that adds noise (`dither`), or pads with another value than 0."""
    for name, value in {"dither": extractor.dither, "padding_value": extractor.padding_value}.items():
        if value:
            raise UserError(
                f"--features_on_device requires a feature extractor with {name} 0.0, got {value} "
                "(preprocessor_config.json): set it to 0.0, or leave the option out"
            )


@dataclass
class WaveformFeatures:
    """The waveforms of a batch. Moving them to a device computes their log-mel features there.

    `accelerate.utils.send_to_device` and the data loaders of Trainer move them as they move tensors.

    Args:
        waves: float32 `(clips, samples of the longest)`, at 16 kHz, padded with zeros.
        mel_filters: float32 `(frequencies, mel bins)`.
        n_fft: samples of a frame.
        hop_length: samples between frames.
        frames: number of frames that are computed: those of the window, or of a shorter audio context.
    """

    waves: Tensor
    mel_filters: Tensor
    n_fft: int
    hop_length: int
    frames: int

    @classmethod
    def of(cls, extractor: WhisperFeatureExtractor, waves: list[np.ndarray]) -> "WaveformFeatures":
        """Pad the waveforms to the longest, and cut them at the window as the extractor does.

        The extractor must pass `check_extractor`.
        """
        padded = torch.zeros(len(waves), min(max(map(len, waves)), extractor.n_samples))
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave[: len(row)])
        filters = torch.from_numpy(extractor.mel_filters).float()
        return cls(padded, filters, extractor.n_fft, extractor.hop_length, extractor.nb_max_frames)

    def cut(self, frames: int) -> "WaveformFeatures":
        """Return the features with the first `frames` frames only. The clips must not be longer."""
        return replace(self, frames=frames)

    def pin_memory(self) -> "WaveformFeatures":
        return replace(self, waves=self.waves.pin_memory(), mel_filters=self.mel_filters.pin_memory())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False) -> Tensor:
        """Return the features on the device, `(clips, mel bins, frames)`, computed in float32."""
        waves, filters = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.waves, self.mel_filters))
        return self._log_mel(waves, filters).to(dtype or torch.float32)

    def _log_mel(self, waves: Tensor, filters: Tensor) -> Tensor:
        """Return the features of `WhisperFeatureExtractor`, which returns them on the CPU."""
        waves = F.pad(waves, (0, self.frames * self.hop_length - waves.shape[1]))
        window = torch.hann_window(self.n_fft, device=waves.device)
        spectrum = torch.stft(waves, self.n_fft, self.hop_length, window=window, return_complex=True)
        power = spectrum[..., :-1].abs().square().contiguous()  # without the frame that starts at the end
        # with --torch_compile Transformers turns on TF32, which rounds the factors of a float32 product to 10 bits.
        # MPS has neither TF32 nor float64
        exact = torch.float32 if power.device.type == "mps" else torch.float64
        log_mel = (filters.T.to(exact) @ power.to(exact)).float().clamp(min=LOWEST_POWER).log10()
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log_mel, loudest - DYNAMIC_RANGE) + 4.0) / 4.0


def attention_mask(waves: list[np.ndarray], extractor: WhisperFeatureExtractor) -> Tensor:
    """Return the mask of the frames with audio, int32 `(clips, frames)`, as `WhisperFeatureExtractor` does."""
    starts = torch.arange(extractor.nb_max_frames) * extractor.hop_length
    lengths = torch.tensor([len(wave) for wave in waves])
    return (starts < lengths[:, None]).to(torch.int32)
