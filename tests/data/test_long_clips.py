"""Clips that are longer than the window are cut at pauses, with their text."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from datasets import Audio, Dataset, Features, Value, concatenate_datasets
from datasets.features.features import get_nested_type
from processes import launch
from scripts import ROOT
from speech import RATE, encoded

from askd_hf.data import Limits, audio_checks, decode_audio, filter_invalid_clips, load_speech_dataset, long_clips
from askd_hf.data.audio import read_audio
from askd_hf.data.columns import AUDIO_FILE, SEGMENTS, replace_column
from askd_hf.data.long_clips import cut_long_clips, piece_bounds
from askd_hf.errors import UserError

RUN = ROOT / "tests" / "support" / "long_clips_run.py"
WORDS = get_nested_type(SEGMENTS)


def words(*times: tuple[float, float]) -> list[dict]:
    return [{"start": start, "end": end, "text": f"w{i}"} for i, (start, end) in enumerate(times)]


@pytest.mark.parametrize(
    ("times", "duration", "expected"),
    [
        ([(0, 1), (1.2, 2)], 3.0, [(0, 3)]),  # fits
        # the longest pause in the second half of the window, 2 to 4 s
        ([(0, 1), (1.9, 2.4), (2.6, 3), (3.4, 3.8), (4, 5)], 5.0, [(0, 3.2), (3.2, 5)]),
        # a pause in the first half, as there is none in the second; then again
        ([(0, 1), (1.2, 4.9), (5.1, 6), (6.5, 8)], 8.0, [(0, 1.1), (1.1, 5.0), (5.0, 8)]),
        # a word longer than the window stays whole
        ([(0, 6), (6.2, 7)], 7.0, [(0, 6), (6.1, 7)]),
        ([(0, 6)], 6.0, [(0, 6)]),
        # silence at the end, at the start, and a long pause
        ([(0, 1), (1.2, 3)], 9.0, [(0, 3.5)]),
        ([(6, 7), (7.2, 8)], 8.5, [(5.5, 8.5)]),
        ([(0, 1), (8, 9)], 9.2, [(0, 1.5), (7.5, 9.2)]),
        # less silence where the words nearly fill the window
        ([(0, 3.8)], 5.0, [(0, 3.9)]),
        ([(0, 1), (4.9, 8.8)], 8.8, [(0, 1.5), (4.85, 8.8)]),
        # the words of both sides of a long pause don't fit together
        ([(0, 3.9), (4.9, 8.8)], 8.8, [(0, 4.0), (4.85, 8.8)]),
        # a word within another one
        ([(0, 3.9), (1, 1.2), (9, 10)], 10.5, [(0, 4.0), (8.5, 10.5)]),
    ],
)
def test_cuts_are_in_pauses(times, duration, expected):
    bounds = piece_bounds(words(*times), duration, 4.0)
    assert [edge for piece in bounds for edge in piece] == pytest.approx(
        [edge for piece in expected for edge in piece]
    )


@pytest.mark.parametrize("longest", [0.8, 3.0])
def test_no_piece_is_longer_than_the_window_where_that_is_possible(longest):
    """All words are in a piece, and a clip whose words fit in the window stays one piece."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        number = rng.integers(1, 40)
        lengths, pauses = rng.uniform(0.05, longest, number), rng.exponential(rng.choice([0.2, 1.5]), number)
        starts = np.cumsum(pauses) + np.cumsum(lengths) - lengths
        units = words(*zip(starts, starts + lengths, strict=True))
        duration = float(starts[-1] + lengths[-1] + rng.exponential(1.0))
        bounds = piece_bounds(units, duration, 3.0)
        edges = [edge for piece in bounds for edge in piece]
        assert max(end - start for start, end in bounds) <= 3.0 + 1e-9 and edges == sorted(edges)
        assert edges[0] >= 0 and edges[-1] <= duration
        inside = [[start <= unit["start"] and unit["end"] <= end for start, end in bounds] for unit in units]
        assert all(sum(each) == 1 for each in inside) and all(map(any, zip(*inside, strict=True)))
        assert len(bounds) == 1 or starts[-1] + lengths[-1] - starts[0] > 3.0


