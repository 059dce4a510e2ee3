"""Decoding, against tones of known frequency and length."""

import numpy as np
import pytest
import soundfile
from speech_files import RATE, encoded, noise, tone

from askd_hf.data import AudioError, decode_audio


def peak_hertz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.fft.rfftfreq(len(samples), 1 / RATE)[spectrum.argmax()])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(1000, 1.3, rate), rate, subtype="FLOAT")
    samples = decode_audio({"path": str(tmp_path / "a.wav"), "bytes": None})
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) - 1.3 * RATE) <= 1
    assert peak_hertz(samples) == pytest.approx(1000, abs=1)
    middle = samples[RATE // 4 : RATE]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.3 / np.sqrt(2), rel=1e-3)


def test_resampling_lets_nothing_alias():
    above_nyquist = decode_audio({"path": None, "bytes": encoded(tone(15_000, 1, 48_000), 48_000)})
    assert np.abs(above_nyquist[1000:-1000]).max() < 1e-3


def test_stereo_is_averaged():
    left, right = tone(300), tone(700)
    stereo = encoded(np.stack([left, right], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(decode_audio({"path": None, "bytes": stereo}), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("container, tolerance", [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_formats(container, tolerance):
    samples = decode_audio({"path": None, "bytes": encoded(tone(440, 1), container=container)})
    assert len(samples) == RATE
    assert peak_hertz(samples) == pytest.approx(440, abs=1)
    assert np.abs(samples[2000:-2000] - tone(440, 1)[2000:-2000]).max() < tolerance


def test_bytes_come_before_path_and_arrays_are_taken():
    np.testing.assert_allclose(
        decode_audio({"path": "nowhere.wav", "bytes": encoded(tone(), subtype="FLOAT")}), tone(), atol=1e-6
    )
    np.testing.assert_array_equal(decode_audio({"array": tone(), "sampling_rate": RATE}), tone())


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU"])
@pytest.mark.parametrize("kept", [0.95, 0.5])
def test_truncated_files_are_found(container, kept):
    content = encoded(noise(3), container=container)
    assert len(decode_audio({"path": None, "bytes": content})) == 3 * RATE
    with pytest.raises(AudioError, match="truncated"):
        decode_audio({"path": None, "bytes": content[: int(kept * len(content))]})


def test_hole_in_an_ogg_file_is_found():
    content = bytearray(encoded(noise(3), container="OGG"))
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    with pytest.raises(AudioError, match=r"truncated or corrupt: .* of 48000 samples"):
        decode_audio({"path": None, "bytes": bytes(content)})


def test_wav_from_a_pipe_is_whole():
    """ffmpeg and sox write this size when they can't go back to correct it."""
    content = bytearray(encoded(noise()))
    content[40:44] = b"\xff\xff\xff\xff"
    assert len(decode_audio({"path": None, "bytes": bytes(content)})) == RATE


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (encoded(tone()[:0]), "empty"),
        (b"this is no audio" * 100, "not an audio file"),
        (encoded(np.array([0.1, np.nan, 0.1]), subtype="FLOAT"), "NaN"),
        (encoded(np.array([0.1, np.inf, 0.1]), subtype="FLOAT"), "NaN or infinite"),
    ],
    ids=["no bytes", "no samples", "text", "NaN", "infinite"],
)
def test_useless_content(content, reason):
    with pytest.raises(AudioError, match=reason):
        decode_audio({"path": None, "bytes": content})


def test_missing(tmp_path):
    with pytest.raises(AudioError, match="missing file"):
        decode_audio({"path": str(tmp_path / "gone.wav"), "bytes": None})
    with pytest.raises(AudioError, match="unreadable file: Is a directory"):
        decode_audio({"path": str(tmp_path), "bytes": None})
    for nothing in (None, {"path": None, "bytes": None}):
        with pytest.raises(AudioError, match="no audio"):
            decode_audio(nothing)
