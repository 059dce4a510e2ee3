"""Which transcripts are good enough to learn from."""

import csv
import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jiwer

from ..errors import UserError, disk_errors
from ..evaluation.metrics import normalize_pairs
from ..evaluation.scoring import count_errors, plain_words, repeated_ngrams
from ..evaluation.suites import is_untranscribed


@dataclass(frozen=True)
class Thresholds:
    """What a transcript may be at worst.

    Attributes:
        max_wer: percent, where there is a reference; the others are for transcripts without one.
        min_log_prob: average log-probability of a token. Radford et al. 2023 (section 4.5) take -1 as the sign of a
            failure, as they do the next one.
        max_compression_ratio: bytes of the text over those that zlib makes of it.
        max_repetition: share of word 5-grams that stand earlier in the same text, percent.
    """

    max_wer: float
    min_log_prob: float
    max_compression_ratio: float
    max_repetition: float


@dataclass
class Transcript:
    """What the teacher made of a clip, and how good it seems.

    Attributes:
        text: the teacher's.
        reference: None where there is none.
        label: what is to be learned, one of the two.
        segments: of the teacher, None without timestamps; see `transcribe`.
        tokens, ended: how many the teacher wrote, and whether the end of text came before the limit.
        avg_log_prob, compression_ratio, repetition, wer: as `Thresholds` has them; `wer` is None without a reference,
            and infinite against an empty one.
    """

    clip: str
    text: str
    reference: str | None
    label: str | None
    segments: list[dict[str, Any]] | None
    tokens: int
    ended: bool
    avg_log_prob: float
    compression_ratio: float
    repetition: float
    wer: float | None


@dataclass
class Dropped:
    """Why a transcript isn't kept: the reason, and the value that was too high or too low, if it is one."""

    reason: str
    value: float | None = None


def measure(
    lines: list[dict[str, Any]],
    references: list[str | None],
    normalize: Callable[[str], str],
    language: str | None,
    learn: Literal["teacher", "reference"] = "teacher",
) -> list[Transcript]:
    """Measure the teacher's transcripts.

    Args:
        lines: of `transcribe`.
        references: of `known_references`.
        normalize: of `metrics.normalizer_for`; references in capitals and without punctuation are equal to the
            teacher's text after it.
        language: of the texts, a code; in languages without spaces every letter counts as a word.
        learn: whose text is the label.
    """
    rates = word_error_rates([line["text"] for line in lines], references, normalize)
    return [
        Transcript(
            clip=line["clip"],
            text=line["text"],
            reference=reference,
            label=line["text"] if learn == "teacher" else reference,
            segments=line.get("segments"),
            tokens=line["tokens"],
            ended=line["ended"],
            avg_log_prob=line["avg_log_prob"],
            compression_ratio=compression_ratio(line["text"]),
            repetition=repeated_ngrams([plain_words(line["text"], language)]),
            wer=rate,
        )
        for line, reference, rate in zip(lines, references, rates, strict=True)
    ]


def compression_ratio(text: str) -> float:
    """As in OpenAI's whisper/utils.py; loops compress well."""
    content = text.encode("utf-8")
    return len(content) / len(zlib.compress(content))


def word_error_rates(
    texts: list[str], references: list[str | None], normalize: Callable[[str], str]
) -> list[float | None]:
    """Clip by clip in percent, of normalized texts."""
    known = [i for i, reference in enumerate(references) if reference is not None]
    rates: list[float | None] = [None] * len(texts)
    if not known:
        return rates
    pairs = normalize_pairs([references[i] for i in known], [texts[i] for i in known], normalize)
    output = jiwer.process_words(*pairs)
    errors = count_errors(output).total.tolist()
    for i, count, words in zip(known, errors, output.references, strict=True):
        rates[i] = 100 * count / len(words) if words else math.inf if count else 0.0
    return rates


def known_references(texts: list[str | None], required: bool = False) -> list[str | None]:
    """The references among the column `text`.

    None says that there isn't one, and so do marks such as TED-LIUM's. An empty one says that nothing is spoken, but
    where all are empty nobody has transcribed anything.

    Raises `UserError` if they are `required` and there are none.
    """
    known = [None if text is None or is_untranscribed(text) else text for text in texts]
    if any(text and text.strip() for text in known):
        return known
    if required:
        raise UserError(
            "--text reference: the dataset has no transcripts (--text_column_name); --text teacher needs none"
        )
    return [None] * len(known)


def reason_to_drop(transcript: Transcript, limits: Thresholds) -> Dropped | None:
    """The first reason there is, or None."""
    if transcript.wer == math.inf:  # whatever the limit
        return Dropped("text where the reference has none", transcript.wer)
    if not transcript.text:
        return Dropped("no text")
    if transcript.label is None:
        return Dropped("no reference")
    if not transcript.ended:
        return Dropped("no end before the token limit", transcript.tokens)
    if transcript.wer is not None:
        if transcript.wer > limits.max_wer:
            return Dropped(f"word error rate over {limits.max_wer:g} %", transcript.wer)
        return None
    if transcript.avg_log_prob < limits.min_log_prob:
        return Dropped(f"average log-probability under {limits.min_log_prob:g}", transcript.avg_log_prob)
    if transcript.compression_ratio > limits.max_compression_ratio:
        return Dropped(f"compression ratio over {limits.max_compression_ratio:g}", transcript.compression_ratio)
    if transcript.repetition > limits.max_repetition:
        return Dropped(f"repeated 5-grams over {limits.max_repetition:g} %", transcript.repetition)
    return None


def keep_good(transcripts: list[Transcript], limits: Thresholds, file: Path) -> list[int]:
    """The places of those to keep; the others are counted on the terminal, and listed in `file` (CSV).

    Args:
        file: a line for each that is dropped: its `clip`, the `reason`, the `value` that is too high or too low, the
            teacher's `text` and the `reference`.

    Raises:
        UserError: nothing is left.
    """
    found = [reason_to_drop(transcript, limits) for transcript in transcripts]
    dropped = {i: reason for i, reason in enumerate(found) if reason is not None}
    counts = Counter(reason.reason for reason in dropped.values()).most_common()
    with disk_errors(f"list of dropped clips {file}"), file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["clip", "reason", "value", "text", "reference"])
        for i, reason in dropped.items():
            value = "" if reason.value is None else f"{reason.value:.4g}"
            writer.writerow([transcripts[i].clip, reason.reason, value, transcripts[i].text, transcripts[i].reference])
    print(f"{len(found) - len(dropped)} of {len(found)} transcripts are kept; the others are listed in {file}")
    for why, count in counts:
        print(f"  {count} dropped: {why}")
    if len(dropped) == len(found):
        raise UserError(
            f"not one transcript is good enough ({counts[0][0]}): see {file}, and change the limits "
            "(askd-hf pseudo-label --max_wer, --min_log_prob, --max_compression_ratio, --max_repetition)"
        )
    return [i for i, reason in enumerate(found) if reason is None]
