"""Each effect measured on the samples, and what a clip becomes: a function of the clip and its draw alone."""

import multiprocessing
import pickle
import random
import re
import sys

import numpy as np
import pytest
import soundfile
from speech import RATE, encoded, noise, tone
from torch.utils.data import DataLoader, Dataset
from transformers import WhisperFeatureExtractor

from askd_hf.arguments.augment import AUGMENTATIONS, GAIN_DB, SNR_DB, SPEED, AugmentArguments
from askd_hf.data.audio import extract_features
from askd_hf.data.augment import Augmenter
from askd_hf.data.degradations import impulse_response, reverberate
from askd_hf.errors import UserError

KEYS = [(3, epoch, row) for epoch in range(2) for row in range(20)]


def augmenter(*effects: str, p: float = 1.0, **changes) -> Augmenter:
    max_samples = changes.pop("max_samples", 30 * RATE)
    return Augmenter(AugmentArguments(augmentations=list(effects), augment_probability=p, **changes), max_samples)


def rms_db(wave: np.ndarray) -> float:
    return 10 * np.log10(np.mean(wave.astype(np.float64) ** 2))


@pytest.fixture
def noises(tmp_path):
    """Three recordings: one long, one short, one at another rate in a subdirectory."""
    (tmp_path / "more").mkdir()
    for name, seconds, rate in (("a.wav", 3.0, RATE), ("b.flac", 0.3, RATE), ("more/c.ogg", 2.0, 22_050)):
        soundfile.write(tmp_path / name, noise(seconds, rate), rate)
    return tmp_path


# ---- a function of the clip and its key ----


class Waves(Dataset):
    """One clip augmented with every key, in a process that uses its own random numbers in between."""

    def __init__(self, augment: Augmenter):
        self.augment, self.wave = augment, tone(seconds=0.4)

    def __len__(self) -> int:
        return len(KEYS)

    def __getitem__(self, i: int) -> np.ndarray:
        random.random()
        return self.augment(self.wave, KEYS[i])[0]


def test_a_key_gives_the_same_samples_and_another_key_others(noises):
    first, second = (augmenter(*AUGMENTATIONS, noise_dir=str(noises)) for _ in range(2))
    waves = [first(tone(), rng_key)[0] for rng_key in KEYS]
    for i in reversed(range(len(KEYS))):  # by an object without that past, in another order
        np.testing.assert_array_equal(second(tone(), KEYS[i])[0], waves[i])
    different = {wave.tobytes() for wave in waves}
    assert len(different) == len(KEYS)


def test_one_that_was_pickled_gives_the_same(noises):
    original = augmenter(*AUGMENTATIONS, noise_dir=str(noises))
    expected = [original(tone(), rng_key)[0] for rng_key in KEYS]
    copy = pickle.loads(pickle.dumps(original))
    for rng_key, wave in zip(KEYS, expected, strict=True):
        np.testing.assert_array_equal(copy(tone(), rng_key)[0], wave)


