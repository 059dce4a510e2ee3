"""Times of words in a known transcript, from a decoder's cross-attention, as transformers and faster-whisper do it.

Dynamic time warping aligns tokens with encoder positions. Its input is the mean over some heads, the alignment heads,
of their attention weights, normalized over the tokens and smoothed over time.
"""

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer
from transformers.models.whisper.generation_whisper import _median_filter
from transformers.models.whisper.tokenization_whisper import LANGUAGES, _combine_tokens_into_words

from ..data.audio import extract_features, waveform
from ..data.audio_context import FRAMES_PER_POSITION
from ..data.encoder_cache import run_encoder
from ..data.labels import TIME_PRECISION, prefix_ids, text_ids

DIAGONAL, NEXT_ROW, NEXT_COLUMN = range(3)  # steps of a path, as transformers number them
UNSPOKEN = re.compile(r"[\W_]+")


class Words(NamedTuple):
    """The words of a transcript, and the rows of its alignment at which they begin and end.

    Row `i` begins with token `i`. A word ends where the token after it begins.
    """

    texts: list[str]
    starts: np.ndarray  # int `(words,)`
    ends: np.ndarray


def split_words(
    tokenizer: WhisperTokenizer, tokens: list[int], language: str | None = None, task: str | None = None
) -> Words:
    """Split the tokens of a transcript into words, as transformers do for word timestamps.

    Args:
        language: of the audio, a code; None for the tokenizer's, or else English.
        task: with "translate" the transcript is English; None for the tokenizer's.
    """
    language = language or tokenizer.language or "en"
    if (task or tokenizer.task) == "translate":
        language = "en"
    words, _, indices = _combine_tokens_into_words(tokenizer, tokens, LANGUAGES.get(language, language))
    return Words(words, np.array([of[0] for of in indices]), np.array([of[-1] + 1 for of in indices]))


@contextlib.contextmanager
def attending(*models: WhisperForConditionalGeneration) -> Iterator[None]:
    """Within the block, use eager attention, which returns its weights, and evaluation mode."""
    before = [(model, model.config._attn_implementation, model.training) for model in models]
    try:
        for model in models:
            model.set_attn_implementation("eager")
            model.eval()
        yield
    finally:
        for model, attention, training in before:
            model.set_attn_implementation(attention)
            model.train(training)


@torch.inference_mode()
def encode(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, wave: np.ndarray
) -> tuple[Tensor, int]:
    """Return the encoder's output of a clip, `(1, positions, width)`, and the number of positions with speech."""
    features = extract_features(processor.feature_extractor, [wave], with_mask=True)
    states = run_encoder(model.model.encoder, features["input_features"].to(model.device, model.dtype))
    return states, int(features["attention_mask"].sum()) // FRAMES_PER_POSITION


@torch.inference_mode()
def attention_of_heads(
    model: WhisperForConditionalGeneration,
    states: Tensor,
    positions: int,
    prefix: list[int],
    text: list[int],
    heads: Sequence[Sequence[int]],
) -> np.ndarray:
    """Return the normalized and smoothed cross-attention of some heads, teacher-forced on a transcript.

    A head whose weights have no variation over the tokens at some position has NaN there (division by a standard
    deviation of 0), as in transformers.

    Args:
        model: with eager attention, in evaluation mode.
        states, positions: see `encode`.
        prefix: tokens before the text, `<|notimestamps|>` last.
        text: tokens of the text.
        heads: (layer, head) each.

    Returns:
        float32 `(heads, text tokens + 1, positions)`. Row `i` is the query that predicts text token `i`; the last row
        predicts the end of text.
    """
    tokens = torch.tensor([[*prefix, *text]], device=model.device)
    output = model.model.decoder(tokens, encoder_hidden_states=states, use_cache=False, output_attentions=True)
    weights = torch.stack([output.cross_attentions[layer][0, head] for layer, head in heads])
    weights = weights[:, len(prefix) - 1 :, :positions].float()
    std, mean = torch.std_mean(weights, dim=-2, keepdim=True, correction=0)
    return _median_filter((weights - mean) / std, model.config.median_filter_width).cpu().numpy()


