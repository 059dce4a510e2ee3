"""Text normalizers in addition to Whisper's: one for all languages, and unified punctuation for English.

The multilingual normalizer maps different spellings of the same text to one, and changes nothing else:

- Unicode compatibility forms (NFKC), lower case by the rules of the language, digits of all scripts as 0 to 9;
- punctuation and symbols become spaces; text in brackets is removed, as by Whisper's normalizers;
- combining marks are kept as parts of letters. Invisible characters are removed: joiners, soft hyphens, variation
  selectors, Arabic tatweel, recitation marks;
- all apostrophes are equal and part of the word, as in п'ять and İstanbul'da. In French, Italian, Catalan and Occitan
  an apostrophe ends a word: l'homme is two words;
- in languages without spaces between words (`UNSPACED`), each letter with its marks is a word; words and numbers in
  other scripts are kept whole. The words of Tibetan are its syllables.

Vowel signs of Arabic and Hebrew, and stress marks of Cyrillic, are optional in writing: a word without them equals the
same word with them, but different marks make a different word (`agree_on_optional_marks`).
"""

import unicodedata
from collections.abc import Callable

import jiwer
import regex

from ..data.languages import UNSPACED, language_code, lower_case

BRACKETED = regex.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
APOSTROPHES = dict.fromkeys(map(ord, "’‘‛ʼʻʽʾʿ`´′‵՚׳ꞌ＇"), "'")
QUOTES = dict.fromkeys(map(ord, "“”„‟«»″‶״＂"), '"')
DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−－"), "-")
WORD_SPACE = "\u200b"  # invisible end of a word

# removed: tatweel; Quranic signs; cantillation; Armenian intonation marks, which occur inside words
NOT_WRITTEN = regex.compile(
    "[\u0640\u0610-\u061a\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u08ca-\u08e1\u08e3-\u08ff"
    "\u0591-\u05af\u05bd\u05c4\u05c5\u055b\u055c\u055e\u055f]"
    r"|\p{Default_Ignorable_Code_Point}"
)
# of Arabic, Hebrew, and Cyrillic after NFKC. Hamza and madda aren't optional: they make a different letter
OPTIONAL = regex.compile(
    "[\u064b-\u0652\u0656-\u065f\u0670\u05b0-\u05bc\u05bf\u05c1\u05c2\u05c7]" + r"|(?<=\p{Cyrillic})[\u0300\u0301]"
)
# the same letter in two encodings that Unicode normalization doesn't unify
SAME_LETTERS = {
    "\u0e40\u0e40": "\u0e41",  # Thai: two signs e for ae
    "\u05f0": "\u05d5\u05d5",  # Yiddish digraphs
    "\u05f1": "\u05d5\u05d9",
    "\u05f2": "\u05d9\u05d9",
    "\u09a4\u09cd\u200d": "\u09ce",  # Bengali khanda ta; the rest Malayalam's chillu letters
    "\u0d23\u0d4d\u200d": "\u0d7a",
    "\u0d28\u0d4d\u200d": "\u0d7b",
    "\u0d30\u0d4d\u200d": "\u0d7c",
    "\u0d32\u0d4d\u200d": "\u0d7d",
    "\u0d33\u0d4d\u200d": "\u0d7e",
    "\u0d15\u0d4d\u200d": "\u0d7f",
}
# the vowel am of Thai and Lao, which NFKC decomposes, with the tone mark before or inside
AM = regex.compile("(\u0e4d|\u0ecd)([\u0e48-\u0e4b\u0ec8-\u0ecb]?)(\u0e32|\u0eb2)")
# a tone mark typed before the vowel sign that it is written above; the standard order is the reverse
TONE_FIRST = regex.compile("([\u0e48-\u0e4b])([\u0e31\u0e34-\u0e39])|([\u0ec8-\u0ecb])([\u0eb1\u0eb4-\u0eb9])")
SAME_IN = {
    "ro": {"ş": "ș", "ţ": "ț"},
    "fa": {"ي": "ی", "ى": "ی", "ك": "ک"},
    "ur": {"ي": "ی", "ى": "ی", "ك": "ک"},
    "mr": {"\u0930\u094d\u200d": "\u0931\u094d"},  # eyelash ra: दर्‍या equals दऱ्या; दर्या is a different word
}
# Vietnamese writes the tone of oa, oe and uy at the end of a syllable on either letter: hoà equals hòa
TONE_MOVED = {
    unicodedata.normalize("NFC", pair + tone): unicodedata.normalize("NFC", pair[0] + tone + pair[1])
    for pair in ("oa", "oe", "uy")
    for tone in "\u0300\u0301\u0303\u0309\u0323"
}
NEW_TONES = regex.compile(rf"(?<!q)(?:{'|'.join(TONE_MOVED)})(?!\p{{L}})")
HEBREW_ACRONYM = regex.compile(r"(?<=\p{Hebrew})\"(?=\p{Hebrew})")

ELIDING = ("fr", "it", "ca", "oc")
# languages in which an apostrophe is also a letter at the start or end of a word: ʻai, 'yan, ma', togʻ, lo'
APOSTROPHE_IS_LETTER = ("haw", "ha", "mt", "uz", "so")
WITHIN = r"(?<=[\p{L}\p{M}])'(?=\p{L})"
BESIDE = r"(?<=[\p{L}\p{M}])'|'(?=\p{L})"
NOWHERE = r"(?!)"
STRAY_MARK = regex.compile(r"(?<![\p{L}\p{M}\p{N}])\p{M}+")
UNSPACED_SCRIPTS = "".join(
    rf"\p{{Script_Extensions={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar")
)
# with \p{M}*, as \X leaves out some vowel signs of Burmese
LETTER_OR_FOREIGN_WORD = regex.compile(rf"(?:(?![{UNSPACED_SCRIPTS}])\X)+|\X\p{{M}}*")


