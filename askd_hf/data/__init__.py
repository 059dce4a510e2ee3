"""Speech: from a directory or the Hub to batches. audio -> features -> batch."""

from .audio import SAMPLING_RATE, AudioError, decode_audio
from .checks import check_clips
from .collator import TEACHER_COLUMNS, SpeechCollator
from .encoder_cache import EncoderCache, cache_encoder, encode, encoder_fingerprint
from .loading import load_speech
from .sampler import ResumableLengthGroupedSampler
from .text import normalize_case

__all__ = [
    "SAMPLING_RATE",
    "TEACHER_COLUMNS",
    "AudioError",
    "EncoderCache",
    "ResumableLengthGroupedSampler",
    "SpeechCollator",
    "cache_encoder",
    "check_clips",
    "decode_audio",
    "encode",
    "encoder_fingerprint",
    "load_speech",
    "normalize_case",
]
