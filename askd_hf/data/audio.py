"""Decode audio files and arrays to waveforms."""

import io
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from ..errors import UserError
from .audio_decoding import UNKNOWN_FRAMES, AudioError, as_float, decode

SAMPLING_RATE = 16_000
PAUSE = 0.1  # seconds of silence between joined clips
MAX_BYTES = 4 * 2**30  # largest file: the limit of WAV, six hours of 24-bit stereo at 32 kHz
# Hz: from below telephone speech to the highest rate of recorders
SAMPLING_RATES = (4_000, 768_000)
# Largest absolute sample. Codecs exceed 1 slightly, recorders of 32-bit float by a few dB. More than 18 dB is another
# scale, and Whisper's features depend on the scale.
MAX_PEAK = 8.0
# Channels cancel out if (channels * energy of their mean / mean of their energies) is below this. For two channels the
# value is 1 if they are uncorrelated or if one is silent, 2 if they are equal, and 0 if they have opposite signs.
MIN_MONO_ENERGY = 0.1
MAX_CHANNELS = 64
SEEKABLE = ("WAV", "WAVEX", "RF64", "FLAC")  # libsndfile's formats in which it finds every sample exactly


def decode_audio(audio: Mapping[str, Any] | None) -> np.ndarray:
    """Decode a clip to float32 mono at 16 kHz, shape `(samples,)`.

    Args:
        audio: `{"path": str | None, "bytes": bytes | None}`, where bytes take precedence over the path; or
            `{"array": (samples,) or (samples, channels), "sampling_rate": int}`. Integers of 8 to 32 bits are scaled
            to [-1, 1] by their dtype.

    Raises:
        AudioError: the file is missing, not audio, corrupt, truncated, empty, or contains several files or tracks; the
            sampling rate is impossible; samples are NaN, infinite or far outside [-1, 1]; or the channels cancel out.
    """
    return resample(*read_audio(audio))


def waveform(row: Mapping[str, Any]) -> np.ndarray:
    """Return `decode_audio` of the row's `audio`, and of `more_audio` behind it, with pauses of `PAUSE` seconds.

    Raises `UserError` with the clip's name if decoding fails.
    """
    try:
        return with_pauses([decode_audio(audio) for audio in audio_files_of(row)])
    except AudioError as error:
        raise UserError(
            f"{row['clip']}: {error}. The file passed validation, so it has changed since or the disk failed"
        ) from error


def waveform_segment(row: Mapping[str, Any], start: int, samples: int) -> np.ndarray:
    """Return `waveform(row)[start : start + samples]`.

    Of an uncompressed or FLAC file of 16 kHz, which has passed validation, only this part is decoded.

    Raises `UserError` as `waveform` does.
    """
    segment = None if row.get("more_audio") else _read_segment(row["audio"], start, samples)
    return waveform(row)[start : start + samples] if segment is None else segment


def _read_segment(audio: Mapping[str, Any], start: int, samples: int) -> np.ndarray | None:
    """Return the samples of a part of a file; None if they could differ from those of the whole file."""
    if audio.get("array") is not None:
        return None
    try:
        with soundfile.SoundFile(audio["path"] if audio.get("bytes") is None else io.BytesIO(audio["bytes"])) as file:
            exact = file.format in SEEKABLE and file.subtype.startswith(("PCM_", "FLOAT", "DOUBLE"))
            if not exact or file.samplerate != SAMPLING_RATE or not start < file.frames < UNKNOWN_FRAMES:
                return None
            length = min(samples, file.frames - start)
            file.seek(start)
            read = file.read(length, dtype="float32")
    except (soundfile.LibsndfileError, OSError, TypeError, KeyError):
        return None  # decoding the whole file says what is wrong
    if len(read) != length:
        return None
    return read.mean(axis=1) if read.ndim == 2 else read


