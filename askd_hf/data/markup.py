"""Whisper's own markup in a transcript, `<|0.00|> Hello.<|1.20|>`: times become segments, the rest is refused.

distil-whisper writes its column `whisper_transcript` so: the generated tokens decoded with the special ones,

    <|startoftranscript|><|en|><|transcribe|><|0.00|> Hello.<|1.20|><|1.20|> How are you?<|2.40|><|endoftext|>

without times `<|notimestamps|>` in front of the text; with a newer Transformers, without the prefix. The last phrase
has no end where the window cut it off, and a start may stand at the end with nothing after it.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

from ..errors import UserError
from .languages import UNKNOWN, word_separator

MARK = re.compile(r"(<\|[^<>|]*\|>)")
HALF_A_MARK = re.compile(r"\S{0,20}(?:<\||\|>)\S{0,20}")
TIME = re.compile(r"<\|(\d{1,2}\.\d\d)\|>")
START, WITHOUT_TIMES, END = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"
IN_THE_PREFIX = [{f"<|{code}|>" for code in LANGUAGES}, {f"<|{task}|>" for task in TASK_IDS}, {WITHOUT_TIMES}]


class Marked(NamedTuple):
    """A text without its markup.

    Attributes:
        segments: as the column `segments`, the `end` of the last one None if it has none; None without times.
    """

    text: str
    segments: list[dict[str, Any]] | None


def has_markup(text: str | None) -> bool:
    return text is not None and ("<|" in text or "|>" in text)


def read_markup(text: str, language: str | None = None, task: str | None = None) -> Marked:
    """Take a text apart at Whisper's times.

    A whole prefix, from `<|startoftranscript|>` on, and `<|endoftext|>` at the end are taken off.

    Args:
        language, task: of the row, a code; None or `UNKNOWN`: any.

    Raises `UserError` for all other markup, for a prefix of another language or task, and for times that don't enclose
    phrases one after the other.
    """
    pieces = [piece.strip() for piece in MARK.split(text)]
    pieces = [piece for piece in pieces if piece]
    while pieces and pieces[-1] == END:
        pieces.pop()
    pieces, timeless = _without_prefix(pieces, language, task)
    for piece in pieces:
        half = None if MARK.fullmatch(piece) else HALF_A_MARK.search(piece)
        if half:
            raise _unreadable(half.group(), "half a mark of Whisper's; text only")
        if MARK.fullmatch(piece) and not TIME.fullmatch(piece):
            raise _unreadable(piece, "markup, not what is said; text only, and times as `<|0.00|> text <|1.20|>`")
    if not any(map(TIME.fullmatch, pieces)):
        return Marked(" ".join(pieces), None)
    if timeless:
        raise _unreadable(next(filter(TIME.fullmatch, pieces)), f"a time after {WITHOUT_TIMES}")
    segments = _phrases(pieces)
    space = word_separator(language, task)
    return Marked(space.join(segment["text"] for segment in segments), segments)


def markup_problem(row: Mapping[str, Any], column: str = "text") -> str | None:
    """What markup a row's text has that can't be learned, if any; a kind, and after a colon the details."""
    text = row.get(column)
    if not has_markup(text):
        return None
    try:
        read_markup(text, row.get("language"), row.get("task"))
    except UserError as error:
        problem = str(error)
    else:
        marks = ", ".join(f"`{mark}`" for mark in dict.fromkeys(MARK.findall(text)))
        problem = f"transcript has {marks}: text only; times belong in `segments`"
    return problem if column == "text" else problem.replace("transcript", column, 1)


def _without_prefix(pieces: list[str], language: str | None, task: str | None) -> tuple[list[str], bool]:
    """The pieces after the prefix, if there is one, and whether it says that there are no times."""
    if not pieces or pieces[0] != START:
        return pieces, False
    pieces, prefix = pieces[1:], []
    for names in IN_THE_PREFIX:
        if pieces and pieces[0] in names:
            prefix.append(pieces[0])
            pieces = pieces[1:]
    for names, what, said in zip(IN_THE_PREFIX, ("language", "task"), (language, task), strict=False):
        for mark in names.intersection(prefix):
            if said not in (None, UNKNOWN, mark.strip("<|>")):
                raise _unreadable(mark, f"the {what} of the row is {said}")
    return pieces, WITHOUT_TIMES in prefix


def _phrases(pieces: list[str]) -> list[dict[str, Any]]:
    segments: list[dict[str, Any]] = []
    start, text, last = None, "", 0.0
    for piece in pieces:
        time = TIME.fullmatch(piece)
        if time is None and start is None:
            raise _unreadable(piece[:40], "a phrase that no time begins")
        if time is None:
            text = piece
            continue
        at = float(time.group(1))
        if at < last:
            raise _unreadable(piece, f"a time before the one in front of it, {last:.2f}")
        if start is not None and not text:
            raise _unreadable(piece, "two times of a phrase without text")
        if start is None:
            start = at
        else:
            segments.append({"start": start, "end": at, "text": text})
            start, text = None, ""
        last = at
    if text:  # else a start at the very end says nothing
        segments.append({"start": start, "end": None, "text": text})
    return segments


def _unreadable(mark: str, why: str) -> UserError:
    return UserError(f"transcript has `{mark}`: {why}")
