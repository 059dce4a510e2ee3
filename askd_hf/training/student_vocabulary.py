"""Choose and apply the smaller vocabulary of `--vocabulary`."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import WhisperForConditionalGeneration, WhisperTokenizer

from ..arguments import DataArguments
from ..data import SpeechCollator
from ..errors import UserError
from ..models.smaller_vocabulary import (
    choose_domain_tokens,
    choose_tokens,
    count_tokens,
    smaller_tokenizer,
    vocabulary_size,
    with_smaller_vocabulary,
)
from ..models.window import window_seconds
from .datasets import training_splits, with_clean_labels

logger = logging.getLogger(__name__)

AUTO = "auto"
LABEL_COLUMNS = ("text", "language", "task", "segments", "prompt")


def check_vocabulary_size(
    vocabulary: str, student: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, streaming: bool
) -> None:
    """Raise `UserError` if `--vocabulary` doesn't fit the student, or needs the transcripts of a stream."""
    if vocabulary == AUTO and streaming:
        raise UserError(
            "--vocabulary auto is not supported with --streaming, whose transcripts are unknown: give a text file "
            "with transcripts of this kind, or a number"
        )
    if not vocabulary.isdecimal():
        return
    size = student.config.vocab_size
    fewest = vocabulary_size(tokenizer, size, window_seconds(student))
    if not fewest <= int(vocabulary) <= size:
        raise UserError(
            f"--vocabulary must be between {fewest} (bytes, special tokens and the timestamps of the window) and "
            f"{size}, the teacher's, got {vocabulary}"
        )


def transcripts(
    vocabulary: str, data_args: DataArguments, collator: SpeechCollator, multilingual: bool, streaming: bool
) -> Iterable[Mapping[str, Any]]:
    """Return the rows whose labels decide which tokens are kept: the lines of a file, or the training transcripts.

    Empty for a stream.
    """
    if vocabulary != AUTO and not vocabulary.isdecimal():
        lines = Dataset.from_dict({"text": Path(vocabulary).read_text(encoding="utf-8").splitlines()})
        return with_clean_labels(lines, vocabulary, data_args.train_sources()[0], data_args, collator)
    if streaming:
        return []
    # pieces of long clips may have other tokens than the whole text, as in languages without spaces
    cut_long = data_args.long_clips == "cut"
    splits: list[Any] = training_splits(data_args, collator, multilingual, cut_long=cut_long)
    return (row for split in splits for row in _labels(split))


def _labels(split: Dataset) -> Dataset:
    return split.select_columns([name for name in LABEL_COLUMNS if name in split.column_names])


def reduce_student(
    vocabulary: str,
    student: WhisperForConditionalGeneration,
    tokenizer: WhisperTokenizer,
    rows: Iterable[Mapping[str, Any]],
    min_count: int,
) -> tuple[WhisperForConditionalGeneration, WhisperTokenizer]:
    """Return student and tokenizer with the vocabulary of `--vocabulary`.

    Args:
        rows: of `transcripts`.
        min_count: `--vocabulary_min_count`.
    """
    size, window = student.config.vocab_size, window_seconds(student)
    counts = count_tokens(tokenizer, rows)
    if vocabulary.isdecimal():
        number = int(vocabulary) - vocabulary_size(tokenizer, size, window)
        kept = choose_tokens(tokenizer, counts, number, min_count=min_count)
    else:
        kept = choose_domain_tokens(tokenizer, size, window, counts)
    smaller = smaller_tokenizer(tokenizer, size, kept, window)
    reduced = with_smaller_vocabulary(student, tokenizer, smaller, window)
    logger.warning(
        "vocabulary: %d of the teacher's %d tokens; %.1f million weights instead of %.1f with all tokens",
        reduced.config.vocab_size,
        size,
        reduced.num_parameters() / 1e6,
        student.num_parameters() / 1e6,
    )
    return reduced, smaller
