"""How fast a transcript would have to be spoken."""

import unicodedata

# Letters a second. Fast speech has 20 to 25 in languages with alphabets, played at twice the speed 30.
FASTEST = 35.0
# One of these is about a syllable, and so as much as 2.5 letters: 14 a second. Fast Japanese has 10 to 12 moras.
SYLLABLES = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL SYLLABLE", "BOPOMOFO", "YI ", "ETHIOPIC", "CHEROKEE", "VAI")
LETTERS_A_SYLLABLE = 2.5
SLACK = 0.5  # seconds: words cut at the ends of short clips


def too_fast(text: str, seconds: float) -> str | None:
    """Why a text can't be what is said in a clip, if it is more than anybody says in the time; otherwise None.

    A digit counts as a letter, though it takes longer to say; punctuation and combining marks don't count.
    """
    letters = spoken_letters(text)
    if letters <= FASTEST * (seconds + SLACK):
        return None
    return (
        f"transcript too long for its audio: as much as {letters:.0f} letters in {seconds:.2f} s, the fastest say "
        f"{FASTEST:.0f} a second"
    )


def spoken_letters(text: str) -> float:
    """Letters and digits, a character that is a syllable as `LETTERS_A_SYLLABLE`."""
    letters = [character for character in unicodedata.normalize("NFC", text) if character.isalnum()]
    return sum(LETTERS_A_SYLLABLE if _is_syllable(character) else 1.0 for character in letters)


def _is_syllable(character: str) -> bool:
    return character > "\u1000" and unicodedata.name(character, "").startswith(SYLLABLES)