@pytest.mark.parametrize(("start_method", "workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_worker_processes_give_the_same(noises, start_method, workers):
    waves = Waves(augmenter(*AUGMENTATIONS, p=0.5, noise_dir=str(noises)))
    loader = DataLoader(
        waves,
        batch_size=3,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context(start_method),
    )
    expected = [waves[i] for i in range(len(waves))]
    for got, wave in zip((wave for batch in loader for wave in batch), expected, strict=True):
        np.testing.assert_array_equal(got, wave)


def test_the_global_random_states_decide_nothing_and_are_left_as_they_were():
    augment = augmenter(*AUGMENTATIONS)
    expected, _ = augment(tone(), (1, 2, 3))
    random.seed(99)
    np.random.seed(99)
    states = random.getstate(), np.random.get_state()
    np.testing.assert_array_equal(augment(tone(), (1, 2, 3))[0], expected)
    assert random.getstate() == states[0]
    for now, before in zip(np.random.get_state(), states[1], strict=True):
        np.testing.assert_array_equal(now, before)
    with pytest.raises(ZeroDivisionError):  # also after an error
        augment(np.zeros(0, np.float32), (1, 2, 3))
    assert random.getstate() == states[0]


def test_each_effect_comes_as_often_as_asked():
    unchanged = tone(seconds=0.2)
    for effect in AUGMENTATIONS:
        augment = augmenter(effect, p=0.3)
        waves = [augment(unchanged, (0, 0, row))[0] for row in range(300)]
        changed = sum(not np.array_equal(wave, unchanged) for wave in waves)
        assert 60 < changed < 120, effect  # 90 expected, by 8 either way


# ---- the effects ----


@pytest.mark.parametrize("recorded", [False, True])
def test_noise_has_its_distance_from_the_speech(noises, recorded):
    augment = augmenter("noise", noise_dir=str(noises) if recorded else None)
    clip = tone(seconds=1.0)
    distances = []
    for rng_key in KEYS:
        noisy, time_factor = augment(clip, rng_key)
        assert time_factor == 1.0 and noisy.shape == clip.shape
        distances.append(rms_db(clip) - rms_db(noisy - clip))
    # of a recording that is repeated, only the piece has exactly the level
    assert SNR_DB[0] - 0.2 < min(distances) < SNR_DB[0] + 5 and SNR_DB[1] - 5 < max(distances) < SNR_DB[1] + 0.2


@pytest.mark.parametrize("recorded", [False, True])
def test_noise_reaches_the_lowest_ratio_that_is_asked(noises, recorded):
    augment = augmenter("noise", noise_dir=str(noises) if recorded else None, snr_db=[0.0, 0.0])
    clip = 0.1 * tone(seconds=1.0)
    for rng_key in KEYS[:10]:
        assert rms_db(clip) - rms_db(augment(clip, rng_key)[0] - clip) == pytest.approx(0.0, abs=0.2)


def test_a_room_decays_as_it_should_and_moves_nothing():
    rng = np.random.default_rng(0)
    response = impulse_response(0.5, 3.0, rng)
    direct, tail = response[0], response[1:]
    assert 10 * np.log10(direct**2 / (tail**2).sum()) == pytest.approx(3.0)
    energy = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1] / (tail**2).sum())  # Schroeder's integral
    fall = [np.argmax(energy < level) / RATE for level in (-5, -25)]
    assert 3 * (fall[1] - fall[0]) == pytest.approx(0.5, rel=0.1)
    clip = (0.1 * rng.standard_normal(RATE)).astype(np.float32)
    wet = reverberate(clip, 0.5, 3.0, np.random.default_rng(1))
    assert wet.shape == clip.shape and wet.dtype == np.float32 and rms_db(wet) == pytest.approx(rms_db(clip), abs=1e-4)
    expected = np.convolve(clip, impulse_response(0.5, 3.0, np.random.default_rng(1)))[: len(clip)]
    np.testing.assert_allclose(wet / wet.std(), expected / expected.std(), atol=1e-4)
    correlation = np.fft.irfft(np.fft.rfft(wet, 2 * RATE) * np.fft.rfft(clip, 2 * RATE).conj())
    assert np.abs(correlation).argmax() == 0


def test_all_noises_of_the_folder_are_used_and_nothing_else(noises):
    (noises / "a.wav").write_bytes(encoded(tone(1000.0, 3.0)))
    (noises / "b.flac").write_bytes(encoded(tone(2000.0, 0.3), container="FLAC"))
    (noises / "more" / "c.ogg").write_bytes(encoded(tone(3000.0, 2.0, 22_050), 22_050, "OGG"))
    (noises / "notes.txt").write_text("not audio")
    augment = augmenter("noise", noise_dir=str(noises))
    clip = tone(seconds=1.0)
    peaks = [np.abs(np.fft.rfft(augment(clip, rng_key)[0] - clip)).argmax() for rng_key in KEYS]  # in Hz
    assert {round(peak, -2) for peak in peaks} == {1000, 2000, 3000}


