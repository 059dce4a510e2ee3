"""Transcripts to what the decoder reads and what it should answer.

    input    <|startofprev|>  text before  <|startoftranscript|>  <|fr|>          <|transcribe|>  <|0.00|>  text
    labels   (ignored)        (ignored)    <|fr|>                 <|transcribe|>  <|0.00|>        text      <|1.28|>

as Whisper was trained (Radford et al. 2022, section 2.3). Without timestamps <|notimestamps|> stands before the text;
an English-only Whisper knows neither language nor task; <|startofprev|> is there only with a text before.

Every text begins with a space, as Whisper writes it, except in languages without spaces (`text_ids`). " The" and "The"
are different tokens: without the space teacher and label contradict each other at the first word of every clip.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import WhisperTokenizer

from ..errors import UserError
from .languages import TASKS, word_separator

IGNORED = -100
WITHIN_A_MARK = re.compile(r"(?<=<)(?=\|)")
SECONDS_A_POSITION = 0.02  # of the encoder's output, and from one timestamp token to the next


class Example(NamedTuple):
    """A clip's tokens, one list as long as the other."""

    decoder_input_ids: list[int]
    labels: list[int]


def prefix_ids(tokenizer: WhisperTokenizer, language: str | None, task: str | None, timestamps: bool) -> list[int]:
    """The tokens from `<|startoftranscript|>` up to the text.

    Args:
        language: a code such as "fr". None: language and task are as the tokenizer is set (`set_prefix_tokens`), or
            don't exist, as in an English-only one.
        task: "transcribe", also if None, or "translate".
    """
    without = token_id(tokenizer, "<|notimestamps|>")
    prefix = [i for i in tokenizer.prefix_tokens if i != without]
    if language is not None:
        prefix = [prefix[0], *_spoken_ids(tokenizer, language, task or "transcribe")]
    return prefix if timestamps else [*prefix, without]


def _spoken_ids(tokenizer: WhisperTokenizer, language: str, task: str) -> list[int]:
    if task not in TASKS:
        raise UserError(
            f"task {task!r} is neither transcribe nor translate (column `task`; --task transcribe overrules it)"
        )
    if not language:
        raise UserError("no language: the column `language` is empty (--language overrules it)")
    try:
        return [token_id(tokenizer, f"<|{name}|>") for name in (language, task)]
    except UserError:
        raise UserError(
            f"language {language!r}: the model doesn't know it (column `language`, or --language)"
        ) from None


