"""Build the decoder input and the labels of a transcript.

    input    <|startofprev|>  prompt     <|startoftranscript|>  <|fr|>          <|transcribe|>  <|0.00|>  text
    labels   (masked)         (masked)   <|fr|>                 <|transcribe|>  <|0.00|>        text      <|1.28|>

This is the training format of Whisper (Radford et al. 2022, section 2.3). Without timestamps, <|notimestamps|>
precedes the text. English-only models have no language and task tokens. <|startofprev|> is present only with a prompt.

Texts start with a space, as Whisper's do, except in languages without spaces (`text_ids`). " The" and "The" are
different tokens: without the space, teacher and labels would disagree on the first word of every clip.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import WhisperTokenizer

from ..errors import UserError
from .languages import TASKS, word_separator

LABEL_PAD_TOKEN_ID = -100
MARK_SPLIT = re.compile(r"(?<=<)(?=\|)")
TIME_PRECISION = 0.02  # seconds per encoder position, and between two timestamp tokens


class DecoderTokens(NamedTuple):
    """Decoder input and labels of a clip, lists of equal length."""

    decoder_input_ids: list[int]
    labels: list[int]


def prefix_ids(tokenizer: WhisperTokenizer, language: str | None, task: str | None, timestamps: bool) -> list[int]:
    """Return the tokens from `<|startoftranscript|>` up to the text.

    Args:
        language: a code such as "fr"; None for the language and task set in the tokenizer (`set_prefix_tokens`), or
            for an English-only tokenizer, which has neither.
        task: "transcribe" or "translate"; None for "transcribe".
        timestamps: False to append `<|notimestamps|>`.
    """
    no_timestamps = token_id(tokenizer, "<|notimestamps|>")
    prefix = [i for i in tokenizer.prefix_tokens if i != no_timestamps]
    if language is not None:
        prefix = [prefix[0], *_language_task_ids(tokenizer, language, task or "transcribe")]
    return prefix if timestamps else [*prefix, no_timestamps]


def _language_task_ids(tokenizer: WhisperTokenizer, language: str, task: str) -> list[int]:
    if task not in TASKS:
        raise UserError(
            f"task must be transcribe or translate, got {task!r} (column `task`; --task transcribe overrides it)"
        )
    if not language:
        raise UserError("no language: column `language` is empty (--language overrides it)")
    try:
        return [token_id(tokenizer, f"<|{name}|>") for name in (language, task)]
    except UserError:
        raise UserError(
            f"the model doesn't support language {language!r} (column `language`, or --language)"
        ) from None


def token_id(tokenizer: WhisperTokenizer, token: str) -> int:
    """Return the id of a special token. Raise `UserError` if the tokenizer doesn't have it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        raise UserError(f"the model's tokenizer has no {token}")
    return found


def text_ids(
    tokenizer: WhisperTokenizer, text: str, language: str | None = None, task: str | None = None
) -> list[int]:
    """Return the tokens of a transcript, segment or prompt, with Whisper's leading space.

    Special tokens and timestamps in the text are tokenized as ordinary characters.

    Args:
        text: stripped of surrounding white space. An empty text has no tokens.
        language: a code such as "fr"; None for the tokenizer's, or else English.
        task: "transcribe" or "translate"; None for the tokenizer's, or else "transcribe".
    """
    text = text.strip()
    if not text:
        return []
    separator = word_separator(language or tokenizer.language, task or tokenizer.task)
    # split_special_tokens doesn't split timestamps, which aren't special tokens: separate `<` and `|`
    pieces = MARK_SPLIT.split(f"{separator}{text}")
    return [token for piece in pieces for token in _ordinary_ids(tokenizer, piece)]


