"""Speech: from a directory or the Hub to batches. audio -> features -> batch."""

from .audio import SAMPLING_RATE, AudioError, decode_audio
from .checks import check_clips
from .collator import SpeechCollator
from .loading import load_speech
from .text import normalize_case

__all__ = [
    "SAMPLING_RATE",
    "AudioError",
    "SpeechCollator",
    "check_clips",
    "decode_audio",
    "load_speech",
    "normalize_case",
]