def align(matrices: np.ndarray) -> np.ndarray:
    """Return the column at which each row of the best path begins, as transformers' `_dynamic_time_warping`.

    All matrices are processed together, one anti-diagonal per step: at most a tenth of the time of transformers' loop.

    Args:
        matrices: mean attention `(matrices, rows, columns)`, without NaN.

    Returns:
        int `(matrices, rows)`.
    """
    count, rows, columns = matrices.shape
    # cell (i, j) of the cost is at [i + j, i], for i and j from 0; step `i + j` has -matrix[i - 1, j - 1]
    skewed = np.full((rows + columns + 1, count, rows + 1), np.inf)
    for row in range(rows):
        skewed[row + 2 : row + 2 + columns, :, row + 1] = -matrices[:, row].T.astype(np.float64)
    trace = np.full(skewed.shape, NEXT_COLUMN, dtype=np.uint8)
    before, last = np.full((2, count, rows + 1), np.inf, dtype=np.float32)
    before[:, 0] = 0  # the diagonal of (0, 0); that of (0, 1) and (1, 0) is infinite
    for step in range(2, rows + columns + 1):
        diagonal, next_row, next_column = before[:, :-1], last[:, :-1], last[:, 1:]
        cost = next_column.copy()
        by_row = (next_row < diagonal) & (next_row < next_column)
        by_both = (diagonal < next_row) & (diagonal < next_column)
        cost[by_row], cost[by_both] = next_row[by_row], diagonal[by_both]
        trace[step, :, 1:][by_row], trace[step, :, 1:][by_both] = NEXT_ROW, DIAGONAL
        before, last = last, np.full_like(last, np.inf)
        last[:, 1:] = skewed[step, :, 1:] + cost
    return np.array([_starts(trace[:, i], rows, columns) for i in range(count)], dtype=int).reshape(count, rows)


def _starts(trace: np.ndarray, rows: int, columns: int) -> list[int]:
    """Return the first column of each row on the path that ends at the last cell."""
    starts, row, column = [0] * rows, rows, columns
    while row and column:
        starts[row - 1] = column - 1
        step = trace[row + column, row]
        row -= step != NEXT_COLUMN
        column -= step != NEXT_ROW
    return starts


def transcript_tokens(tokenizer: WhisperTokenizer, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the prefix, with `<|notimestamps|>`, and the tokens of a row's text in its language and task."""
    language, task = row.get("language"), row.get("task")
    return prefix_ids(tokenizer, language, task, timestamps=False), text_ids(tokenizer, row["text"], language, task)


def time_words(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, row: Mapping[str, Any]
) -> list[tuple[float, float, str]]:
    """Return start and end in seconds, and text, of each word of a known transcript.

    Args:
        model: with alignment heads in its generation config.
        row: `audio`, `clip`, `text`; optionally `language` and `task`.
    """
    prefix, text = transcript_tokens(processor.tokenizer, row)
    with attending(model):
        encoded = encode(model, processor, waveform(row))
        attention = attention_of_heads(model, *encoded, prefix, text, model.generation_config.alignment_heads)
    words = split_words(processor.tokenizer, text, row.get("language"), row.get("task"))
    times = to_seconds(align(attention.mean(0, keepdims=True))[0])
    return list(zip(times[words.starts].tolist(), times[words.ends].tolist(), words.texts, strict=True))


def matching_words(words: list[str], others: list[str]) -> list[tuple[int, int]]:
    """Return the indices of the words that two texts have in common, in order. Case and punctuation don't count."""
    keys, other_keys = ([UNSPOKEN.sub("", word).lower() or word for word in of] for of in (words, others))
    blocks = difflib.SequenceMatcher(None, keys, other_keys, autojunk=False).get_matching_blocks()
    return [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]


def to_seconds(columns: np.ndarray) -> np.ndarray:
    """Return the times of encoder positions."""
    return columns * TIME_PRECISION
