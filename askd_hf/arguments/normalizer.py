"""The option `normalizer` of training and evaluation."""

from typing import Literal

Normalizer = Literal["auto", "english-unified", "multilingual", "english", "basic", "open-asr-leaderboard", "none"]


NORMALIZER_HELP = (
    "auto: english-unified for English, multilingual for other languages. english-unified: Whisper's English "
    "normalizer, after unifying apostrophes, quotes and dots. multilingual: removes case, punctuation and spelling "
    "variants, keeps combining marks; each letter is a word in languages without spaces. english, basic: Whisper's "
    "own; basic splits words with combining marks. open-asr-leaderboard: from a checkout on the PYTHONPATH. none: no "
    "normalization."
)
