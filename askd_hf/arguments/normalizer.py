"""The option `normalizer` of training and evaluation."""

from typing import Literal

Normalizer = Literal["auto", "english-unified", "multilingual", "english", "basic", "open-asr-leaderboard", "none"]


NORMALIZER_HELP = (
    "auto: english-unified for English, else multilingual. english-unified: Whisper's English normalizer with unified "
    "apostrophes, quotes and dots. multilingual: without case, punctuation and spelling variants; keeps combining "
    "marks; splits letters in languages without spaces. english, basic: Whisper's normalizers; basic splits words at "
    "combining marks. open-asr-leaderboard: that of a checkout on the PYTHONPATH. none: unchanged text."
)
