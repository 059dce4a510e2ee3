"""The option `normalizer` of training and evaluation."""

from typing import Literal

Normalizer = Literal["auto", "english-unified", "multilingual", "english", "basic", "open-asr-leaderboard", "none"]

# descriptions for --help, tables and cards
NORMALIZERS = {
    "english-unified": "Whisper's English normalizer, applied after apostrophes, quotes, dashes and dots are unified",
    "multilingual": "removes case, punctuation and spelling variants, and keeps combining marks",
    "english": "Whisper's English normalizer",
    "basic": "Whisper's basic normalizer",
    "open-asr-leaderboard": "the Open ASR Leaderboard's English normalizer, from its checkout on the PYTHONPATH",
    "none": "no normalization",
}
NORMALIZER_HELP = (
    "auto: english-unified for English, multilingual for other languages. "
    + "".join(f"{name}: {description}. " for name, description in NORMALIZERS.items())
    + "multilingual and basic make each letter a word in languages without spaces; basic splits words at combining "
    "marks."
)
