"""Tiny Whisper models and processors, all made offline."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)

from askd_hf.models.loading import load_processor, load_whisper

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]
MULTILINGUAL = ("<|en|>", "<|zh|>", "<|translate|>")  # languages in the order of Whisper's own list
# The ids of `tiny_processor`: a 0, b 1, c 2, space 3, then
TINY_SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|notimestamps|>",
]
END, START, ENGLISH, TRANSCRIBE, NO_TIMESTAMPS = 4, 5, 6, 8, 9


def make_tokenizer(
    letters: Iterable[str], added: Iterable[str], merges: Iterable[tuple[str, str]] = ()
) -> WhisperTokenizer:
    """A vocabulary of letters and what is merged of them, and behind them the special tokens `added`."""
    pieces = [*letters, *("".join(pair) for pair in merges)]
    tokenizer = WhisperTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=list(merges),
        unk_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.set_prefix_tokens()  # looks the added tokens up
    return tokenizer


def make_processor(more_tokens: tuple[str, ...] = ()) -> WhisperProcessor:
    """One-second windows of 100 frames, 8 mel bins; a vocabulary of letters."""
    tokenizer = make_tokenizer("abcdefghijklmnopqrstuvwxyzĠ", [*SPECIAL[:2], *more_tokens, *SPECIAL[2:]])
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return WhisperProcessor(extractor, tokenizer)


def make_whisper(processor: WhisperProcessor, seed: int = 0, **changes) -> WhisperForConditionalGeneration:
    """A randomly initialized Whisper of width 16 with 2 encoder and 4 decoder layers."""
    token = processor.tokenizer.convert_tokens_to_ids
    options = dict(
        vocab_size=len(processor.tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=4,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=token("<|startoftranscript|>"),
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|endoftext|>"),
        pad_token_id=token("<|endoftext|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.3,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(**(options | changes)))
    model.generation_config._from_model_config = False  # as one that was read from its file
    model.generation_config.no_timestamps_token_id = token("<|notimestamps|>")
    model.generation_config.is_multilingual = False
    model.generation_config.max_length = 12  # a random model finds no end
    return model


def save_whisper(directory: Path, **changes) -> Path:
    """Save `make_whisper` and its processor, and return the directory."""
    processor = make_processor()
    make_whisper(processor, **changes).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def make_multilingual() -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """As `make_whisper`, of English and Chinese, configured as OpenAI's multilingual models are."""
    processor = make_processor(MULTILINGUAL)
    model = make_whisper(processor)
    token = processor.tokenizer.convert_tokens_to_ids
    settings = dict(
        is_multilingual=True,
        lang_to_id={name: token(name) for name in ("<|en|>", "<|zh|>")},
        task_to_id={name: token(f"<|{name}|>") for name in ("transcribe", "translate")},
        alignment_heads=[[1, 0], [3, 1]],
        forced_decoder_ids=[[1, None], [2, token("<|transcribe|>")]],
    )
    for name, value in settings.items():  # `update` knows only names that are there already
        setattr(model.generation_config, name, value)
    return model, processor


def tiny_processor() -> WhisperProcessor:
    """Windows of one second, 8 mel bins, a vocabulary of three letters."""
    tokenizer = WhisperTokenizer(vocab={"a": 0, "b": 1, "c": 2, "Ġ": 3}, merges=[])
    tokenizer.add_tokens(TINY_SPECIAL, special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.set_prefix_tokens()  # those of before, when there was no start token, would stay otherwise
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)


def by_pipeline(directory: Path, wave: np.ndarray, **options) -> str:
    """The text of a saved model as anyone gets it, from Transformers alone."""
    transcribe = pipeline("automatic-speech-recognition", model=str(directory))
    options |= dict(num_beams=1)
    return spoken(transcribe({"raw": wave, "sampling_rate": 16_000}, generate_kwargs=options)["text"])


def spoken(text: str) -> str:
    """Without the special tokens that a random model gives anywhere: pipelines know only those in their places."""
    return re.sub(r"<\|[^|]*\|>", "", text).strip()


def by_generate(directory: Path, wave: np.ndarray, **options) -> str:
    """The text of a saved model as `load_whisper` loads it."""
    model, processor = load_whisper(str(directory)).eval(), load_processor(str(directory))
    features = processor.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    tokens = model.generate(features, num_beams=1, **options)
    return spoken(processor.tokenizer.decode(tokens[0]))
