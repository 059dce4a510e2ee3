"""Clips without speech, measured, and through all that training does with a clip."""

import io

import numpy as np
import pytest
import soundfile
from datasets import Audio, concatenate_datasets
from models import END, NO_TIMESTAMPS, START, tiny_processor
from speech import RATE, audiofolder
from transformers import WhisperConfig

from askd_hf.data import SpeechCollator, decode_audio, load_speech_dataset
from askd_hf.data.no_speech import as_no_speech, synthetic_no_speech


@pytest.fixture(scope="module")
def no_speech_dataset():
    return synthetic_no_speech(64)


def sounds(dataset, kind: str) -> list[np.ndarray]:
    return [decode_audio(row["audio"]) for row in dataset if row["clip"].startswith(kind)]


def test_they_are_rows_of_speech_with_an_empty_text(no_speech_dataset, tmp_path):
    assert no_speech_dataset.column_names == ["audio", "text", "clip", "no_speech"] and len(no_speech_dataset) == 64
    assert no_speech_dataset.features["audio"] == Audio(decode=False)
    assert set(no_speech_dataset["text"]) == {""}
    assert no_speech_dataset["clip"][:5] == ["silence-00", "white-noise-00", "pink-noise-00", "hum-00", "silence-01"]
    assert len(set(no_speech_dataset["clip"])) == 64
    speech = load_speech_dataset(str(audiofolder(tmp_path, ["ab"])), None, "train")
    together = concatenate_datasets([speech, no_speech_dataset.select(range(2))])
    batch = SpeechCollator(tiny_processor(), WhisperConfig(decoder_start_token_id=START))(list(together))
    assert batch["labels"].tolist() == [
        [NO_TIMESTAMPS, 3, 0, 1, END],  # 3 is the space
        [NO_TIMESTAMPS, END, -100, -100, -100],
        [NO_TIMESTAMPS, END, -100, -100, -100],
    ]
    assert batch["input_features"].shape == (3, 8, 100) and batch["input_features"].isfinite().all()


def test_they_are_the_same_every_time_and_by_seed_others(no_speech_dataset):
    assert synthetic_no_speech(15)[:] == no_speech_dataset[:15]  # whatever their number
    for ours, other in zip(no_speech_dataset.select(range(8)), synthetic_no_speech(8, seed=1), strict=True):
        assert len(decode_audio(ours["audio"])) != len(decode_audio(other["audio"]))


def test_lengths_and_levels_cover_their_ranges(no_speech_dataset):
    lengths, levels = [], []
    for row in no_speech_dataset:
        with soundfile.SoundFile(io.BytesIO(row["audio"]["bytes"])) as file:
            assert (file.format, file.samplerate, file.channels) == ("FLAC", RATE, 1)
        sound = decode_audio(row["audio"])
        lengths.append(len(sound) / RATE)
        if not row["clip"].startswith("silence"):
            levels.append(10 * np.log10(np.mean(sound**2)))
    assert 1.0 <= min(lengths) < 4.0 and 27.0 < max(lengths) <= 30.0
    assert -70.5 < min(levels) < -65.0 and -25.0 < max(levels) < -19.5
    short = [len(decode_audio(row["audio"])) / RATE for row in synthetic_no_speech(16, max_duration_in_seconds=3.0)]
    assert 0.1 <= min(short) < max(short) <= 3.0


def power_of_octaves(sound: np.ndarray) -> np.ndarray:
    """In dB, of 125 to 250 Hz, 250 to 500 Hz and so on up to 8 kHz."""
    power = np.abs(np.fft.rfft(sound)) ** 2
    hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
    return 10 * np.log10([power[(hertz >= f) & (hertz < 2 * f)].sum() for f in 125 * 2 ** np.arange(6)])


def test_every_kind_sounds_as_it_is_called(no_speech_dataset):
    assert all(not sound.any() for sound in sounds(no_speech_dataset, "silence"))
    for kind, rise in (("white-noise", 10 * np.log10(2)), ("pink-noise", 0.0)):  # dB from octave to octave
        for sound in sounds(no_speech_dataset, kind):
            assert np.diff(power_of_octaves(sound)).mean() == pytest.approx(rise, abs=0.3), kind
    mains = set()
    for sound in sounds(no_speech_dataset, "hum"):
        power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
        of = {
            f: sum(power[np.abs(hertz - n * f) < 3].sum() for n in range(1, 9)) / power[hertz > 10].sum()
            for f in (50, 60)
        }
        mains.add(max(of, key=of.get))
        assert max(of.values()) > 0.99
    assert mains == {50, 60}


def test_any_dataset_becomes_one_without_speech(tmp_path):
    speech = load_speech_dataset(str(audiofolder(tmp_path, ["ab", "c"])), None, "train")
    speech = speech.add_column("language", ["en", "fr"]).add_column("prompt", ["before", None])
    speech = speech.add_column("segments", [[{"start": 0.0, "end": 0.5, "text": "ab"}], None])
    no_speech_dataset = as_no_speech(speech)
    assert no_speech_dataset.column_names == ["audio", "clip", "speaker", "text", "no_speech"]
    assert no_speech_dataset["text"][:] == ["", ""] and no_speech_dataset["no_speech"][:] == [True, True]
    for name in ("audio", "clip", "speaker"):
        assert no_speech_dataset[name][:] == speech[name][:]
    assert speech["text"][:] == ["ab", "c"]
