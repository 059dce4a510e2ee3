"""Case, composed letters and normalizers of transcripts, by the language of the text."""

import logging

import pytest
from datasets import Dataset

from askd_hf.data import clean_texts
from askd_hf.data.text import basic_normalizer
from askd_hf.errors import UserError, warn_once

DOTLESS = "\u0131"


def cleaned(texts, text_case="auto", stream=False, normalize=None, written_in=None, **columns) -> list[str]:
    dataset = Dataset.from_dict({"clip": texts, "text": texts} | columns)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    return [row["text"] for row in clean_texts(dataset, text_case, "mine", normalize, written_in)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text_case", ["auto", "lower"])
def test_lower_case_is_the_languages(text_case, stream):
    languages = dict(language=["tr", "az", "el", "de", "en", "tr"], task=["transcribe"] * 5 + ["translate"])
    texts = ["İSTANBUL'DA IŞIK", "QIRMIZI İT", "ΟΔΟΣ ΣΟΦΟΣ", "GROẞE STRAßE", "IT IS İSTANBUL", "IT IS ISTANBUL"]
    assert cleaned(texts, text_case, stream, **languages) == [
        f"istanbul'da {DOTLESS}ş{DOTLESS}k",
        f"q{DOTLESS}rm{DOTLESS}z{DOTLESS} it",
        "οδος σοφος",
        "große straße",
        "it is istanbul",
        "it is istanbul",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_capitals_in_a_script_without_case_are_acronyms(stream, caplog):
    hindi = ["आज BBC ने कहा", "BBC", "नमस्ते दुनिया"]
    with caplog.at_level(logging.WARNING):
        assert cleaned(hindi, stream=stream) == hindi
        assert cleaned(["今日はNHKを見た", "ニュース"], stream=stream) == ["今日はNHKを見た", "ニュース"]
        assert cleaned(["ดู TV ที่บ้าน"], stream=stream) == ["ดู TV ที่บ้าน"]
    assert "capitals" not in caplog.text
    spoken = dict(language=["hi", "hi", "hi", "en", "fr"], task=["transcribe"] * 5)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        texts = [*hindi, "GOOD MORNING", "Bonjour"]
        assert cleaned(texts, stream=stream, **spoken) == [*hindi, "good morning", "Bonjour"]
        cleaned(texts, stream=stream, **spoken)  # as a run with --vocabulary does
    assert caplog.text.count("the transcripts in en are all upper-case") == 1


def test_languages_that_come_later_in_a_stream_are_as_those_before():
    spoken = dict(language=["en"] * 100 + ["tr"], task=["transcribe"] * 101)
    assert cleaned(["HI"] * 100 + ["IŞIK"], stream=True, **spoken)[-1] == f"{DOTLESS}ş{DOTLESS}k"
    assert cleaned(["Hi"] * 100 + ["IŞIK"], stream=True, **spoken)[-1] == "IŞIK"


def test_letters_are_composed_and_nothing_else_changes():
    assert cleaned(["cafe\u0301  nai\u0308ve"], "keep") == ["caf\xe9 na\xefve"]
    assert cleaned(["\ufb01ne \u00bd \u0e19\u0e49\u0e33"], "keep") == ["\ufb01ne \u00bd \u0e19\u0e49\u0e33"]  # no NFKC


def test_the_basic_normalizer_keeps_marks():
    texts = ["लड़की, लड़का!", "น้ำ ก๊า", "<SIGHS> IŞIK (GÜLER) yandı."]
    spoken = dict(language=["hi", "th", "tr"], task=["transcribe"] * 3)
    assert cleaned(texts, "lower", normalize=basic_normalizer(), **spoken) == [
        "लड़की लड़का".replace("ड़", "ड\u093c"),
        "น้ำ ก๊า",
        f"{DOTLESS}ş{DOTLESS}k yand{DOTLESS}",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_the_english_normalizer_is_for_english(stream):
    spoken = dict(language=["fr", "fr"], task=["translate", "transcribe"])
    with pytest.raises(UserError, match="supports only en, but mine has rows in fr: use --text_normalizer basic"):
        cleaned(["A", "B"], "lower", stream, str, "en", **spoken)
    assert cleaned(["A"], "lower", stream, str, "en", language=["fr"], task=["translate"]) == ["a"]
