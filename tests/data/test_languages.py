"""What the rows say of their language."""

import pytest
from datasets import ClassLabel
from speech import audiofolder

from askd_hf.data import load_speech_dataset, to_iterable_dataset
from askd_hf.data.languages import lower_case, with_language, without_language


@pytest.fixture
def speech(tmp_path):
    return load_speech_dataset(str(audiofolder(tmp_path, ["a", "b", "c"])), None, "train")


def spoken(dataset) -> list[tuple[str, str]]:
    return [(row["language"], row["task"]) for row in dataset]


@pytest.mark.parametrize("stream", [False, True])
def test_names_codes_and_classes_become_codes(speech, stream):
    named = speech.add_column("language", ["French", "de", None]).add_column("task", [None, "translate", None])
    classes = speech.add_column("language", [1, 0, 1]).cast_column("language", ClassLabel(names=["german", "fr"]))
    if stream:
        named, classes, speech = to_iterable_dataset(named), to_iterable_dataset(classes), to_iterable_dataset(speech)
    expected = [("fr", "transcribe"), ("de", "translate"), ("", "transcribe")]
    assert spoken(with_language(named, None, None)) == expected
    assert spoken(with_language(named, "English", "translate")) == [("en", "translate")] * 3
    assert [language for language, _ in spoken(with_language(classes, None, None))] == ["fr", "de", "fr"]
    assert set(with_language(speech, "fr", None).column_names) == {*speech.column_names, "language", "task"}
    assert not {"language", "task"} & set(without_language(named).column_names)


@pytest.mark.parametrize("language", ["tr", "Turkish", "az", "AZERBAIJANI"])
def test_turkish_and_azerbaijani_have_two_letters_i(language):
    assert lower_case("İSTANBUL'DA IŞIK YANDI", language) == "istanbul'da ışık yandı"
    assert lower_case("I\u0307STANBUL", language) == "istanbul"
    assert lower_case("ışık İşik", language) == "ışık işik"


@pytest.mark.parametrize("language", [None, "en", "German", "el"])
def test_other_languages_have_one(language):
    assert lower_case("ISTANBUL İstanbul I\u0307stanbul", language) == "istanbul istanbul istanbul"
    assert lower_case("ΟΔΟΣ ΣΟΦΟΣ", language) == "οδος σοφος"  # a final sigma is another letter
