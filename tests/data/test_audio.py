"""Decoding, against tones of known frequency and length."""

import numpy as np
import pytest
import soundfile
from speech import RATE, encoded, noise, tone

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


def as_array(samples, rate=RATE) -> np.ndarray:
    return decode_audio({"array": samples, "sampling_rate": rate})


@pytest.mark.parametrize("dtype, zero, scale", [("int8", 0, 128), ("uint8", 128, 128), ("int16", 0, 32768)])
def test_integers_are_scaled_by_their_dtype(dtype, zero, scale):
    wave = tone()
    integers = np.round(wave * scale + zero).astype(dtype)
    np.testing.assert_allclose(as_array(integers), wave, atol=1 / scale)
    np.testing.assert_allclose(as_array((wave * 2**31).astype(np.int32)), wave, atol=1e-6)


@pytest.mark.parametrize("samples", [32768 * tone(), (32768 * tone()).astype(np.int64), 9.0 * tone() / 0.3])
def test_samples_of_another_scale_are_named(samples):
    peak = np.abs(samples).max()
    for given in (samples, samples.tolist()):
        with pytest.raises(AudioError, match=f"samples must be between -1 and 1: the peak is {peak:.0f}"):
            as_array(given)
    with pytest.raises(AudioError, match="samples must be between -1 and 1"):
        decode_audio({"path": None, "bytes": encoded(samples.astype(np.float32), subtype="FLOAT")})
    with pytest.raises(
        AudioError, match="samples must be between -1 and 1: the peak is 3,"
    ):  # whole numbers, but soft
        as_array(np.round(10 * tone()))


def test_a_codec_may_overshoot():
    assert np.abs(as_array(5 * tone())).max() == pytest.approx(1.5, abs=0.01)


def test_channels_are_the_shorter_axis():
    left, right = tone(300), tone(700)
    for samples in (np.stack([left, right]), np.stack([left, right], axis=1)):
        np.testing.assert_allclose(as_array(samples), (left + right) / 2, atol=1e-6)
    np.testing.assert_allclose(as_array([left.tolist()]), left)
    for odd in (np.zeros((300, 400)), np.zeros((2, 2, 9)), np.array(0.5), [[0.1], [0.2, 0.3]], ["a"], [True, False]):
        with pytest.raises(AudioError, match="not an array of samples"):
            as_array(odd)


@pytest.mark.parametrize("rate", [0, 1, -16_000, 10_000_000, None, "16000"])
def test_impossible_rates(rate):
    with pytest.raises(AudioError, match="impossible sampling rate"):
        as_array(tone(), rate)


def test_channels_that_cancel_out_are_named():
    wave, other, rest = tone(), tone(700), 0.003 * noise(0.5)
    for channels in ([wave, -wave], [wave, rest - wave], [wave, -0.9 * wave], [wave + 0.5, 0.5 - wave]):
        with pytest.raises(AudioError, match="left and right cancel out: "):
            decode_audio({"path": None, "bytes": encoded(np.stack(channels, axis=1))})
    with pytest.raises(AudioError, match="4 channels cancel out: "):
        as_array([wave, -wave, other, -other])
    silent = 0 * wave
    for channels in ([wave, silent], [wave, other], [wave] + 7 * [silent], [silent, silent], [wave, wave]):
        np.testing.assert_allclose(as_array(channels), np.mean(channels, axis=0), atol=1e-6)