def test_gain_is_within_its_range_and_changes_nothing_else():
    augment = augmenter("gain")
    clip = tone()
    gains = []
    for rng_key in KEYS:
        louder, time_factor = augment(clip, rng_key)
        gains.append(rms_db(louder) - rms_db(clip))
        np.testing.assert_allclose(louder, clip * 10 ** (gains[-1] / 20), atol=1e-6)
        assert time_factor == 1.0
    assert GAIN_DB[0] <= min(gains) < GAIN_DB[0] + 3 and GAIN_DB[1] - 3 < max(gains) <= GAIN_DB[1]


def test_speed_changes_duration_and_pitch_by_the_time_factor():
    augment = augmenter("speed")
    clip = tone(440.0, seconds=2.0)
    factors = []
    for rng_key in KEYS:
        wave, time_factor = augment(clip, rng_key)
        assert time_factor == len(wave) / len(clip)
        pitch = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax() * RATE / len(wave)
        assert pitch == pytest.approx(440.0 / time_factor, abs=0.6)
        factors.append(time_factor)
    assert 1 / SPEED[1] <= min(factors) < 0.94 and 1.06 < max(factors) <= 1 / SPEED[0] + 1e-3


def test_a_time_in_the_clip_times_the_factor_is_where_it_is_now():
    clip = np.zeros(2 * RATE, np.float32)
    clip[int(1.5 * RATE)] = 0.5  # a click after 1.5 s
    for rng_key in KEYS:
        wave, time_factor = augmenter("speed", "noise", "codec")(clip, rng_key)
        assert np.abs(wave).argmax() / RATE == pytest.approx(1.5 * time_factor, abs=0.002)


def test_the_codec_keeps_length_and_timing_and_loses_something():
    rng = np.random.default_rng(0)
    clip = (0.1 * rng.standard_normal(RATE) * np.hanning(RATE)).astype(np.float32)
    for rng_key in KEYS:
        wave, time_factor = augmenter("codec")(clip, rng_key)
        assert wave.shape == clip.shape and time_factor == 1.0
        assert rms_db(wave - clip) - rms_db(clip) > -30
        correlation = np.fft.irfft(np.fft.rfft(wave, 2 * RATE) * np.fft.rfft(clip, 2 * RATE).conj())
        assert correlation.argmax() == 0 and correlation[0] > 0.3 * (clip**2).sum()


# ---- what the result is ----


def test_a_clip_never_outgrows_the_window():
    clip = tone(seconds=1.0)
    factors = {seconds: [] for seconds in (1.0, 1.05, 2.0)}
    for seconds, collected in factors.items():
        augment = augmenter(*AUGMENTATIONS, max_samples=round(seconds * RATE))
        for rng_key in KEYS:
            wave, time_factor = augment(clip, rng_key)
            assert len(wave) <= seconds * RATE and len(wave) == time_factor * RATE
            collected.append(time_factor)
    # only what would have been longer than the window stays as long as it was
    for seconds, collected in factors.items():
        assert collected == [factor if factor <= seconds else 1.0 for factor in factors[2.0]]
    assert 1.0 < max(factors[1.05]) <= 1.05 < max(factors[2.0])


@pytest.mark.parametrize(
    "clip",
    [
        np.zeros(RATE, np.float32),
        np.zeros(1, np.float32),
        np.ones(2, np.float32),
        np.full(1599, -0.5, np.float32),
        np.full(1600, 1.0, np.float32),
        np.sign(tone(100.0, 0.3)),
        (3.0 * noise(0.2)).astype(np.float32),
    ],
    ids=["silence", "one sample", "two samples", "too short for MP3", "just long enough", "full scale", "beyond it"],
)
def test_any_clip_becomes_a_sound_one(noises, clip):
    before = clip.copy()
    for folder in (None, str(noises)):
        augment = augmenter(*AUGMENTATIONS, noise_dir=folder)
        for rng_key in KEYS[:15]:
            wave, time_factor = augment(clip, rng_key)
            assert wave.dtype == np.float32 and wave.ndim == 1 and len(wave) > 0 and time_factor > 0
            assert np.isfinite(wave).all() and np.abs(wave).max() <= 1.0
    np.testing.assert_array_equal(clip, before)


