"""The audio in the HTML report."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from manifests import write
from report_page import Element, Page
from speech import audiofolder

from askd_hf.errors import UserError
from askd_hf.evaluation import DatasetSpec, prepare_set, score_directory, write_report
from askd_hf.evaluation import clip_audio as audio
from askd_hf.evaluation.report_clips import MAX_CLIPS

NAME = "spoken"
WORDS = ["zero", "one", "two", "three", "four", "five"]
WRONG = {"student": (1, 4), "teacher": (3,)}


@pytest.fixture
def evaluated(tmp_path):
    """An evaluation of tones of 200, 300, ... Hz, and its results."""
    folder = audiofolder(tmp_path / "speech", WORDS)
    (prepared,) = prepare_set(DatasetSpec(NAME, str(folder), None, "train"), window=30.0)
    for role, wrong in WRONG.items():
        said = [(None, text, "" if text in [WORDS[i] for i in wrong] else text) for text in prepared.clips["text"]]
        write(tmp_path / "out", role, said, data=prepared.digest())
    return tmp_path / "out", score_directory(tmp_path / "out", "none"), prepared


def heard(article: Element) -> tuple[np.ndarray, int]:
    (player,) = article.all("audio")
    kind, _, content = player["src"].partition(",")
    assert kind == "data:audio/mpeg;base64" and "controls" in player.attributes
    return soundfile.read(io.BytesIO(base64.b64decode(content)))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_each_clip_has_its_own_audio_which_stays_when_scored_again(evaluated):
    folder, results, prepared = evaluated
    html = write_report(results, folder, [prepared]).read_text()
    articles = Page(html).root.by_id("clips").all("article")
    tones = {}
    for article in articles:
        wave, rate = heard(article)
        assert rate == 16_000 and wave.ndim == 1 and len(wave) == rate // 2
        (word,) = [word.text for word in article.all("b") if word.text]
        tones[word] = np.argmax(np.abs(np.fft.rfft(wave))) * rate / len(wave)
    assert tones == {WORDS[i]: pytest.approx(200 + 100 * i, abs=4) for i in (1, 4, 3)}
    assert len(list((folder / audio.AUDIO_DIR).rglob("*"))) == 1 + 3
    assert write_report(results, folder).read_text() == html


def test_audio_of_other_clips_is_not_taken(evaluated):
    folder, results, prepared = evaluated
    write_report(results, folder, [prepared])
    edit(folder / "manifests" / "student" / f"{NAME}.json", prepared.digest(), "other")
    page = Page(write_report(results, folder).read_text()).root
    assert not page.all("audio") and "No audio: scored without the speech." in page.by_id("clips").text


def test_long_clips_have_no_audio(evaluated):
    folder, results, prepared = evaluated
    edit(folder / "manifests" / "student" / f"{NAME}.jsonl", '"duration": 3.6', '"duration": 61')
    page = Page(write_report(results, folder, [prepared]).read_text()).root
    assert page.by_id("clips").text.count("No audio: longer than 60 s.") == 3
    assert not page.all("audio") and not (folder / audio.AUDIO_DIR).exists()


def test_a_directory_that_can_not_be_written(evaluated):
    folder, results, prepared = evaluated
    (folder / audio.AUDIO_DIR).write_text("a file")
    with pytest.raises(UserError, match="mp3 can't be written"):
        write_report(results, folder, [prepared])


def test_only_the_clips_that_are_shown_are_saved(tmp_path):
    count = MAX_CLIPS + 3
    folder = audiofolder(tmp_path / "speech", ["word"] * count)
    (prepared,) = prepare_set(DatasetSpec(NAME, str(folder), None, "train"), window=30.0)
    write(tmp_path, "student", [(None, "word", "")] * count, data=prepared.digest())
    write_report(score_directory(tmp_path, "none"), tmp_path, [prepared])
    assert len(list((tmp_path / audio.AUDIO_DIR).rglob("*.mp3"))) == MAX_CLIPS