@pytest.fixture
def dataset() -> Dataset:
    """A clip of 6 s, one of 1 s, and one of 6 s without times; each sample is its own number, scaled."""
    features = Features(audio=AUDIO_FILE, text=Value("string"), clip=Value("string"), segments=SEGMENTS)
    features |= Features(words=SEGMENTS, prompt=Value("string"))
    ramp = (np.arange(6 * RATE) / (6 * RATE)).astype(np.float32)
    sounds = [{"bytes": encoded(ramp[: seconds * RATE]), "path": None} for seconds in (6, 1, 6)]
    times = words((0, 1), (1.5, 2.5), (3.5, 4.5), (5, 5.9))
    segments = [{"start": 0.0, "end": 2.5, "text": "w0 w1"}, {"start": 3.5, "end": 5.9, "text": "w2 w3"}]
    return Dataset.from_dict(
        {
            "audio": sounds,
            "text": ["W0 w1, w2 w3.", "short", "long"],
            "clip": ["a.wav", "b.wav", "c.wav"],
            "segments": [segments, None, None],
            "words": [times, words((0, 0.5)), None],
            "prompt": ["before", None, None],
        },
        features=features,
    )


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A directory of this test for what is kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_pieces_have_their_audio_text_times_and_the_text_before(dataset):
    first, second, short, long = cut_long_clips(dataset, 4.0, "speech")
    assert [row["clip"] for row in (first, second)] == ["a.wav, 0.0 to 3.0 s", "a.wav, 3.0 to 6.0 s"]
    assert [row["text"] for row in (first, second, short, long)] == ["w0 w1", "w2 w3", "short", "long"]
    assert [row["prompt"] for row in (first, second)] == ["before", "w0 w1"]
    assert first["segments"] == [{"start": 0.0, "end": 2.5, "text": "w0 w1"}]
    assert second["segments"] == [{"start": 0.5, "end": pytest.approx(2.9, abs=1e-6), "text": "w2 w3"}]
    whole = decode_audio(dataset[0]["audio"])
    joined = np.concatenate([decode_audio(row["audio"]) for row in (first, second)])
    np.testing.assert_allclose(joined, whole, atol=1e-6)
    assert decode_audio(short["audio"]).shape == (RATE,) and decode_audio(long["audio"]).shape == (6 * RATE,)


def test_a_segment_that_starts_before_its_words_is_in_their_piece(dataset):
    """As those of Whisper, of which each one starts where the last one ends."""
    segments = [{"start": 0.0, "end": 2.5, "text": "w0 w1"}, {"start": 2.5, "end": 5.9, "text": "w2 w3"}]
    rows = replace_column(dataset.select([0]), "segments", pa.array([segments], WORDS))
    first, second = cut_long_clips(rows, 4.0, "speech")  # at 3 s
    assert first["segments"] == [{"start": 0.0, "end": 2.5, "text": "w0 w1"}]
    assert second["segments"] == [{"start": 0.0, "end": pytest.approx(2.9, abs=1e-6), "text": "w2 w3"}]


def test_silence_is_cut_off(dataset):
    """A clip whose words fit in the window stays one piece."""
    early, late = words((0.2, 1), (1.5, 1.9)), words((0.4, 0.9), (5.0, 5.8))
    rows = replace_column(concatenate_datasets([dataset.select([0])] * 2), "words", pa.array([early, late], WORDS))
    pieces = cut_long_clips(rows, 2.5, "speech")
    assert pieces["text"][:] == ["w0 w1", "w0", "w1"]
    assert pieces["clip"][:] == ["a.wav, 0.0 to 2.3 s", "a.wav, 0.0 to 1.4 s", "a.wav, 4.5 to 6.0 s"]
    assert pieces["prompt"][:] == ["before", "before", "w0"]
    assert max(len(decode_audio(row["audio"])) for row in pieces) <= 2.5 * RATE


def test_a_cut_through_a_segment_leaves_a_piece_without_segments(dataset):
    pieces = cut_long_clips(dataset.select([0]), 2.6, "speech")
    assert [row["text"] for row in pieces] == ["w0", "w1", "w2 w3"]
    assert [row["segments"] for row in pieces][:2] == [None, None]
    (segment,) = pieces[2]["segments"]
    assert (segment["start"], segment["end"]) == pytest.approx((0.1, 2.5)) and segment["text"] == "w2 w3"