def test_what_goes_beyond_full_scale_is_clipped_and_the_rest_is_not():
    augment = augmenter("gain")
    clip = (tone() / 0.3 * 0.9).astype(np.float32)
    clipped = 0
    for rng_key in KEYS:
        ratio = np.median(augment(0.1 * clip, rng_key)[0][1:] / (0.1 * clip)[1:])
        wave, _ = augment(clip, rng_key)
        np.testing.assert_allclose(wave, np.clip(ratio * clip, -1.0, 1.0), atol=1e-5)
        clipped += ratio * 0.9 > 1.0
    assert 5 < clipped < len(KEYS) - 5


def test_whisper_takes_the_result():
    extractor = WhisperFeatureExtractor()
    waves = [augmenter(*AUGMENTATIONS)(tone(seconds=29.9), rng_key)[0] for rng_key in KEYS[:2]]
    features = extract_features(extractor, waves)["input_features"]
    assert features.shape == (2, 80, 3000) and features.isfinite().all()


# ---- what a user can get wrong ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(augmentations=["echo"]),
            "--augmentations must be among speed, reverb, noise, gain, codec, got 'echo'",
        ),
        (
            dict(augmentations=["gain"], augment_probability=0.0),
            r"--augment_probability must be above 0 and at most 1, got 0\.0",
        ),
        (
            dict(augmentations=["gain"], augment_probability=1.5),
            r"--augment_probability must be above 0 and at most 1, got 1\.5",
        ),
        (dict(augmentations=["gain"], noise_dir="rain"), "--noise_dir requires --augmentations noise"),
        (dict(augmentations=["gain"], snr_db=[0.0, 9.0]), "--snr_db requires --augmentations noise"),
        (dict(augmentations=["noise"], snr_db=[9.0, 0.0]), "--snr_db must be two numbers, the lowest first"),
        (dict(augmentations=["noise"], snr_db=[9.0]), "--snr_db must be two numbers, .*got 9"),
        (dict(augment_teacher=True), "--augment_teacher True requires --augmentations"),
        (dict(augment_probability=0.9), "--augment_probability requires --augmentations"),
    ],
    ids=[
        *("effect", "never", "more than always", "unused noise", "unused SNR", "order", "one SNR", "unused teacher"),
        "unused probability",
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AugmentArguments(**options)


@pytest.mark.parametrize("missing", ["audiomentations", "fast_mp3_augment"])
def test_a_missing_library_is_said_with_the_extra_that_has_it(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{missing}.*pip install 'askd-hf\[augment\]'"):
        augmenter("gain")


def test_noise_that_cannot_be_used_is_named_before_training(tmp_path):
    (tmp_path / "._rain.wav").write_bytes(b"hidden, as macOS writes them")
    for folder, problem in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "no audio files .*flac, .*wav")):
        with pytest.raises(UserError, match=rf"--noise_dir {re.escape(str(folder))}: {problem}"):
            augmenter("noise", noise_dir=str(folder))
    whole = encoded(noise(2.0), container="FLAC")
    for content, problem in (
        (b"not audio", "can't be read"),
        (encoded(np.zeros(0, np.float32)), "empty or truncated"),
        (whole[: len(whole) // 2], "can't be read|empty or truncated"),
        (encoded(np.zeros(100, np.float32)), "silent"),
        (encoded(np.array([0.1, np.nan, 0.2], np.float32), subtype="FLOAT"), "NaN or infinite samples"),
    ):
        (tmp_path / "rain.flac").write_bytes(content)
        with pytest.raises(UserError, match=rf"rain\.flac: ({problem})"):
            augmenter("noise", noise_dir=str(tmp_path))
    (tmp_path / "rain.flac").write_bytes(whole)
    augmenter("noise", noise_dir=str(tmp_path))
    (tmp_path / "rain.au").write_bytes(encoded(noise(2.0), container="AU"))
    with pytest.raises(UserError, match=r"rain\.au: must be one of .*\.wav: convert it to WAV or FLAC"):
        augmenter("noise", noise_dir=str(tmp_path))