def _ordinary_ids(tokenizer: WhisperTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def segment_ids(
    tokenizer: WhisperTokenizer,
    segments: list[Mapping[str, Any]],
    max_timestamp_index: int,
    time_factor: float = 1.0,
    language: str | None = None,
    task: str | None = None,
) -> list[int]:
    """Return the tokens of segments, each between its timestamp tokens.

    Args:
        segments: `{"start": seconds, "end": seconds, "text": str}` each. The last `end` may be None if the speech
            continues after the clip; then there is no end token.
        max_timestamp_index: last timestamp, in steps of `TIME_PRECISION`; later times are set to it.
        time_factor: augmented duration / original duration; segment times are multiplied by it.
        language, task: as in `text_ids`.
    """
    # most tokenizers have no entries for timestamps; their ids follow this token
    first = token_id(tokenizer, "<|notimestamps|>") + 1

    def time_id(seconds: float) -> int:
        return first + min(round(seconds * time_factor / TIME_PRECISION), max_timestamp_index)

    ids = []
    for segment in segments:
        ids += [time_id(segment["start"]), *text_ids(tokenizer, segment["text"], language, task)]
        ids += [] if segment["end"] is None else [time_id(segment["end"])]
    return ids


def timestamp_error(segments: list[Mapping[str, Any]] | None, duration: float) -> str | None:
    """Return what is invalid in the segments of a clip of `duration` seconds, or None."""
    segments = segments or []
    for number, segment in enumerate(segments, start=1):
        if segment is None or segment["text"] is None:
            return f"segment without text: number {number} of {len(segments)}"
        start, end = segment["start"], segment["end"]
        until = duration if end is None and number == len(segments) else end  # continues after the clip
        # tolerance of one step: an end may have been rounded up
        if start is None or until is None or not 0.0 <= start <= until <= duration + TIME_PRECISION:
            return f"invalid segment times: {start} to {end} s in a clip of {duration:.2f} s"
    return None


def prompt_ids(
    tokenizer: WhisperTokenizer,
    prompt: str | None,
    max_length: int,
    language: str | None = None,
    task: str | None = None,
) -> list[int]:
    """Return `<|startofprev|>` and the last tokens of the prompt, at most `max_length`; empty without a prompt.

    Unlike `tokenizer.get_prompt_ids` it accepts text with special tokens, and languages without spaces get none.

    Args:
        max_length: tokens, `<|startofprev|>` included.
        language, task: as in `text_ids`.
    """
    tokens = text_ids(tokenizer, prompt or "", language, task)
    return [token_id(tokenizer, "<|startofprev|>"), *tokens[-(max_length - 1) :]] if tokens and max_length >= 2 else []


def build_decoder_tokens(
    tokenizer: WhisperTokenizer,
    row: Mapping[str, Any],
    *,
    timestamps: bool = False,
    prompt: bool = False,
    max_tokens: int = 448,
    max_positions: int = 1500,
    time_factor: float = 1.0,
) -> DecoderTokens:
    """Build the decoder input and labels of a row. The prompt is masked in the labels.

    Args:
        row: `text`; optionally `language`, `task`, `segments`, `prompt`.
        timestamps: whether to add timestamp tokens. Ignored if the row has no segments or the result exceeds
            `max_tokens`.
        prompt: whether to put the row's prompt in front, at most half of `max_tokens`, like `generate`.
        max_tokens: `max_target_positions` of the model. The prompt is truncated at its beginning to fit. Default: 448.
        max_positions: `max_source_positions` of the model. Default: 1500.
        time_factor: as in `segment_ids`.
    """
    language, task = row.get("language"), row.get("task")

    def transcript_of(text: list[int], with_times: bool) -> list[int]:
        prefix = prefix_ids(tokenizer, language, task, with_times)
        return [*prefix, *text, tokenizer.eos_token_id]

    transcript = transcript_of(text_ids(tokenizer, row["text"], language, task), with_times=False)
    if timestamps and row.get("segments"):
        segments = segment_ids(tokenizer, row["segments"], max_positions, time_factor, language, task)
        timed = transcript_of(segments, with_times=True)
        if len(timed) - 1 <= max_tokens:  # two more tokens per segment may exceed the limit
            transcript = timed
    prompt_length = min(max_tokens // 2, max_tokens - len(transcript) + 1) if prompt else 0
    before = prompt_ids(tokenizer, row.get("prompt"), prompt_length, language, task)
    return DecoderTokens([*before, *transcript[:-1]], [LABEL_PAD_TOKEN_ID] * len(before) + transcript[1:])
