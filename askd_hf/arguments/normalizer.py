"""The option `normalizer`, which training and all evaluations have."""

from typing import Literal

Normalizer = Literal["auto", "english-unified", "multilingual", "english", "basic", "open-asr-leaderboard", "none"]


NORMALIZER_HELP = (
    "auto: english-unified for English, multilingual for other languages. english-unified: Whisper's English one, "
    "after apostrophes, quotes and dots are brought into one form. multilingual: without case, punctuation and "
    "variants of spelling, combining marks kept, by letter in languages without spaces. english, basic: Whisper's "
    "own, basic breaks up words with combining marks. open-asr-leaderboard: of a checkout on the PYTHONPATH. none: "
    "texts as they are."
)