def audio_files_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the audio of a row, and of the clips that are joined with it."""
    return [row["audio"], *(row.get("more_audio") or [])]


def with_pauses(waves: list[np.ndarray]) -> np.ndarray:
    """Join waveforms of 16 kHz, float32 `(samples,)` each, with pauses of `PAUSE` seconds."""
    pause = np.zeros(round(PAUSE * SAMPLING_RATE), dtype=np.float32)
    return waves[0] if len(waves) == 1 else np.concatenate([part for wave in waves for part in (wave, pause)][:-1])


def extract_features(
    extractor: WhisperFeatureExtractor, waves: list[np.ndarray], with_mask: bool = False
) -> dict[str, Tensor]:
    """Return `input_features`, float32 `(clips, mel bins, frames)`, and with `with_mask` the `attention_mask`.

    The clips are processed one by one. This gives the same values as one call in half the time, since the spectra of
    one clip fit in the CPU cache.
    """
    options = dict(sampling_rate=SAMPLING_RATE, return_attention_mask=with_mask, return_tensors="pt")
    clips = [extractor(wave, **options) for wave in waves]
    return {name: torch.cat([clip[name] for clip in clips]) for name in clips[0]}


def read_audio(audio: Mapping[str, Any] | None) -> tuple[np.ndarray, int]:
    """Decode like `decode_audio`, without resampling. Return float32 mono `(samples,)` and the sampling rate in Hz."""
    if audio is None:
        raise AudioError("no audio")
    if audio.get("array") is not None:
        samples, rate = _from_array(audio["array"]), audio.get("sampling_rate")
    else:
        samples, rate = decode(_file_bytes(audio))
    lowest, highest = SAMPLING_RATES
    if not isinstance(rate, int | float | np.integer | np.floating) or not lowest <= rate <= highest:
        raise AudioError(f"impossible sampling rate: {rate} Hz, must be between {lowest} and {highest}")
    if len(samples) == 0:
        raise AudioError("empty: no samples")
    _check_levels(samples)
    return (_mono(samples) if samples.ndim == 2 else samples), int(rate)


def stated_seconds(audio: Mapping[str, Any]) -> float | None:
    """Return the seconds that the header of a file states, as libsndfile reads it; None if it states none.

    Args:
        audio: see `decode_audio`, without an array.
    """
    try:
        info = soundfile.info(audio["path"] if audio.get("bytes") is None else io.BytesIO(audio["bytes"]))
    except (soundfile.LibsndfileError, OSError, TypeError):
        return None
    return info.frames / info.samplerate if 0 < info.frames < UNKNOWN_FRAMES else None


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample the result of `read_audio` to 16 kHz.

    The samples are those of `librosa.resample`, which calls soxr too, but takes 8 s to import what it needs, and 30 s
    after an installation.
    """
    if rate == SAMPLING_RATE:
        return samples
    length = math.ceil(len(samples) * (SAMPLING_RATE / rate))
    resampled = soxr.resample(samples, rate, SAMPLING_RATE, quality="soxr_hq")[:length]
    return np.pad(resampled, (0, length - len(resampled)))


def silence(samples: np.ndarray) -> str:
    """Return the reason why the result of `read_audio` is silent, or "" if it isn't."""
    lowest, highest = samples.min(), samples.max()
    return f"silent: every sample is {lowest:g}" if lowest == highest else ""


def _from_array(values: Any) -> np.ndarray:
    """Return float32 `(samples,)` or `(samples, channels)`. The shorter axis is taken for the channels."""
    try:
        samples = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of different lengths, or a GPU tensor
        raise AudioError(f"not an array of samples: {error}") from None
    if samples.dtype.kind not in "iuf":
        raise AudioError(f"not an array of samples: its dtype is {samples.dtype}")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and min(samples.shape) > MAX_CHANNELS):
        raise AudioError(f"not an array of samples: its shape is {samples.shape}, not (samples, channels)")
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    return as_float(samples)


def _check_levels(samples: np.ndarray) -> None:
    """Raise `AudioError` if the samples aren't finite or aren't scaled to [-1, 1]."""
    lowest, highest = float(samples.min()), float(samples.max())
    if not math.isfinite(lowest + highest):
        raise AudioError("NaN or infinite samples")
    peak = max(-lowest, highest)
    if peak > MAX_PEAK or (peak > 1.0 and np.array_equal(samples, np.rint(samples))):
        raise AudioError(f"samples must be between -1 and 1: the peak is {peak:.0f}, like that of unscaled integers")


def _mono(samples: np.ndarray) -> np.ndarray:
    """Return the mean of the channels. Raise `AudioError` if they cancel out."""
    mono, channels = samples.mean(axis=1), samples.shape[1]
    if channels > 1:
        mono_energy, energy = float(mono.var()), float(samples.var(axis=0).mean())
        if channels * mono_energy < MIN_MONO_ENERGY * energy:
            which = "left and right" if channels == 2 else f"{channels} channels"
            raise AudioError(
                f"{which} cancel out: their mean has {mono_energy / energy:.1%} of the energy; keep only one of them"
            )
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
        # checked before opening: a pipe would block forever, and /dev/zero has no end
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise AudioError("unreadable file: not a regular file but a pipe or device")
        if status.st_size > MAX_BYTES:
            raise AudioError(f"too large: {status.st_size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:g} GiB")
        return path.read_bytes()
    except AudioError:
        raise
    except FileNotFoundError:
        raise AudioError("missing file") from None
    except OSError as error:
        raise AudioError(f"unreadable file: {error.strerror}") from None
    except ValueError as error:  # a null byte in the path
        raise AudioError(f"unreadable file: {error}") from None
