"""What is measured of a transcript, with values worked out by hand, and what is dropped for it."""

import csv
import math
import zlib

import pytest

from askd_hf.errors import UserError
from askd_hf.evaluation.metrics import normalizer_for
from askd_hf.pseudo_labels import keep_good, known_references, measure
from askd_hf.pseudo_labels.filters import Thresholds, compression_ratio, reason_to_drop, word_error_rates

LIMITS = Thresholds(max_wer=10, min_log_prob=-1, max_compression_ratio=2.4, max_repetition=20)
ENGLISH = normalizer_for("english", "en", {})[1]


def transcripts(*texts: str, references: list[str | None] | None = None, learn: str = "teacher", **changes):
    lines = [
        dict(clip=f"clip {i}", text=text, avg_log_prob=-0.2, tokens=9, ended=True) | changes
        for i, text in enumerate(texts)
    ]
    return measure(lines, references or [None] * len(lines), ENGLISH, "en", learn)


def reason(transcript, limits: Thresholds = LIMITS) -> str | None:
    dropped = reason_to_drop(transcript, limits)
    return dropped and dropped.reason


@pytest.mark.parametrize(
    "reference",
    ["MISTER SMITH WENT TO LONDON HE DIDN'T COME BACK", "mister smith went to london he didn't come back"],
)
def test_references_in_one_case_without_punctuation_keep_the_teachers_text(reference):
    """distil-whisper throws samples in capitals away."""
    (transcript,) = transcripts("Mr. Smith went to London. He didn't come back!", references=[reference])
    assert transcript.wer == 0
    assert reason(transcript) is None
    assert transcript.label == "Mr. Smith went to London. He didn't come back!"
    (kept,) = transcripts("Mr. Smith went.", references=["MR SMITH WENT"], learn="reference")
    assert kept.label == "MR SMITH WENT"


def test_word_error_rates_are_of_each_clip():
    references = ["red cat sat down", "x b c d", None, "", "", "hmm"]
    texts = ["red dog sat down there", "X, b: c. D", "anything", "Thank you.", "", "Uh."]
    # of 4 words one substituted, one inserted; the normalizer takes hesitations out of both sides
    assert word_error_rates(texts, references, ENGLISH) == [50, 0, None, math.inf, 0, 0]


def test_compression_ratio_is_that_of_openai():
    for text in ("Nothing is repeated here.", "là " * 40, ""):
        content = text.encode()
        assert compression_ratio(text) == len(content) / len(zlib.compress(content))
    assert compression_ratio("la la la la " * 20) > 2.4


def test_repetition_is_the_share_of_five_grams_that_stand_earlier():
    # 9 words, 5 five-grams; "a b c d" again, and so the fifth is as the first
    (transcript,) = transcripts("A b, c d! A b c d. A")
    assert transcript.repetition == pytest.approx(100 * 1 / 5)
    (chinese,) = measure(
        [dict(clip="c", text="我们我们我们我们", avg_log_prob=0, tokens=8, ended=True)], [None], ENGLISH, "zh"
    )
    assert chinese.repetition == pytest.approx(100 * 2 / 4)  # 8 letters, 4 five-grams, two of them new


@pytest.mark.parametrize(
    ("changes", "limit", "expected"),
    [
        ({"avg_log_prob": -1.01}, {}, "average log-probability under -1"),
        ({"avg_log_prob": -1.0}, {}, None),
        ({"compression_ratio": 2.41}, {}, "compression ratio over 2.4"),
        ({"compression_ratio": 2.4}, {}, None),
        ({"repetition": 20.1}, {}, "repeated 5-grams over 20 %"),
        ({"repetition": 20.0}, {}, None),
        ({"ended": False}, {}, "no end before the token limit"),
        ({"text": ""}, {}, "no text"),
        ({"label": None}, {}, "no reference"),
        ({"wer": 10.1}, {}, "word error rate over 10 %"),
        ({"wer": 10.0}, {}, None),
        # a reference decides alone
        ({"wer": 3.0, "avg_log_prob": -4.0, "repetition": 90.0}, {}, None),
        ({"wer": math.inf}, {"max_wer": math.inf}, "text where the reference has none"),
    ],
)
def test_reasons(changes, limit, expected):
    (transcript,) = transcripts("A good text.")
    for name, value in changes.items():
        setattr(transcript, name, value)
    limits = Thresholds(**(vars(LIMITS) | limit))
    assert reason(transcript, limits) == expected


def test_what_is_dropped_is_counted_and_listed(tmp_path, capsys):
    references = ["THE CAT SAT", "THE DOG RAN FAR AWAY", "", "ÇA VA"]
    found = transcripts("The cat sat.", "The frog ran far away.", "Thank you.", "Ça va?", references=references)
    assert keep_good(found, LIMITS, tmp_path / "dropped.csv") == [0, 3]
    out = capsys.readouterr().out
    assert "2 of 4 transcripts are kept" in out
    assert "1 dropped: word error rate over 10 %" in out and "1 dropped: text where the reference has none" in out
    with (tmp_path / "dropped.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["clip", "reason", "value", "text", "reference"]
    assert rows[1] == ["clip 1", "word error rate over 10 %", "20", "The frog ran far away.", "THE DOG RAN FAR AWAY"]
    assert rows[2] == ["clip 2", "text where the reference has none", "inf", "Thank you.", ""]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"not one transcript is good enough.*\(askd-hf pseudo-label --max_wer"):
        keep_good(transcripts("Good.", avg_log_prob=-3), LIMITS, tmp_path / "dropped.csv")
    assert (tmp_path / "dropped.csv").exists()


def test_empty_references_are_references_only_beside_others():
    assert known_references(["", None, " "]) == [None, None, None]
    assert known_references(["a", "", None]) == ["a", "", None]
    assert known_references(["a", "ignore_time_segment_in_scoring"]) == ["a", None]
