"""Audio files to waveforms."""

import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from ..errors import UserError
from .decoding import AudioError, as_float, decode

SAMPLING_RATE = 16_000
MAX_BYTES = 4 * 2**30  # of a file: what WAV can hold, six hours of 24 bits in stereo at 32 kHz
# Hz: from below what telephones have up to the highest that is recorded
SAMPLING_RATES = (4_000, 768_000)
# Codecs overshoot 1 by little, recorders in 32-bit float by some dB. Beyond 18 dB it's another scale, and Whisper's
# features depend on the scale.
PEAK = 8.0
# Of the channels' mean energy, below which that of their mean is lost: 0.5 if one of two is silent, 0.5 if they have
# nothing in common. Times the number of channels.
CANCELED = 0.1
MAX_CHANNELS = 64


def decode_audio(audio: Mapping[str, Any] | None) -> np.ndarray:
    """A clip as float32 mono at 16 kHz, shape `(samples,)`.

    Args:
        audio: `{"path": str | None, "bytes": bytes | None}`, the bytes before the path; or
            `{"array": (samples,) or (samples, channels), "sampling_rate": int}`. Integers of 8 to 32 bits are scaled
            to -1 to 1 by their dtype.

    Raises:
        AudioError: no such file, not audio, corrupt, truncated, several files or tracks in one, empty, an impossible
            sampling rate, samples that are NaN, infinite or far outside of -1 and 1, or channels that cancel out.
    """
    return resample(*read_audio(audio))


def waveform(row: Mapping[str, Any]) -> np.ndarray:
    """The row's `audio` as `decode_audio` gives it; raises `UserError` with the clip's name if it can't be decoded."""
    try:
        return decode_audio(row["audio"])
    except AudioError as error:
        raise UserError(f"{row['clip']}: {error}. It was sound when it was checked before training") from error


def extract_features(
    extractor: WhisperFeatureExtractor, waves: list[np.ndarray], with_mask: bool = False
) -> dict[str, Tensor]:
    """`input_features` of `waveform`s, float32 `(clips, mel bins, frames)`, and if asked for their `attention_mask`.

    Clip by clip, which gives the same numbers as all at once in half the time: a clip's spectra stay in the cache.
    """
    options = dict(sampling_rate=SAMPLING_RATE, return_attention_mask=with_mask, return_tensors="pt")
    clips = [extractor(wave, **options) for wave in waves]
    return {name: torch.cat([clip[name] for clip in clips]) for name in clips[0]}


def read_audio(audio: Mapping[str, Any] | None) -> tuple[np.ndarray, int]:
    """As `decode_audio`, but at the rate of the file: `(samples,)` float32 mono and that rate in Hz."""
    if audio is None:
        raise AudioError("no audio")
    if audio.get("array") is not None:
        samples, rate = _from_array(audio["array"]), audio.get("sampling_rate")
    else:
        samples, rate = decode(_file_bytes(audio))
    lowest, highest = SAMPLING_RATES
    if not isinstance(rate, int | float | np.integer | np.floating) or not lowest <= rate <= highest:
        raise AudioError(f"impossible sampling rate: {rate} Hz, the limits are {lowest} and {highest}")
    if len(samples) == 0:
        raise AudioError("empty: no samples")
    _check_levels(samples)
    return (_mono(samples) if samples.ndim == 2 else samples), int(rate)


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """What `read_audio` gives at 16 kHz."""
    if rate == SAMPLING_RATE:
        return samples
    return librosa.resample(samples, orig_sr=rate, target_sr=SAMPLING_RATE, res_type="soxr_hq")


def silence(samples: np.ndarray) -> str:
    """That nothing can be heard in what `read_audio` gives, as a reason; "" if something can."""
    lowest, highest = samples.min(), samples.max()
    return f"silent: every sample is {lowest:g}" if lowest == highest else ""


def _from_array(values: Any) -> np.ndarray:
    """float32 `(samples,)` or `(samples, channels)`; the shorter axis is that of the channels."""
    try:
        samples = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of different lengths, or a tensor of a GPU
        raise AudioError(f"not an array of samples: {error}") from None
    if samples.dtype.kind not in "iuf":
        raise AudioError(f"not an array of samples: it holds {samples.dtype}")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and min(samples.shape) > MAX_CHANNELS):
        raise AudioError(f"not an array of samples: its shape is {samples.shape}, not (samples, channels)")
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    return as_float(samples)


def _check_levels(samples: np.ndarray) -> None:
    """Raise `AudioError` for samples that can't be sound of -1 to 1."""
    lowest, highest = float(samples.min()), float(samples.max())
    if not math.isfinite(lowest + highest):
        raise AudioError("NaN or infinite samples")
    peak = max(-lowest, highest)
    if peak > PEAK or (peak > 1.0 and np.array_equal(samples, np.rint(samples))):
        raise AudioError(f"samples must be within -1 and 1: up to {peak:.0f}, as integers that weren't scaled")


def _mono(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels. Raises `AudioError` if they cancel out in it."""
    mono, channels = samples.mean(axis=1), samples.shape[1]
    if channels > 1:
        kept, whole = float(mono.var()), float(samples.var(axis=0).mean())
        if channels * kept < CANCELED * whole:
            which = "left and right" if channels == 2 else f"{channels} channels"
            raise AudioError(f"{which} cancel out: their mean has {kept / whole:.1%} of the energy; keep one of them")
    return mono


def _file_bytes(audio: Mapping[str, Any]) -> bytes:
    content = audio.get("bytes")
    if content is None:
        if not audio.get("path"):
            raise AudioError("no audio")
        content = _read_file(Path(audio["path"]))
    if not content:
        raise AudioError("empty: a file of 0 bytes")
    return content


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        # before it is opened: a pipe would wait for ever, /dev/zero never end
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise AudioError("unreadable file: a pipe or a device, not a regular file")
        if status.st_size > MAX_BYTES:
            raise AudioError(f"too large: {status.st_size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:g} GiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise AudioError("missing file") from None
    except OSError as error:
        raise AudioError(f"unreadable file: {error.strerror}") from None
    except ValueError as error:  # a zero byte in its name
        raise AudioError(f"unreadable file: {error}") from None