def token_id(tokenizer: WhisperTokenizer, token: str) -> int:
    """Raises `UserError` if the tokenizer doesn't know the special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        raise UserError(f"the model's tokenizer has no {token}")
    return found


def text_ids(
    tokenizer: WhisperTokenizer, text: str, language: str | None = None, task: str | None = None
) -> list[int]:
    """The tokens of a text as Whisper writes it: of a transcript, a segment or a prompt, with its leading space.

    No special token comes of a text, nor a timestamp: `<|endoftext|>` is spelled out.

    Args:
        text: white space around it doesn't count. An empty text has no tokens.
        language: a code such as "fr". None: the one that the tokenizer is set to, or English.
        task: None: the one that the tokenizer is set to, or "transcribe".
    """
    text = text.strip()
    if not text:
        return []
    separator = word_separator(language or tokenizer.language, task or tokenizer.task)
    # to the tokenizer times are no special tokens, but tokens all the same: it mustn't see `<|` in one piece
    pieces = WITHIN_A_MARK.split(f"{separator}{text}")
    return [token for piece in pieces for token in _ordinary_ids(tokenizer, piece)]


def _ordinary_ids(tokenizer: WhisperTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def segment_ids(
    tokenizer: WhisperTokenizer,
    segments: list[Mapping[str, Any]],
    last_position: int,
    time_factor: float = 1.0,
    language: str | None = None,
    task: str | None = None,
) -> list[int]:
    """Segments, `{"start": seconds, "end": seconds, "text": str}` each, between their timestamps' tokens.

    Args:
        segments: the last one's `end` may be None, if what is said goes on behind the clip; then no token says it.
        last_position: of the window, in steps of `SECONDS_A_POSITION`; what lies behind is put there.
        time_factor: of the clip's length now and then, if its speed was changed.
        language, task: as in `text_ids`.
    """
    # timestamps have no entries in most tokenizers: they follow this token
    first = token_id(tokenizer, "<|notimestamps|>") + 1

    def time_id(seconds: float) -> int:
        return first + min(round(seconds * time_factor / SECONDS_A_POSITION), last_position)

    ids = []
    for segment in segments:
        ids += [time_id(segment["start"]), *text_ids(tokenizer, segment["text"], language, task)]
        ids += [] if segment["end"] is None else [time_id(segment["end"])]
    return ids


def wrong_times(segments: list[Mapping[str, Any]] | None, seconds: float) -> str | None:
    """What is wrong with the segments of a clip of so many seconds, if anything is."""
    segments = segments or []
    for number, segment in enumerate(segments, start=1):
        if segment is None or segment["text"] is None:
            return f"a segment without text: number {number} of {len(segments)}"
        start, end = segment["start"], segment["end"]
        until = seconds if end is None and number == len(segments) else end  # no end: it goes on behind the clip
        # to a position: a rounded end may lie behind the clip's
        if start is None or until is None or not 0.0 <= start <= until <= seconds + SECONDS_A_POSITION:
            return f"wrong times of a segment: {start} to {end} s, in a clip of {seconds:.2f} s"
    return None


def prompt_ids(
    tokenizer: WhisperTokenizer, prompt: str | None, room: int, language: str | None = None, task: str | None = None
) -> list[int]:
    """`<|startofprev|>` and the last tokens of the text before the clip: `room` at most. Nothing without a text.

    Args:
        language, task: as in `text_ids`.
    """
    tokens = text_ids(tokenizer, prompt or "", language, task)
    return [token_id(tokenizer, "<|startofprev|>"), *tokens[-(room - 1) :]] if tokens and room >= 2 else []


def example(
    tokenizer: WhisperTokenizer,
    row: Mapping[str, Any],
    *,
    timestamps: bool = False,
    prompt: bool = False,
    max_tokens: int = 448,
    max_positions: int = 1500,
    time_factor: float = 1.0,
) -> Example:
    """A row of speech as the decoder sees it. The prompt is never in the labels.

    Args:
        row: `text`; optionally `language`, `task`, `segments`, `prompt`.
        timestamps: write the row's segments with their times; a row without segments has none, nor one that they would
            make too long.
        prompt: put the row's prompt in front, if it has one; half of the decoder's positions at most, as `generate`.
        max_tokens: the decoder's positions. What doesn't fit is cut off the beginning of the prompt.
        max_positions: the encoder's.
        time_factor: as in `segment_ids`.
    """

    language, task = row.get("language"), row.get("task")

    def transcript_of(text: list[int], with_times: bool) -> list[int]:
        prefix = prefix_ids(tokenizer, language, task, with_times)
        return [*prefix, *text, tokenizer.eos_token_id]

    transcript = transcript_of(text_ids(tokenizer, row["text"], language, task), with_times=False)
    if timestamps and row.get("segments"):
        said = segment_ids(tokenizer, row["segments"], max_positions, time_factor, language, task)
        timed = transcript_of(said, with_times=True)
        if len(timed) - 1 <= max_tokens:  # two tokens a segment more can be too many
            transcript = timed
    room = min(max_tokens // 2, max_tokens - len(transcript) + 1) if prompt else 0
    before = prompt_ids(tokenizer, row.get("prompt"), room, language, task)
    return Example([*before, *transcript[:-1]], [IGNORED] * len(before) + transcript[1:])
