"""What is measured of a transcript, with values worked out by hand, and what is dropped for it."""

import csv
import math
import zlib

import pytest

from askd_hf.errors import UserError
from askd_hf.evaluation.metrics import normalizer_for
from askd_hf.pseudo_labels import filter_transcripts, known_references, score_transcripts
from askd_hf.pseudo_labels.filters import Thresholds, compression_ratio, reason_to_drop, word_error_rates

LIMITS = Thresholds(
    wer_threshold=10, logprob_threshold=-1, compression_ratio_threshold=2.4, repeated_5gram_threshold=20
)
ENGLISH = normalizer_for("english", "en", {})[1]


def transcripts(*texts: str, references: list[str | None] | None = None, label_source: str = "teacher", **changes):
    lines = [
        dict(clip=f"clip {i}", text=text, avg_logprob=-0.2, tokens=9, ended=True) | changes
        for i, text in enumerate(texts)
    ]
    return score_transcripts(lines, references or [None] * len(lines), ENGLISH, "en", label_source)


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
    (kept,) = transcripts("Mr. Smith went.", references=["MR SMITH WENT"], label_source="reference")
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


@pytest.mark.parametrize(
    "text",
    [
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ "
        "ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ "
        "บุคคลย่อมมีสิทธิและอิสรภาพทั้งปวงตามที่กำหนดไว้ในปฏิญญานี้",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। "
        "उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
        "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    ],
    ids=["Thai", "Hindi", "Chinese"],
)
def test_letters_of_several_bytes_are_no_repetitions(text):
    """The Universal Declaration of Human Rights. UTF-8 gives 2.4 and more for the first two."""
    assert compression_ratio(text) < 1.7
    assert compression_ratio(text[:12] * 20) > 2.4


def test_repetition_is_the_share_of_five_grams_that_stand_earlier():
    # 9 words, 5 five-grams; "a b c d" again, and so the fifth is as the first
    (transcript,) = transcripts("A b, c d! A b c d. A")
    assert transcript.repeated_5gram_rate == pytest.approx(100 * 1 / 5)
    (chinese,) = score_transcripts(
        [dict(clip="c", text="我们我们我们我们", avg_logprob=0, tokens=8, ended=True)], [None], ENGLISH, "zh"
    )
    assert chinese.repeated_5gram_rate == pytest.approx(100 * 2 / 4)  # 8 letters, 4 five-grams, two of them new


@pytest.mark.parametrize(
    ("changes", "limit", "expected"),
    [
        ({"avg_logprob": -1.01}, {}, "average log-probability under -1"),
        ({"avg_logprob": -1.0}, {}, None),
        ({"compression_ratio": 2.41}, {}, "compression ratio over 2.4"),
        ({"compression_ratio": 2.4}, {}, None),
        ({"repeated_5gram_rate": 20.1}, {}, "repeated 5-grams over 20 %"),
        ({"repeated_5gram_rate": 20.0}, {}, None),
        ({"ended": False}, {}, "truncated at the token limit"),
        ({"text": ""}, {}, "empty transcript"),
        ({"label": None}, {}, "no reference"),
        ({"wer": 10.1}, {}, "word error rate over 10 %"),
        ({"wer": 10.0}, {}, None),
        # a reference decides alone
        ({"wer": 3.0, "avg_logprob": -4.0, "repeated_5gram_rate": 90.0}, {}, None),
        ({"wer": math.inf}, {"wer_threshold": math.inf}, "text for an empty reference"),
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
    assert filter_transcripts(found, LIMITS, tmp_path / "dropped.csv") == [0, 3]
    out = capsys.readouterr().out
    assert "2 of 4 transcripts are kept" in out
    assert "1 dropped: word error rate over 10 %" in out and "1 dropped: text for an empty reference" in out
    with (tmp_path / "dropped.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["clip", "reason", "value", "text", "reference"]
    assert rows[1] == ["clip 1", "word error rate over 10 %", "20", "The frog ran far away.", "THE DOG RAN FAR AWAY"]
    assert rows[2] == ["clip 2", "text for an empty reference", "inf", "Thank you.", ""]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no transcript passed the filters") as raised:
        filter_transcripts(transcripts("Good.", avg_logprob=-3), LIMITS, tmp_path / "dropped.csv")
    assert str(raised.value).endswith("dropped.csv, and change askd-hf pseudo-label --logprob_threshold")
    assert (tmp_path / "dropped.csv").exists()
    with pytest.raises(UserError, match="no transcript passed the filters") as raised:
        filter_transcripts(transcripts("Good.", ended=False), LIMITS, tmp_path / "dropped.csv")
    assert "threshold" not in str(raised.value)  # none would help


def test_empty_references_are_references_only_beside_others(caplog):
    assert known_references(["", None, " "]) == [None, None, None]
    assert known_references(["...", "?!", "", None]) == [None] * 4  # nothing is left of them
    assert known_references(["a", "ignore_time_segment_in_scoring"]) == ["a", None]
    assert not caplog.text
    assert known_references(["a", "", "...", None]) == ["a", "", "...", None]
    assert "2 of 4 references are empty: these clips count as clips without speech" in caplog.text
