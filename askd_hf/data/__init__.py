"""Speech: from a directory or the Hub to batches. audio -> features -> batch."""

from .audio import SAMPLING_RATE, AudioError, decode_audio
from .checks import Limits, filter_invalid_clips
from .collator import TEACHER_COLUMNS, SpeechCollator
from .encoder_cache import EncoderCache, cache_encoder, encode, encoder_fingerprint
from .loading import load_speech_dataset, to_stream
from .mix import SpeechStream, as_stream, mix, with_negatives
from .sampler import ResumableLengthGroupedSampler, SeededDataset, StreamSampler, stream_sampler
from .text import clean_texts

__all__ = [
    "SAMPLING_RATE",
    "TEACHER_COLUMNS",
    "AudioError",
    "EncoderCache",
    "Limits",
    "ResumableLengthGroupedSampler",
    "SeededDataset",
    "SpeechCollator",
    "SpeechStream",
    "StreamSampler",
    "as_stream",
    "cache_encoder",
    "clean_texts",
    "decode_audio",
    "encode",
    "encoder_fingerprint",
    "filter_invalid_clips",
    "load_speech_dataset",
    "mix",
    "stream_sampler",
    "to_stream",
    "with_negatives",
]
