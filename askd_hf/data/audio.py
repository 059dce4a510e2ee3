"""Audio files to waveforms."""

import io
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from ..errors import UserError

SAMPLING_RATE = 16_000

# A size that a program wrote before it knew the length, because its output was a pipe: 0xFFFFFFFF or close to 2^31.
UNKNOWN_SIZE = 0x7FFFF000
# The length of an MP3 is an estimate; its encoder's delay and padding come to at most two frames.
MP3_SLACK = 2 * 1152
UNKNOWN_FORMAT = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
MAX_BYTES = 4 * 2**30  # of a file: what WAV can hold, six hours of 24 bits in stereo at 32 kHz
ADVICE = "convert it to wav, flac, ogg or mp3"


class AudioError(ValueError):
    """A clip that can't be used; the message is a short reason without the clip's name."""


def decode_audio(audio: Mapping[str, Any] | None) -> np.ndarray:
    """A clip as float32 mono at 16 kHz, shape `(samples,)`.

    Args:
        audio: `{"path": str | None, "bytes": bytes | None}`, the bytes before the path; or
            `{"array": (samples,) or (samples, channels), "sampling_rate": int}`.

    Raises:
        AudioError: no such file, not audio, corrupt, truncated, empty, or with NaN or infinite samples.
    """
    samples, rate = read_audio(audio)
    if rate == SAMPLING_RATE:
        return samples
    return librosa.resample(samples, orig_sr=rate, target_sr=SAMPLING_RATE, res_type="soxr_hq")


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
        samples, rate = np.asarray(audio["array"], dtype=np.float32), int(audio["sampling_rate"])
    else:
        samples, rate = _decode(_file_bytes(audio))
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if len(samples) == 0:
        raise AudioError("empty: no samples")
    if not np.isfinite(samples).all():
        raise AudioError("NaN or infinite samples")
    return samples, rate


def _file_bytes(audio: Mapping[str, Any]) -> bytes:
    content = audio.get("bytes")
    if content is None:
        if not audio.get("path"):
            raise AudioError("no audio")
        if "\0" in audio["path"]:
            raise AudioError("unreadable file: a zero byte in its name")
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


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            samples, rate, promised = file.read(dtype="float32"), file.samplerate, file.frames
            _check_complete(content, file.format, file.extra_info, len(samples), promised)
    except soundfile.LibsndfileError as error:
        if error.code == UNKNOWN_FORMAT:
            raise AudioError(f"not an audio file, or of an unknown format: {ADVICE}") from None
        raise AudioError(f"corrupt or truncated: {error.error_string}") from None
    return samples, rate


def _check_complete(content: bytes, container: str, header_log: str, decoded: int, promised: int) -> None:
    """Raise `AudioError` if the file ends before its header, or its container, says it does.

    libsndfile raises by itself only for FLAC. It silently shortens the rest, and says so for WAV, AIFF and AU in its
    log of the header: `data : 96000 (should be 47978)`.
    """
    if promised - decoded > (MP3_SLACK if container == "MP3" else 0):
        raise AudioError(f"truncated or corrupt: {decoded} of {promised} samples can be decoded")
    for size, present in re.findall(r"(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", header_log):
        if int(present) < int(size) < UNKNOWN_SIZE:
            raise AudioError(f"truncated: {present} of {size} bytes of audio are there")
    if container == "OGG" and not _ends_with_last_page(content):
        raise AudioError("truncated: the last page of the Ogg stream is missing")


def _ends_with_last_page(content: bytes) -> bool:
    """Whether an Ogg file ends with a whole page that is flagged as the end of the stream (RFC 3533, section 6)."""
    start = content.rfind(b"OggS")
    if start < 0 or len(content) < start + 27:
        return False
    segments = content[start + 26]
    lengths = content[start + 27 : start + 27 + segments]
    return bool(content[start + 5] & 4) and start + 27 + segments + sum(lengths) <= len(content)
