"""Text normalizers that Whisper's authors don't have: one for all languages, and English with quotes in one form.

The one for all languages makes equal what is one text in two spellings, and nothing else:

- Unicode's compatibility forms (NFKC), lower case of the language, digits of every script as 0 to 9;
- punctuation and symbols are spaces; what stands in brackets is taken out, as Whisper's normalizers do;
- combining marks are parts of letters and stay. What the eye doesn't see is taken out: joiners, soft hyphens,
  variation selectors, Arabic's tatweel, signs of recitation;
- all apostrophes are one, and parts of the words they stand in, as in п'ять and İstanbul'da. After an elision one
  ends a word: l'homme is two words in French, Italian, Catalan and Occitan;
- where words have no spaces between them (`UNSPACED`), every letter with its marks is a word; words and numbers of
  other scripts stay whole. Tibetan's words are its syllables.

Vowel signs of Arabic and Hebrew, and the stress of Cyrillic, are optional in writing: without them a word is no other
one, with others it is (`agree_on_optional_marks`).
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
WORD_SPACE = "\u200b"  # where a word ends, in scripts that don't show it

# not written, by convention: tatweel; Quranic signs; cantillation; Armenian marks of tone, which stand inside words
NOT_WRITTEN = regex.compile(
    "[\u0640\u0610-\u061a\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u08ca-\u08e1\u08e3-\u08ff"
    "\u0591-\u05af\u05bd\u05c4\u05c5\u055b\u055c\u055e\u055f]"
    r"|\p{Default_Ignorable_Code_Point}"
)
# of Arabic, of Hebrew, and what is left of Cyrillic's after NFKC; hamza and madda above a letter make another one
OPTIONAL = regex.compile(
    "[\u064b-\u0652\u0656-\u065f\u0670\u05b0-\u05bc\u05bf\u05c1\u05c2\u05c7]" + r"|(?<=\p{Cyrillic})[\u0300\u0301]"
)
# one letter in two encodings, which Unicode doesn't call equal
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
# the vowel am of Thai and Lao, which NFKC takes apart, with the tone mark before or within
AM = regex.compile("(\u0e4d|\u0ecd)([\u0e48-\u0e4b\u0ec8-\u0ecb]?)(\u0e32|\u0eb2)")
# a tone mark goes after the vowel sign that it stands above
TONE_FIRST = regex.compile("([\u0e48-\u0e4b])([\u0e31\u0e34-\u0e39])|([\u0ec8-\u0ecb])([\u0eb1\u0eb4-\u0eb9])")
SAME_IN = {
    "ro": {"ş": "ș", "ţ": "ț"},
    "fa": {"ي": "ی", "ى": "ی", "ك": "ک"},
    "ur": {"ي": "ی", "ى": "ی", "ك": "ک"},
    "mr": {"\u0930\u094d\u200d": "\u0931\u094d"},  # eyelash ra: दर्‍या is दऱ्या, and दर्या another word
}
# Vietnamese puts the tone of oa, oe and uy on either letter, where the syllable ends with them: hoà is hòa
TONE_MOVED = {
    unicodedata.normalize("NFC", pair + tone): unicodedata.normalize("NFC", pair[0] + tone + pair[1])
    for pair in ("oa", "oe", "uy")
    for tone in "\u0300\u0301\u0303\u0309\u0323"
}
NEW_TONES = regex.compile(rf"(?<!q)(?:{'|'.join(TONE_MOVED)})(?!\p{{L}})")
HEBREW_ACRONYM = regex.compile(r"(?<=\p{Hebrew})\"(?=\p{Hebrew})")

ELIDING = ("fr", "it", "ca", "oc")
# in which an apostrophe is a letter at the beginning or the end of a word, too: ʻai, 'yan, ma', togʻ, lo'
APOSTROPHE_IS_LETTER = ("haw", "ha", "mt", "uz", "so")
WITHIN = r"(?<=[\p{L}\p{M}])'(?=\p{L})"
BESIDE = r"(?<=[\p{L}\p{M}])'|'(?=\p{L})"
NOWHERE = r"(?!)"
STRAY_MARK = regex.compile(r"(?<![\p{L}\p{M}\p{N}])\p{M}+")
UNSPACED_SCRIPTS = "".join(
    rf"\p{{Script_Extensions={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar")
)
LETTER_OR_FOREIGN_WORD = regex.compile(rf"(?:(?![{UNSPACED_SCRIPTS}])\X)+|\X")


class TextNormalizer:
    """Called with a text it returns it normalized, words between single spaces.

    Args:
        normalize: what is done before white space is squeezed.
        by_letter: whether that makes a word of every letter; then the spaces are no characters.
    """

    def __init__(self, normalize: Callable[[str], str], by_letter: bool = False):
        self.normalize = normalize
        self.by_letter = by_letter

    def __call__(self, text: str) -> str:
        return " ".join(self.normalize(text).split())


class MultilingualNormalizer(TextNormalizer):
    """See the module.

    Args:
        language: of the texts, a code or a name. None counts as English.
    """

    def __init__(self, language: str | None):
        self.language = language_code(language) or "en"
        super().__init__(self._words, by_letter=self.language in UNSPACED)
        apostrophe = BESIDE if self.language in APOSTROPHE_IS_LETTER else WITHIN
        apostrophe = NOWHERE if self.language in ELIDING else apostrophe
        # group 1 is kept: apostrophes, and the dot of Catalan's l·l
        self.punctuation = regex.compile(rf"({apostrophe}|(?<=l)·(?=l))|[\p{{P}}\p{{S}}]")

    def _words(self, text: str) -> str:
        # before NFKC, which makes a space and a mark of ´, and after it, which makes an apostrophe and n of ŉ
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
    """The texts without optional marks, but for those that contradict the reference.

    كتب is no error where the reference has كَتَبَ, and كُتِبَ is one: of two aligned words marks count where both have
    some at a letter and neither has those of the other. The references lose all of theirs, so that they are the same
    for every model.

    Args:
        references, predictions: of `MultilingualNormalizer`, clip by clip.
    """
    plain = [OPTIONAL.sub("", text) for text in references]
    judged = [OPTIONAL.sub("", text) for text in predictions]
    for i, (reference, prediction) in enumerate(zip(references, predictions, strict=True)):
        if reference != plain[i] and prediction != judged[i]:
            judged[i] = _with_contradictions(reference.split(), prediction.split())
    return plain, judged


def _with_contradictions(reference: list[str], prediction: list[str]) -> str:
    judged = [OPTIONAL.sub("", word) for word in prediction]
    alignment = jiwer.process_words(" ".join(OPTIONAL.sub("", word) for word in reference), " ".join(judged))
    for chunk in alignment.alignments[0]:
        if chunk.type == "equal":
            spans = range(chunk.ref_start_idx, chunk.ref_end_idx), range(chunk.hyp_start_idx, chunk.hyp_end_idx)
            for theirs, ours in zip(*spans, strict=True):
                judged[ours] = _contradictions(reference[theirs], prediction[ours])
    return " ".join(judged)


def _contradictions(reference: str, word: str) -> str:
    """A word that is the reference's but for optional marks, with those that aren't the reference's at that letter."""
    kept = [
        "" if ours <= theirs or theirs <= ours else "".join(sorted(ours))
        for theirs, ours in zip(_optional_marks(reference), _optional_marks(word), strict=True)
    ]
    return "".join(map("".join, zip(OPTIONAL.sub("", word), kept, strict=True)))


def _optional_marks(word: str) -> list[set[str]]:
    """Those of each letter, other marks counting as letters; a word begins with none."""
    found: list[set[str]] = []
    for i, letter in enumerate(word):
        if OPTIONAL.match(word, i):
            found[-1].add(letter)
        else:
            found.append(set())
    return found


def unify_punctuation(text: str) -> str:
    """English with its apostrophes, quotes and dashes as on a typewriter; several dots are a space.

    Whisper's English normalizer expands I'm, and doesn't know I’m; of "wait..." it leaves a dot as a word.
    """
    text = text.translate(APOSTROPHES | QUOTES | DASHES).replace(WORD_SPACE, " ")
    return regex.sub(r"\.{2,}|…", " ", regex.sub(r"\p{Default_Ignorable_Code_Point}", "", text))
