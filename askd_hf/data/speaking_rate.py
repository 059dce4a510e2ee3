"""Detect transcripts that are too long to be spoken in the duration of their clip."""

import unicodedata

# Letters per second. Fast speech has 20 to 25 in alphabetic languages, and 30 if played at twice the speed.
MAX_LETTERS_PER_SECOND = 35.0
# Scripts in which a character is about a syllable. It counts as 2.5 letters, so that the limit is 14 syllables per
# second. Fast Japanese has 10 to 12 moras per second.
SYLLABIC_SCRIPTS = (
    *("CJK", "HIRAGANA", "KATAKANA", "HANGUL SYLLABLE", "BOPOMOFO"),
    *("YI ", "ETHIOPIC", "CHEROKEE", "VAI"),
)
LETTERS_PER_SYLLABLE = 2.5
TOLERANCE = 0.5  # seconds: words cut off at the ends of short clips


def speaking_rate_error(text: str, duration: float) -> str | None:
    """Return an error if the text is longer than anybody can say in `duration` seconds, else None.

    A digit counts as one letter, although it takes longer to say. Punctuation and combining marks don't count.
    """
    letters = spoken_letters(text)
    if letters <= MAX_LETTERS_PER_SECOND * (duration + TOLERANCE):
        return None
    return (
        f"transcript too long for its audio: {letters:.0f} letters in {duration:.2f} s, the limit is "
        f"{MAX_LETTERS_PER_SECOND:.0f} per second"
    )


def spoken_letters(text: str) -> float:
    """Return the number of letters and digits; a syllabic character counts as `LETTERS_PER_SYLLABLE`."""
    letters = [character for character in unicodedata.normalize("NFC", text) if character.isalnum()]
    return sum(LETTERS_PER_SYLLABLE if _is_syllable(character) else 1.0 for character in letters)


def _is_syllable(character: str) -> bool:
    return character > "\u1000" and unicodedata.name(character, "").startswith(SYLLABIC_SCRIPTS)
