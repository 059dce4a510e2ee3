"""Parse Whisper's timestamps in a transcript, `<|0.00|> Hello.<|1.20|>`, and reject other special tokens.

The column `whisper_transcript` of distil-whisper has this format. It contains the generated tokens, special tokens
included:

    <|startoftranscript|><|en|><|transcribe|><|0.00|> Hello.<|1.20|><|1.20|> How are you?<|2.40|><|endoftext|>

Without timestamps `<|notimestamps|>` precedes the text. Recent versions of Transformers omit the prefix. If the window
cut off the last segment, it has no end, or there is a start timestamp without text.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

from ..errors import UserError
from .languages import UNKNOWN, word_separator

MARK = re.compile(r"(<\|[^<>|]*\|>)")
PARTIAL_MARK = re.compile(r"\S{0,20}(?:<\||\|>)\S{0,20}")
TIME = re.compile(r"<\|(\d{1,2}\.\d\d)\|>")
START, NO_TIMESTAMPS, END = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"
PREFIX_MARKS = [{f"<|{code}|>" for code in LANGUAGES}, {f"<|{task}|>" for task in TASK_IDS}, {NO_TIMESTAMPS}]


class ParsedText(NamedTuple):
    """A text without its markup."""

    text: str
    # as in the column `segments`, or None without timestamps. The last `end` is None if it is missing.
    segments: list[dict[str, Any]] | None


def has_markup(text: str | None) -> bool:
    """Return whether the text contains `<|` or `|>`."""
    return text is not None and ("<|" in text or "|>" in text)


def read_markup(text: str, language: str | None = None, task: str | None = None) -> ParsedText:
    """Split a text at Whisper's timestamps.

    A prefix that starts with `<|startoftranscript|>`, and `<|endoftext|>` at the end, are removed.

    Args:
        language, task: of the row, as a code; None or `UNKNOWN` to accept any.

    Raises `UserError` for other special tokens, a prefix with another language or task, and timestamps that aren't in
    order or don't enclose text.
    """
    pieces = [piece.strip() for piece in MARK.split(text)]
    pieces = [piece for piece in pieces if piece]
    while pieces and pieces[-1] == END:
        pieces.pop()
    pieces, no_timestamps = _without_prefix(pieces, language, task)
    for piece in pieces:
        partial = None if MARK.fullmatch(piece) else PARTIAL_MARK.search(piece)
        if partial:
            raise _invalid(partial.group(), "incomplete special token; remove it")
        if MARK.fullmatch(piece) and not TIME.fullmatch(piece):
            raise _invalid(piece, "a special token; only timestamps are allowed, as in `<|0.00|> text <|1.20|>`")
    if not any(map(TIME.fullmatch, pieces)):
        return ParsedText(" ".join(pieces), None)
    if no_timestamps:
        raise _invalid(next(filter(TIME.fullmatch, pieces)), f"a timestamp after {NO_TIMESTAMPS}")
    segments = _segments(pieces)
    space = word_separator(language, task)
    return ParsedText(space.join(segment["text"] for segment in segments), segments)


def markup_error(row: Mapping[str, Any], column: str = "text") -> str | None:
    """Return the markup error of a text column, as "kind: details", or None if it has no markup.

    Valid markup is an error too: `clean_texts` removes it where it is supported.
    """
    text = row.get(column)
    if not has_markup(text):
        return None
    try:
        read_markup(text, row.get("language"), row.get("task"))
    except UserError as error:
        message = str(error)
    else:
        marks = ", ".join(f"`{mark}`" for mark in dict.fromkeys(MARK.findall(text)))
        message = f"transcript has {marks}: remove them; timestamps belong in the column `segments`"
    return message if column == "text" else message.replace("transcript", column, 1)


def _without_prefix(pieces: list[str], language: str | None, task: str | None) -> tuple[list[str], bool]:
    """Return the pieces after the prefix, and whether the prefix contains `<|notimestamps|>`."""
    if not pieces or pieces[0] != START:
        return pieces, False
    pieces, prefix = pieces[1:], []
    for names in PREFIX_MARKS:
        if pieces and pieces[0] in names:
            prefix.append(pieces[0])
            pieces = pieces[1:]
    for names, column, expected in zip(PREFIX_MARKS, ("language", "task"), (language, task), strict=False):
        for mark in names.intersection(prefix):
            if expected not in (None, UNKNOWN, mark.strip("<|>")):
                raise _invalid(mark, f"the {column} of the row is {expected}")
    return pieces, NO_TIMESTAMPS in prefix


def _segments(pieces: list[str]) -> list[dict[str, Any]]:
    segments: list[dict[str, Any]] = []
    start, text, last = None, "", 0.0
    for piece in pieces:
        time = TIME.fullmatch(piece)
        if time is None and start is None:
            raise _invalid(piece[:40], "text without a start timestamp")
        if time is None:
            text = piece
            continue
        at = float(time.group(1))
        if at < last:
            raise _invalid(piece, f"a timestamp before the previous one, {last:.2f}")
        if start is not None and not text:
            raise _invalid(piece, "two timestamps without text in between")
        if start is None:
            start = at
        else:
            segments.append({"start": start, "end": at, "text": text})
            start, text = None, ""
        last = at
    if text:  # a start timestamp at the end without text is ignored
        segments.append({"start": start, "end": None, "text": text})
    return segments


def _invalid(mark: str, reason: str) -> UserError:
    return UserError(f"transcript has `{mark}`: {reason}")