def test_a_word_without_length_at_the_end_is_kept(dataset):
    """Alignment may put the last word at the very end of the clip."""
    changed = dataset[0]["words"] + [{"start": 6.0, "end": 6.0, "text": "w4"}]
    pieces = cut_long_clips(replace_column(dataset.select([0]), "words", pa.array([changed], WORDS)), 4.0, "speech")
    assert pieces["text"][:] == ["w0 w1", "w2 w3 w4"]


def test_a_word_without_a_time_leaves_the_clip_whole(dataset):
    """Some aligners give no time to some words."""
    changed = [
        dataset[0]["words"][0],
        {"start": None, "end": None, "text": "w1"},
        {"start": 5.0, "end": 5.9, "text": "w2"},
    ]
    for row in (changed, [changed[0], {"start": None, "end": 5.9, "text": "w1"}]):
        untimed = replace_column(dataset.select([0]), "words", pa.array([row], WORDS))
        assert cut_long_clips(untimed, 4.0, "speech")["text"][:] == ["W0 w1, w2 w3."]


def test_segments_sorted_by_speaker_are_cut_by_time(dataset):
    """Those of a conversation: one speaker's, then the other's, and a word that nobody gave a time."""
    by_speaker = [{"start": start, "end": end, "text": text} for start, end, text in [
        (1.5, 2.5, "a1"), (5.0, 5.9, "a2"), (0.0, 1.0, "b1"), (3.5, 4.5, "b2"),
    ]]  # fmt: skip
    rows = dataset.select([0]).remove_columns("words")
    pieces = cut_long_clips(replace_column(rows, "segments", pa.array([by_speaker], WORDS)), 4.0, "speech")
    assert pieces["text"][:] == ["b1 a1", "b2 a2"]
    assert pieces["clip"][:] == ["a.wav, 0.0 to 3.0 s", "a.wav, 3.0 to 6.0 s"]
    assert [part["text"] for part in pieces[1]["segments"]] == ["b2", "a2"]
    unknown = [*by_speaker, {"start": math.nan, "end": 5.9, "text": "b3"}]
    whole = cut_long_clips(replace_column(rows, "segments", pa.array([unknown], WORDS)), 4.0, "speech")
    assert whole["text"][:] == ["W0 w1, w2 w3."]


def test_segments_are_enough(dataset):
    pieces = cut_long_clips(dataset.remove_columns("words"), 4.0, "speech")
    assert [row["text"] for row in pieces] == ["w0 w1", "w2 w3", "short", "long"]


def test_without_times_it_is_refused(dataset):
    untimed = dataset.remove_columns(["words", "segments"])
    with pytest.raises(UserError, match=r"--long_clips cut requires the times .* speech has neither .* a\.wav"):
        cut_long_clips(untimed, 4.0, "speech")


def test_short_clips_need_no_times(dataset):
    """In a mix only some datasets may have long clips."""
    untimed = dataset.remove_columns(["words", "segments"])
    broken = {"bytes": b"not audio", "path": None}  # named by the check of the clips
    untimed = untimed.add_item(untimed[0] | {"audio": broken}).select([1, 3])
    assert cut_long_clips(untimed, 4.0, "speech")["text"][:] == untimed["text"][:]


@pytest.fixture
def decoded(monkeypatch) -> list[float]:
    """The seconds of each audio that this process decodes."""
    seconds: list[float] = []

    def read(audio):
        samples, rate = read_audio(audio)
        seconds.append(len(samples) / rate)
        return samples, rate

    for module in (audio_checks, long_clips):
        monkeypatch.setattr(module, "read_audio", read)
    return seconds


def started(dataset: Dataset | Path, recheck: bool = False) -> Dataset:
    """The clips that a start trains on."""
    if isinstance(dataset, Path):
        dataset = load_speech_dataset(str(dataset), None, "train")
    pieces = cut_long_clips(dataset, 4.0, "speech", recheck=recheck)
    limits = Limits(4.0, skip_long=True)
    return filter_invalid_clips(pieces, None, limits, on_bad_audio="error", num_proc=0, recheck=recheck)


