"""Clips that are longer than the window are cut at pauses, with their text."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value
from datasets.features.features import get_nested_type
from speech import RATE, encoded

from askd_hf.data import decode_audio
from askd_hf.data.columns import AUDIO_FILE, SEGMENTS, replace_column
from askd_hf.data.long_clips import cut_long_clips, cut_points
from askd_hf.errors import UserError

WORDS = get_nested_type(SEGMENTS)


def words(*times: tuple[float, float]) -> list[dict]:
    return [{"start": start, "end": end, "text": f"w{i}"} for i, (start, end) in enumerate(times)]


@pytest.mark.parametrize(
    ("times", "duration", "expected"),
    [
        ([(0, 1), (1.2, 2)], 3.0, []),  # fits
        # the longest pause in the second half of the window, 2 to 4 s
        ([(0, 1), (1.9, 2.4), (2.6, 3), (3.4, 3.8), (4, 5)], 5.0, [3.2]),
        # a pause in the first half, as there is none in the second; then again
        ([(0, 1), (1.2, 4.9), (5.1, 6), (6.5, 8)], 8.0, [1.1, 5.0]),
        # a word longer than the window stays whole
        ([(0, 6), (6.2, 7)], 7.0, [6.1]),
        ([(0, 6)], 6.0, []),
    ],
)
def test_cuts_are_in_pauses(times, duration, expected):
    assert cut_points(words(*times), duration, 4.0) == pytest.approx(expected)


def test_no_piece_is_longer_than_the_window_where_that_is_possible():
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.cumsum(rng.uniform(0.05, 1.0, 2 * rng.integers(2, 40)))
        units = words(*edges.reshape(-1, 2))
        duration = float(edges[-1] + rng.uniform(0, 1))
        points = [0.0, *cut_points(units, duration, 3.0), duration]
        assert max(np.diff(points)) <= 3.0 and points == sorted(points)
        assert all(not unit["start"] < point < unit["end"] for point in points[1:-1] for unit in units)


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


def test_a_cut_through_a_segment_leaves_a_piece_without_segments(dataset):
    pieces = cut_long_clips(dataset.select([0]), 2.6, "speech")
    assert [row["text"] for row in pieces] == ["w0", "w1", "w2", "w3"]
    assert [row["segments"] for row in pieces] == [None] * 4


def test_a_word_without_length_at_the_end_is_kept(dataset):
    """Alignment may put the last word at the very end of the clip."""
    changed = dataset[0]["words"] + [{"start": 6.0, "end": 6.0, "text": "w4"}]
    pieces = cut_long_clips(replace_column(dataset.select([0]), "words", pa.array([changed], WORDS)), 4.0, "speech")
    assert pieces["text"][:] == ["w0 w1", "w2 w3 w4"]


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
