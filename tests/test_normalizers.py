"""The multilingual normalizer: different words stay different, spellings of the same text become equal."""

import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from askd_hf.evaluation.metrics import BY_LETTER, UNIFIED, error_rates, normalizer_for

# for each language of Whisper, two words that differ in a mark, a dot or an apostrophe only
DIFFERENT_WORDS = {
    "en": "ship sheep",
    "zh": "已 己",
    "de": "schon schön",
    "es": "ano año",
    "ru": "все всё",
    "ko": "눈 눌",
    "fr": "peche pêche",
    "ja": "かき かぎ",
    "pt": "avó avô",
    "tr": "kış kis",
    "pl": "laska łaska",
    "ca": "dona dóna",
    "nl": "een één",
    "ar": "كتاب كتابة",
    "sv": "hall håll",
    "it": "pero però",
    "id": "bank bang",
    "hi": "हंस हँस",
    "fi": "sade säde",
    "vi": "ma mạ",
    "he": "שלום שלומי",
    "uk": "гніт ґніт",
    "el": "πότε ποτέ",
    "ms": "kata kota",
    "cs": "byt být",
    "ro": "fata fața",
    "da": "hal hål",
    "hu": "kor kór",
    "ta": "கல் கால்",
    "no": "for før",
    "th": "ใกล้ ไกล",
    "ur": "ان آن",
    "hr": "kuca kuća",
    "bg": "и ѝ",
    "lt": "rasa rąsa",
    "la": "malum mālum",
    "mi": "keke kēkē",
    "ml": "കര കാര",
    "cy": "mor môr",
    "sk": "sud súd",
    "te": "కల కళ",
    "fa": "آب اب",
    "lv": "kaza kāza",
    "bn": "কল কাল",
    "sr": "куће куче",
    "az": "qız qiz",
    "sl": "cas čas",
    "kn": "ಕಲ ಕಾಲ",
    "et": "sadu sädu",
    "mk": "не нѐ",
    "br": "tan tañ",
    "eu": "ama aña",
    "is": "far fár",
    "hy": "տար տառ",
    "ne": "दिन दीन",
    "mn": "ор өр",
    "bs": "kuca kuća",
    "kk": "кол көл",
    "sq": "per për",
    "sw": "ngombe ng'ombe",
    "gl": "ano año",
    "mr": "दर्या दऱ्या",
    "pa": "ਜਨ ਜਿਨ",
    "si": "කල කළ",
    "km": "កា កាំ",
    "sn": "nanga n'anga",
    "yo": "ọkọ ọkọ̀",
    "so": "lo lo'",
    "af": "se sê",
    "oc": "que qué",
    "ka": "კარი ყარი",
    "be": "у ў",
    "tg": "кун кӯн",
    "sd": "ڪر کر",
    "gu": "દિન દીન",
    "am": "ሰማ ሰሚ",
    "yi": "װאָס װאַס",
    "lo": "ກາ ກ່າ",
    "uz": "togʻ tog",
    "fo": "ar ár",
    "ht": "pe pè",
    "ps": "يې یې",
    "tk": "gel göl",
    "nn": "for før",
    "mt": "ma ma'",
    "sa": "फलं फल",
    "lb": "leit léit",
    "my": "က ကာ",
    "bo": "ཀ ཀི",
    "tl": "bata bota",
    "mg": "tona toña",
    "as": "ৰূপ ৰুপ",
    "tt": "кул күл",
    "haw": "ai ʻai",
    "ln": "mɔ̌ mɔ́",
    "ha": "yan 'yan",
    "ba": "кул күл",
    "jw": "kali kāli",
    "su": "eusi ési",
    "yue": "未 末",
}
# different words that `basic` maps to the same text
MORE_DIFFERENT_WORDS = [
    ("hi", "कि की के का"),
    ("hi", "राज राज़ लड़की लड़का"),
    ("ta", "நீ நா நி நு நெ நே"),
    ("th", "กา ก่า ก้า ก๊า ก๋า กำ กิ กี"),
    ("lo", "ມາ ມ່າ ມ້າ ໄມ ໃມ"),
    ("my", "စား စာ စ"),
    ("km", "កក កកា កក់"),
    ("bn", "কি কী বাড়ি বারি ৎ ত"),
    ("te", "కి కీ కు కూ"),
    ("kn", "ಕಿ ಕೀ ಕು"),
    ("ml", "കി കീ അവൻ അവന"),
    ("gu", "કિ કી"),
    ("pa", "ਪਿਤਾ ਪੀਤਾ ਕੰਨ ਕਨ"),
    ("si", "කි කී කු"),
    ("bo", "བོད བད བུད"),
    ("ar", "سال سأل"),
    ("ar", "على علي"),
    ("fa", "گل کل"),
    ("he", "צ'ק צק"),
    ("tr", "ısı isi kar kâr"),
    ("vi", "ma má mà mã mả mạ tu tư"),
    ("de", "Masse Maße"),
    ("ja", "はは ばば ぱぱ おばさん おばあさん ビル ビール"),
    ("ko", "가 각 까"),
    ("hy", "հոտ հոդ"),
    ("ru", "мир мирить угол уголь"),
    ("ca", "cella cel·la"),
]
# language, two spellings of the same text, normalized text
SAME_TEXT = [
    ("fr", "L’homme, l'été!", "l' homme l'e\u0301te\u0301", "l homme l été"),
    ("it", "un’ora dell`arte", "un'ora dell'arte", "un ora dell arte"),
    ("uk", "П’ять м’ята", "пʼять м'ята", "п'ять м'ята"),
    ("tr", "İstanbul’da IŞIK", "I\u0307stanbul'da ışık", "istanbul'da ışık"),
    ("az", "QIZ Bakıdadır…", "qız bakıdadır", "qız bakıdadır"),
    ("he", "צה״ל, ג׳ינס", "צה\"ל ג'ינס", "צהל ג'ינס"),
    ("yi", "װאָס", "וואָס", "וואָס"),
    ("ar", "كـــتاب ٢٠٢٤؟", "كتاب 2024", "كتاب 2024"),
    ("ar", "ﻻ ﷲ", "لا الله", "لا الله"),
    ("fa", "مي\u200cخواهم كتاب", "می\u200cخواهم کتاب", "میخواهم کتاب"),
    ("ur", "كيا ۱۲", "کیا 12", "کیا 12"),
    ("hi", "क\u094d\u200dष २०।", "क\u094dष 20", "क्ष 20"),
    ("hi", "\u0958लम", "\u0915\u093cलम", "\u0915\u093cलम"),
    ("bn", "হঠাত\u09cd\u200d", "হঠাৎ", "হঠাৎ"),
    ("ta", "க\u0bc6\u0bbe", "க\u0bca", "க\u0bca"),
    ("ml", "അവന\u0d4d\u200d", "അവ\u0d7b", "അവ\u0d7b"),
    ("mr", "दर\u094d\u200dया", "दऱ\u094dया", "दऱ\u094dया"),
    ("th", "น\u0e49\u0e33 เเม่", "น\u0e4d\u0e49\u0e32 แม\u0e48", "น้ำ แ ม่"),
    ("hy", "Ի՞նչ է։", "ինչ է", "ինչ է"),
    ("el", "Ο ΔΡΌΜΟΣ;", "ο δρόμος", "ο δρόμοσ"),
    ("ka", "ᲥᲐᲠᲗᲣᲚᲘ", "ქართული", "ქართული"),
    ("ko", "한국어.", "\u1112\u1161\u11ab국어", "한국어"),
    ("ja", "ﾗｰﾒﾝ、２杯！", "ラーメン2杯", "ラ ー メ ン 2 杯"),
    ("zh", "我用iPhone１５，很好。（笑）", "我用 iphone15 很好", "我 用 iphone15 很 好"),
    ("bo", "བོད་ཡིག།", "བོད་ཡིག", "བོད ཡིག"),
    ("am", "ሰላም፡ልዑል።", "ሰላም ልዑል", "ሰላም ልዑል"),
    ("ro", "şi ţară", "și țară", "și țară"),
    ("vi", "hoà thuý quý hoàn", "hòa thúy quý hoàn", "hòa thúy quý hoàn"),
    ("ca", "col·legi l’avi", "coŀlegi l'avi", "col·legi l avi"),
    ("haw", "ʻai", "'ai", "'ai"),
    ("uz", "togʻ", "tog‘", "tog'"),
    ("de", "Größe\u00ad n\u2060ull", "Gro\u0308ße null", "größe null"),
    ("es", "¿Qué\u00a0tal? [risas]", "qué tal", "qué tal"),
]