class TextNormalizer:
    """Normalizes a text to words separated by single spaces.

    Args:
        normalize: applied before white space is collapsed.
        by_letter: whether `normalize` makes each letter a word; then spaces aren't counted as characters.
    """

    def __init__(self, normalize: Callable[[str], str], by_letter: bool = False):
        self.normalize = normalize
        self.by_letter = by_letter

    def __call__(self, text: str) -> str:
        return " ".join(self.normalize(text).split())


class MultilingualNormalizer(TextNormalizer):
    """The multilingual normalizer described in the module docstring.

    Args:
        language: language of the texts, a code or a name. None counts as English.
    """

    def __init__(self, language: str | None):
        self.language = language_code(language) or "en"
        super().__init__(self._words, by_letter=self.language in UNSPACED)
        apostrophe = BESIDE if self.language in APOSTROPHE_IS_LETTER else WITHIN
        apostrophe = NOWHERE if self.language in ELIDING else apostrophe
        # group 1 is kept: apostrophes, and the dot of Catalan l·l
        self.punctuation = regex.compile(rf"({apostrophe}|(?<=l)·(?=l))|[\p{{P}}\p{{S}}]")

    def _words(self, text: str) -> str:
        # both before NFKC, which decomposes ´ to a space and a mark, and after it, which decomposes ŉ to ʼn
        text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES | QUOTES)).translate(APOSTROPHES)
        text = self._same_letters(lower_case(text, self.language))
        text = NOT_WRITTEN.sub("", text.replace(WORD_SPACE, " "))
        text = BRACKETED.sub("", unicodedata.normalize("NFC", text))
        text = HEBREW_ACRONYM.sub("", text)
        text = self.punctuation.sub(lambda found: found[1] or " ", text)
        text = STRAY_MARK.sub("", text)
        return LETTER_OR_FOREIGN_WORD.sub(r"\g<0> ", text) if self.by_letter else text

    def _same_letters(self, text: str) -> str:
        text = regex.sub(r"\p{Nd}", lambda digit: str(unicodedata.decimal(digit[0])), text.replace("ς", "σ"))
        for other, one in (SAME_LETTERS | SAME_IN.get(self.language, {})).items():
            text = text.replace(other, one)
        text = AM.sub(lambda am: am[2] + ("\u0e33" if am[3] == "\u0e32" else "\u0eb3"), text)
        text = TONE_FIRST.sub(lambda pair: pair[0][::-1], text)
        return NEW_TONES.sub(lambda pair: TONE_MOVED[pair[0]], text) if self.language == "vi" else text


def agree_on_optional_marks(references: list[str], predictions: list[str]) -> tuple[list[str], list[str]]:
    """Remove optional marks, except those of a prediction that contradict its reference.

    For the reference كَتَبَ, the prediction كتب is correct and كُتِبَ is an error. In two aligned words, marks count at
    a letter if both words have marks there and neither set contains the other. All marks of the references are
    removed, so that the references are equal for all models.

    Args:
        references, predictions: outputs of `MultilingualNormalizer`, one per clip.
    """
    plain = [OPTIONAL.sub("", text) for text in references]
    kept = [OPTIONAL.sub("", text) for text in predictions]
    for i, (reference, prediction) in enumerate(zip(references, predictions, strict=True)):
        if reference != plain[i] and prediction != kept[i]:
            kept[i] = _with_contradictions(reference.split(), prediction.split())
    return plain, kept


def _with_contradictions(reference: list[str], prediction: list[str]) -> str:
    words = [OPTIONAL.sub("", word) for word in prediction]
    alignment = jiwer.process_words(" ".join(OPTIONAL.sub("", word) for word in reference), " ".join(words))
    for chunk in alignment.alignments[0]:
        if chunk.type == "equal":
            spans = range(chunk.ref_start_idx, chunk.ref_end_idx), range(chunk.hyp_start_idx, chunk.hyp_end_idx)
            for of_reference, of_prediction in zip(*spans, strict=True):
                words[of_prediction] = _contradictions(reference[of_reference], prediction[of_prediction])
    return " ".join(words)


def _contradictions(reference: str, word: str) -> str:
    """Return a word equal to the reference except for optional marks, with only the marks that contradict it."""
    kept = [
        "" if marks <= expected or expected <= marks else "".join(sorted(marks))
        for expected, marks in zip(_optional_marks(reference), _optional_marks(word), strict=True)
    ]
    return "".join(map("".join, zip(OPTIONAL.sub("", word), kept, strict=True)))


def _optional_marks(word: str) -> list[set[str]]:
    """Return the optional marks of each letter. Other marks count as letters; a word doesn't start with a mark."""
    found: list[set[str]] = []
    for i, letter in enumerate(word):
        if OPTIONAL.match(word, i):
            found[-1].add(letter)
        else:
            found.append(set())
    return found


def unify_punctuation(text: str) -> str:
    """Replace apostrophes, quotes and dashes by their ASCII forms, and several dots by a space.

    Whisper's English normalizer expands I'm but not I’m, and leaves a dot as a word of "wait...".
    """
    text = text.translate(APOSTROPHES | QUOTES | DASHES).replace(WORD_SPACE, " ")
    return regex.sub(r"\.{2,}|…", " ", regex.sub(r"\p{Default_Ignorable_Code_Point}", "", text))
