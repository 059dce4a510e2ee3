"""Make clean speech noisy, reverberant, or that of a telephone."""

import io

import numpy as np
import soundfile
import soxr

from .audio import SAMPLING_RATE

PREDELAY = 0.003  # seconds between the direct sound and the reverberation
TELEPHONE_RATE = 8_000


def rms(wave: np.ndarray) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))


def add_noise(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Return the sum of the wave and the noise at this signal-to-noise ratio over the whole clip.

    Args:
        wave, noise: float32 `(samples,)`, of the same length, not silent.

    Returns:
        float32 `(samples,)`, which can exceed 1.
    """
    gain = rms(wave) / rms(noise) * 10 ** (-snr_db / 20)
    return (wave + gain * noise).astype(np.float32)


def reverberate(wave: np.ndarray, seconds: float, direct_db: float, rng: np.random.Generator) -> np.ndarray:
    """Return the wave in a synthetic room: the direct sound, and exponentially decaying noise behind it.

    Args:
        wave: float32 `(samples,)` at 16 kHz.
        seconds: time in which the reverberation falls by 60 dB.
        direct_db: energy of the direct sound over that of the reverberation, in dB.

    Returns:
        float32 `(samples,)` of the same length, time and RMS. It can exceed 1.
    """
    response = impulse_response(seconds, direct_db, rng)
    size = 1 << (len(wave) + len(response) - 2).bit_length()  # a power of 2, no less than the convolution's length
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
    level = rms(wet)
    return (wet * (rms(wave) / level) if level else wet).astype(np.float32)


def impulse_response(seconds: float, direct_db: float, rng: np.random.Generator) -> np.ndarray:
    """Return the response of a room, float64 `(samples,)`: 1 at time 0, and the reverberation. See `reverberate`."""
    time = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / seconds)
    tail *= 10 ** (-direct_db / 20) / np.sqrt((tail**2).sum())
    return np.concatenate([[1.0], np.zeros(round(PREDELAY * SAMPLING_RATE)), tail])


def telephone(wave: np.ndarray) -> np.ndarray:
    """Return the wave after GSM 06.10 at 8 kHz, float32 `(samples,)` of the same length at 16 kHz.

    Args:
        wave: float32 `(samples,)` at 16 kHz, between -1 and 1.
    """
    coded = io.BytesIO()
    narrow = soxr.resample(wave, SAMPLING_RATE, TELEPHONE_RATE)
    soundfile.write(coded, np.clip(narrow, -1.0, 1.0), TELEPHONE_RATE, format="WAV", subtype="GSM610")
    coded.seek(0)
    decoded, _ = soundfile.read(coded, dtype="float32")
    wide = soxr.resample(decoded, TELEPHONE_RATE, SAMPLING_RATE)[: len(wave)]
    return np.pad(wide, (0, len(wave) - len(wide))).astype(np.float32)