def distinct(language: str, words: str) -> None:
    _, normalize = normalizer_for("auto", language, {})
    separate = words.split()
    assert len({normalize(word) for word in separate}) == len(separate)
    for word in separate[1:]:  # also in the WER
        assert (
            error_rates([word], [separate[0]], normalize)["wer"]
            > 0
            < error_rates([word], [separate[0]], normalize)["cer"]
        )


def test_every_language_of_whisper_is_tried():
    assert DIFFERENT_WORDS.keys() == LANGUAGES.keys()


@pytest.mark.parametrize("language", DIFFERENT_WORDS)
def test_different_words_stay_different(language):
    distinct(language, DIFFERENT_WORDS[language])


@pytest.mark.parametrize(("language", "words"), MORE_DIFFERENT_WORDS)
def test_marks_tell_words_apart(language, words):
    distinct(language, words)


@pytest.mark.parametrize(("language", "one", "other", "expected"), SAME_TEXT)
def test_one_text_in_two_spellings_is_one(language, one, other, expected):
    _, normalize = normalizer_for("auto", language, {})
    assert (normalize(one), normalize(other)) == (expected, expected)
    assert normalize(normalize(one)) == expected


@pytest.mark.parametrize(
    ("language", "reference", "prediction", "wer", "cer"),
    [
        ("hi", "कि की के", "की कि का", 100.0, 100 * 3 / 8),
        ("hi", "लड़की", "लड़का", 100.0, 100 * 1 / 5),  # dda and its dot are two characters
        ("ta", "நீ நான்", "நா நி ன்", 100 * 3 / 2, 100 * 3 / 7),
        ("th", "ก่า ก้า", "กา ก๊า", 100 * 2 / 4, 100 * 2 / 6),  # 2 of 4 letters with marks, 2 of 6 characters
        ("tr", "ışık", "İşik", 100.0, 100 * 2 / 4),
        ("az", "IŞIQ", "ışıq", 0.0, 0.0),
        ("en", "I'm “there”", "I’m 'there'", 0.0, 0.0),
        ("zh", "今天 iPhone 很好", "今天iphone很 号", 100 * 1 / 5, 100 * 1 / 10),
        # optional marks: may be missing, but different ones are errors
        ("ar", "كَتَبَ الوَلَدُ", "كتب الولد", 0.0, 0.0),
        ("ar", "كتب", "كَتَبَ", 0.0, 0.0),
        ("ar", "مُدَرِّس", "مُدَرِس", 0.0, 0.0),
        ("ar", "كَتَبَ الوَلَدُ", "كُتِبَ الولد", 100 * 1 / 2, 100 * 2 / 9),
        ("he", "שָׁלוֹם", "שלום", 0.0, 0.0),
        ("he", "סֵפֶר", "סַפָּר", 100.0, 100 * 3 / 3),
        ("ru", "за́мок", "замок", 0.0, 0.0),
    ],
)
def test_rates_counted_by_hand(language, reference, prediction, wer, cer):
    _, normalize = normalizer_for("auto", language, {})
    assert error_rates([prediction], [reference], normalize) == pytest.approx({"wer": wer, "cer": cer})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I’m", "I'm"),
        ("don`t you´re she′s ‘tis", "don't you're she's 'tis"),
        ("“Well—so”", '"Well - so"'),
        ("wait…", "wait"),
        ("wait... what", "wait what"),
        ("well\u200b now\ufeff", "well now"),
    ],
)
def test_english_has_one_form_of_quotes(one, other):
    name, normalize = normalizer_for("auto", "en", {})
    assert name == UNIFIED and normalize(one) == normalize(other)


def test_letters_stay_with_their_marks_where_each_is_a_word():
    for language, text, expected in (
        ("th", "ก่า น้ำ", "ก่ า น้ำ"),
        ("lo", "ກ່າ", "ກ່ າ"),
        ("my", "မြန်", "မြ န်"),
        ("my", "ကျောင်းသား စာ", "ကျော င်း သား စာ"),
        ("ja", "か\u3099", "が"),
    ):
        name, normalize = normalizer_for("auto", language, {})
        assert (name, normalize(text)) == (BY_LETTER, expected)
