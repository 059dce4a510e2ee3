"""Load speech from a directory or the Hub, validate and mix it, and collate it into batches."""

from .audio import SAMPLING_RATE, AudioError, decode_audio
from .checks import Limits, filter_invalid_clips
from .collator import TEACHER_COLUMNS, SpeechCollator
from .encoder_cache import EncoderCache, cache_encoder, encoder_fingerprint, run_encoder
from .loading import load_speech_dataset, to_iterable_dataset
from .mix import mix, select_training_columns, with_no_speech
from .sampler import PaddedDataset, ResumableLengthGroupedSampler, SeededDataset, StreamSampler, pad_last_batches
from .stream import SpeechStream
from .text import clean_texts
