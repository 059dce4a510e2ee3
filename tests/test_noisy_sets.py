"""Noisy copies of a test set: their ratios measured, their noises, and the plot of the error rates."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import soundfile
from report_page import results, scores, speech_set
from scripts import ROOT, run_here
from speech import RATE, noise, write_speech

from askd_hf.data import load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.evaluation.noise_figure import scores_by_condition, write_noise_figure

SCRIPT = ROOT / "examples" / "noisy_sets.py"
PLOT = ROOT / "examples" / "plot_noise.py"
SPLITS = ["clean", "snr20", "snr10", "snr5", "snr0", "reverb", "codec"]


@pytest.fixture
def place(tmp_path) -> Path:
    """Speech with a loud clip, and four noises, of which one is mostly silence."""
    write_speech(tmp_path / "speech" / "test", clips=4)
    loud = tmp_path / "speech" / "test" / "audio" / "000.wav"
    wave, _ = soundfile.read(loud)
    soundfile.write(loud, wave / np.abs(wave).max() * 0.999, RATE)
    (tmp_path / "noises" / "more").mkdir(parents=True)
    for number, name in enumerate(("a.wav", "b.flac", "c.ogg", "more/d.wav")):
        seconds = 0.2 + 0.3 * number
        wave = np.random.default_rng(number).standard_normal(round(seconds * RATE)) * 0.05
        wave[: len(wave) // 4] *= 30 if number == 0 else 1
        soundfile.write(tmp_path / "noises" / name, np.clip(wave, -1, 1), RATE)
    padded = np.concatenate([noise(0.3), np.zeros(2 * RATE), noise(0.01), np.zeros(RATE)])
    soundfile.write(tmp_path / "noises" / "b.flac", padded, RATE)
    return tmp_path


def made(monkeypatch, capsys, place: Path, output: str, *more) -> str:
    given = ("--dataset", place / "speech", "--noise_dir", place / "noises", "--output_dir", place / output, *more)
    status, out, err = run_here(monkeypatch, capsys, *given, file=SCRIPT)
    assert status == 0, err
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def waves(folder: Path) -> list[np.ndarray]:
    found = [soundfile.read(folder / row["file_name"]) for row in rows(folder)]
    assert all(rate == RATE for _, rate in found)
    return [wave for wave, _ in found]


def test_the_ratios_are_those_that_are_asked(monkeypatch, capsys, place):
    """Of the speech and the noise that a least-squares fit finds in the files."""
    out = made(monkeypatch, capsys, place, "noisy")
    assert f"--eval_splits {' '.join(SPLITS)}" in out
    clean, pieces = waves(place / "noisy" / "clean"), []
    for snr_db in (0, 5, 10, 20):  # at 0 dB the noise is known best
        folder = place / "noisy" / f"snr{snr_db}"
        assert {row["condition"] for row in rows(folder)} == {f"{snr_db} dB"}
        for number, (wave, speech) in enumerate(zip(waves(folder), clean, strict=True)):
            assert len(wave) == len(speech) and np.abs(wave).max() <= 1.0
            if snr_db == 0:
                # wave = gain * (speech + noise), with the gain 1 unless the peak was too high
                gain = 1.0
                if np.abs(wave).max() > 0.9999:
                    gain = wave @ wave / (2 * wave @ speech)  # at which both have the same power
                pieces.append(wave / gain - speech)
            fit, *_ = np.linalg.lstsq(np.stack([speech, pieces[number]], 1), wave, rcond=None)
            residual = wave - np.stack([speech, pieces[number]], 1) @ fit
            assert np.abs(residual).max() < 2e-4  # it is the same piece of noise at all ratios
            ratio = 20 * np.log10(fit[0] * rms(speech) / (fit[1] * rms(pieces[number])))
            assert ratio == pytest.approx(snr_db, abs=0.1)
    for number, piece in enumerate(pieces):
        assert rms(piece) == pytest.approx(rms(clean[number]), rel=0.01)


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave**2)))


def test_the_copies_are_loaded_as_splits_and_depend_on_the_seed_alone(monkeypatch, capsys, place):
    made(monkeypatch, capsys, place, "noisy")
    made(monkeypatch, capsys, place, "again")
    made(monkeypatch, capsys, place, "fewer", "--max_clips", 2, "--snr_db", 5)
    made(monkeypatch, capsys, place, "other", "--seed", 1)
    originals = load_speech_dataset(str(place / "speech"), None, "test")
    for split in SPLITS:
        loaded = load_speech_dataset(str(place / "noisy"), None, split)
        assert loaded["text"][:] == originals["text"][:] and loaded["source"][:] == originals["clip"][:]
        for ours, theirs in zip(waves(place / "noisy" / split), waves(place / "again" / split), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    by_source = dict(zip(originals["clip"], waves(place / "noisy" / "snr5"), strict=True))
    fewer = place / "fewer" / "snr5"
    assert len(rows(fewer)) == 2 and not (place / "fewer" / "snr0").exists()
    for row, wave in zip(rows(fewer), waves(fewer), strict=True):
        np.testing.assert_array_equal(wave, by_source[row["source"]])
    assert any((a != b).any() for a, b in zip(by_source.values(), waves(place / "other" / "snr5"), strict=True))


def test_the_telephone_has_no_high_frequencies_and_the_room_the_same_level(monkeypatch, capsys, place):
    for file in (place / "speech" / "test" / "audio").glob("*.wav"):  # noise has all frequencies
        soundfile.write(file, noise(0.5), RATE)
    made(monkeypatch, capsys, place, "noisy")
    for clean, room, codec in zip(
        *(waves(place / "noisy" / name) for name in ("clean", "reverb", "codec")), strict=True
    ):
        assert len(clean) == len(room) == len(codec)
        assert rms(room) == pytest.approx(rms(clean), rel=1e-3) and not np.allclose(room, clean, atol=0.01)
        spectrum = np.abs(np.fft.rfft(codec)) ** 2
        assert spectrum[int(len(spectrum) * 0.55) :].sum() < 1e-3 * spectrum.sum()  # above 4.4 of 8 kHz
        correlation = np.fft.irfft(np.fft.rfft(codec, 2 * RATE) * np.fft.rfft(clean, 2 * RATE).conj())
        assert abs((correlation.argmax() + RATE) % (2 * RATE) - RATE) <= 2


def test_test_noises_and_training_noises_are_different_files(monkeypatch, capsys, place):
    options = ("--noise_every", 2, "--training_noises", place / "training")
    made(monkeypatch, capsys, place, "noisy", *options)
    copied = {str(file.relative_to(place / "training")) for file in (place / "training").rglob("*") if file.is_file()}
    assert copied == {"b.flac", "more/d.wav"}
    assert {row["noise"] for row in rows(place / "noisy" / "snr5")} <= {"a.wav", "c.ogg"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--training_noises", "x"), "--training_noises requires --noise_every of at least 2"),
        (("--output_dir", "speech"), "--output_dir speech already exists"),
        (("--noise_dir", "nowhere"), "--noise_dir nowhere: no such directory"),
        (("--noise_dir", "silent"), "silent.wav: silent"),
        (("--noise_every", "5", "--noise_dir", "single", "--training_noises", "x"), "has one noise: none is left"),
        (("--split", "other"), "has no split 'other'"),
        (("--max_clips", "0"), "--max_clips must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, place, more, message):
    monkeypatch.chdir(place)
    (place / "silent").mkdir()
    soundfile.write(place / "silent" / "silent.wav", np.zeros(RATE), RATE)
    (place / "single").mkdir()
    shutil.copy(place / "noises" / "a.wav", place / "single")
    given = ("--dataset", "speech", "--noise_dir", "noises", "--output_dir", "noisy", *more)
    status, _, err = run_here(monkeypatch, capsys, *given, file=SCRIPT)
    assert status == 2 and message in err, err
    shutil.rmtree("noisy", ignore_errors=True)


def test_clips_that_are_silent_or_broken_are_named_and_left_out(monkeypatch, capsys, caplog, place):
    names = [row["file_name"] for row in rows(place / "speech" / "test")]
    soundfile.write(place / "speech" / "test" / names[1], np.zeros(RATE), RATE)
    (place / "speech" / "test" / names[3]).write_bytes(b"broken")
    out = made(monkeypatch, capsys, place, "noisy")
    assert "2 clips in each of 7 conditions" in out
    assert [Path(row["source"]).name for row in rows(place / "noisy" / "clean")] == ["000.wav", "002.wav"]
    assert f"{names[1]}: silent" in caplog.text and f"{names[3]}: not an audio file" in caplog.text
    assert "--on_bad_audio" not in caplog.text


def test_the_output_directory_may_end_in_a_slash(monkeypatch, capsys, place):
    given = ("--dataset", place / "speech", "--noise_dir", place / "noises", "--output_dir", f"{place / 'noisy'}/")
    status, _, err = run_here(monkeypatch, capsys, *given, "--max_clips", 1, "--snr_db", 0, file=SCRIPT)
    assert status == 0, err
    assert {path.name for path in place.iterdir()} == {"speech", "noises", "noisy"}
    assert {path.name for path in (place / "noisy").iterdir()} == {"clean", "snr0", "reverb", "codec"}


# ---- the plot ----


def evaluation(name: str, rates: dict[str, float]):
    sets = [
        speech_set(f"noisy-{split}", split=split, scores={"student": scores(rate), "teacher": scores(rate / 2)})
        for split, rate in rates.items()
    ]
    found = results(sets=sets)
    found.models["student"].name = name
    return found


def test_the_plot_has_the_error_rates_of_all_models(monkeypatch, capsys, tmp_path):
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))
    )
    rates = dict(zip(SPLITS, (10.0, 12.0, 20.0, 30.0, 50.0, 25.0, 15.0), strict=True))
    for name, factor in (("a", 1.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        evaluation(f"runs/{name}", {s: factor * r for s, r in rates.items()}).save(tmp_path / name / "results.json")
    arguments = (tmp_path / "a", tmp_path / "b", tmp_path / "noise.png")
    status, _, err = run_here(monkeypatch, capsys, *arguments, file=PLOT)
    assert status == 0, err
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
    against_snr, others = figures[0].axes
    drawn = {bars.get_label(): bars.lines[0].get_data() for bars in against_snr.containers}
    assert list(drawn) == ["runs/a", "openai/whisper-tiny.en", "runs/b"]
    for name, factor in (("runs/a", 1.0), ("runs/b", 0.5), ("openai/whisper-tiny.en", 0.5)):
        x, wer = drawn[name]
        assert wer.tolist() == [factor * rates[split] for split in ("snr0", "snr5", "snr10", "snr20", "clean")]
        np.testing.assert_allclose(np.array(x, float), [0, 5, 10, 20, 30], atol=0.5)
    assert [tick.get_text() for tick in against_snr.get_xticklabels()] == ["0", "5", "10", "20", "clean"]
    assert [tick.get_text() for tick in others.get_xticklabels()] == ["reverb", "codec"]
    ends = against_snr.containers[0].lines[2][0].get_segments()
    assert ends[0][:, 1].tolist() == [48.5, 52.25]  # the interval of `scores`


def test_the_conditions_of_a_model_may_be_in_several_evaluations(tmp_path):
    rates = dict(zip(SPLITS, (10.0, 12.0, 20.0, 30.0, 50.0, 25.0, 15.0), strict=True))
    parts = [evaluation("runs/study/a/1", {split: rate}) for split, rate in rates.items()]
    others = [evaluation("runs/study/b/1", {split: rate + 1}) for split, rate in rates.items()]
    for one in (*parts, *others):
        del one.models["teacher"]
    found = scores_by_condition(parts + others)
    assert {name: {split: one.wer for split, one in conditions.items()} for name, conditions in found.items()} == {
        "a/1": rates,
        "b/1": {split: rate + 1 for split, rate in rates.items()},
    }
    names = ["/runs/a", "/runs/a/b", "openai/whisper-tiny.en"]  # absolute, one within the other, and of the Hub
    assert [*scores_by_condition([evaluation(name, {"snr5": 1.0}) for name in names])] == [
        names[0],
        names[2],
        names[1],
    ]
    at_context = evaluation("runs/a", {"snr5": 8.0})
    at_context.models["student at clip context"] = at_context.models["student"]
    at_context.sets[0].scores["student at clip context"] = scores(9.0)
    found = scores_by_condition([at_context])
    assert {name: found[name]["snr5"].wer for name in found} == {
        "runs/a": 8.0,
        "openai/whisper-tiny.en": 4.0,
        "runs/a, context of the clips": 9.0,
    }
    other = evaluation("runs/a", {"snr5": 3.0})
    other.sets[0].name = "other-snr5"
    with pytest.raises(UserError, match="runs/a: two evaluations have a split snr5 of different clips"):
        scores_by_condition([at_context, other])
    beside = evaluation("runs/a", {"test": 2.0, "snr5": 1.0})
    beside.sets.append(replace(beside.sets[0], name="other"))  # two sets, whose split is no condition
    assert [*scores_by_condition([beside])["runs/a"]] == ["snr5"]
    with pytest.raises(UserError, match="runs/study/a/1: the evaluation has no sets of signal-to-noise ratios"):
        scores_by_condition([evaluation("runs/study/a/1", {"clean": 1.0})])


def test_evaluations_and_pictures_that_do_not_fit_are_named(monkeypatch, capsys, tmp_path):
    for name, weights in (("a", "1"), ("b", "2")):
        (tmp_path / name).mkdir()
        found = evaluation("runs/student", dict.fromkeys(SPLITS, 10.0))
        found.models["student"].weights = weights
        found.save(tmp_path / name / "results.json")
    status, _, err = run_here(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", tmp_path / "x.png", file=PLOT)
    assert status == 2 and "runs/student: two evaluations are of different weights" in err
    status, _, err = run_here(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", file=PLOT)
    assert status == 2 and "give the picture to write last" in err
    status, out, err = run_here(monkeypatch, capsys, tmp_path / "a", tmp_path / "x.png", file=PLOT)
    assert status == 0 and str(tmp_path / "x.png") in out, err


def test_the_text_column_can_be_chosen(monkeypatch, capsys, place):
    listed = place / "speech" / "test" / "metadata.csv"
    listed.write_text(listed.read_text().replace("transcription", "Satz"))
    made(monkeypatch, capsys, place, "noisy", "--text_column_name", "Satz", "--max_clips", 1, "--snr_db", 0)
    assert rows(place / "noisy" / "clean")[0]["transcription"]


def test_noises_above_the_present_directory(monkeypatch, capsys, place):
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    given = ("--dataset", "../speech", "--noise_dir", "../noises", "--output_dir", "noisy", "--max_clips", 1)
    more = ("--noise_every", 2, "--training_noises", "training")
    status, _, err = run_here(monkeypatch, capsys, *given, *more, file=SCRIPT)
    assert status == 0, err
    assert (place / "here" / "training" / "b.flac").is_file()


def test_a_directory_without_an_evaluation_is_named(monkeypatch, capsys, tmp_path):
    status, _, err = run_here(monkeypatch, capsys, tmp_path, tmp_path / "noise.png", file=PLOT)
    assert status == 2 and f"{tmp_path / 'results.json'}: no such file" in err


def test_an_evaluation_without_noisy_sets_is_named():
    with pytest.raises(UserError, match="runs/a: the evaluation has no sets of signal-to-noise ratios"):
        scores_by_condition([evaluation("runs/a", {"test": 3.0})])


def test_one_ratio_is_enough(tmp_path):
    write_noise_figure(scores_by_condition([evaluation("a", {"snr5": 3.0})]), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