@pytest.mark.parametrize("files", [False, True], ids=["embedded", "files"])
def test_a_second_start_decodes_nothing(dataset, decoded, tmp_path, files):
    sound, saved = tmp_path / "a.flac", dataset.cast_column("audio", Audio(decode=False))
    if files:
        sound.write_bytes(dataset[0]["audio"]["bytes"])
        other = [{"path": str(sound), "bytes": None}, *dataset["audio"][1:]]
        saved = replace_column(dataset, "audio", pa.array(other, get_nested_type(AUDIO_FILE)))
    else:
        saved.save_to_disk(tmp_path / "saved")
        saved = tmp_path / "saved"
    first = started(saved)
    assert decoded == [6, 1, 6, 6, 3, 3]  # measured; cut, where there are times; and the pieces are checked
    assert first["text"][:] == ["w0 w1", "w2 w3", "short"]
    decoded.clear()
    assert started(saved).to_list() == first.to_list() and not decoded
    again = started(saved, recheck=True)
    assert again.to_list() == first.to_list() and decoded == [6, 1, 6, 3, 3, 1, 6]
    decoded.clear()
    if not files:
        return
    samples, rate = soundfile.read(sound)
    soundfile.write(sound, samples[::-1], rate)
    assert started(saved)["audio_key"][0] != first["audio_key"][0] and decoded == [6, 6, 3, 3]


def test_other_words_are_cut_anew(dataset):
    """The pieces of other times, and of another window, are kept too."""
    first = cut_long_clips(dataset, 4.0, "speech")
    later = [[word | {"text": word["text"].upper()} for word in row or []] or None for row in dataset["words"]]
    changed = replace_column(dataset, "words", pa.array(later, get_nested_type(SEGMENTS)))
    assert cut_long_clips(changed, 4.0, "speech")["text"][:2] == ["W0 W1", "W2 W3"]
    assert len(cut_long_clips(dataset, 2.6, "speech")) == 5
    assert cut_long_clips(dataset, 4.0, "speech").to_list() == first.to_list()


def test_an_interrupted_cut_begins_again(dataset, monkeypatch, home):
    def interrupted(audio):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(long_clips, "read_audio", interrupted)
        cut_long_clips(dataset, 4.0, "speech")
    assert cut_long_clips(dataset, 4.0, "speech")["text"][:2] == ["w0 w1", "w2 w3"]
    assert len(list((home / "askd_hf" / f"cut_clips-{long_clips.VERSION}").glob("*/*.arrow"))) == 1


def test_processes_cut_in_the_order_of_the_clips(dataset):
    many = concatenate_datasets([dataset.select([row]) for row in (1, 0, 2, 0)])
    texts = ["short", "w0 w1", "w2 w3", "long", "w0 w1", "w2 w3"]
    assert cut_long_clips(many, 4.0, "speech", num_proc=2)["text"][:] == texts


def test_two_processes_measure_a_part_each_and_one_cuts(dataset, tmp_path):
    """A second start of a single process decodes nothing."""
    other = dataset.select([1])
    sound = {"bytes": encoded(np.linspace(0.1, 0.5, 2 * RATE, dtype=np.float32)), "path": None}
    other = replace_column(other, "audio", pa.array([sound], get_nested_type(AUDIO_FILE)))
    many = concatenate_datasets([dataset.select([0, 1]), other])
    many.cast_column("audio", Audio(decode=False)).save_to_disk(tmp_path / "saved")

    def run(processes: int) -> list[dict]:
        done = launch(processes, RUN, tmp_path / "saved", tmp_path / "home", tmp_path / "result")
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(processes)]

    two, (one,) = run(2), run(1)
    assert [found["decoded"] for found in (*two, one)] == [2 + 1, 1, 0]
    assert [row["text"] for row in one["rows"]] == ["w0 w1", "w2 w3", "short", "short"]
    assert two[0]["rows"] == two[1]["rows"] == one["rows"]


def test_pieces_are_cut_again(dataset):
    """Their words are their own, in their time."""
    once = cut_long_clips(dataset.select([0]), 4.0, "speech")
    assert [[word["text"] for word in words] for words in once["words"][:]] == [
        text.split() for text in once["text"][:]
    ]
    twice = cut_long_clips(once, 2.0, "speech")
    assert twice["text"][:] == ["w0", "w1", "w2", "w3"]
    assert all(0 <= word["start"] < word["end"] <= 2.0 for words in twice["words"][:] for word in words)
