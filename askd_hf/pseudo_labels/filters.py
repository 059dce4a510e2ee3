"""Score the teacher's transcripts and drop unreliable ones."""

import csv
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jiwer
from accelerate import PartialState

from ..data.shared_disk import is_first_on_disk
from ..errors import UserError, disk_errors
from ..evaluation.metrics import normalize_pairs
from ..evaluation.suites import is_untranscribed
from ..evaluation.word_errors import count_errors, plain_words, repeated_ngrams

logger = logging.getLogger(__name__)

BYTE_VALUES = 256


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the filters. The WER applies to transcripts with a reference, the others to those without."""

    wer_threshold: float  # highest word error rate, percent
    # lowest average log-probability per token. OpenAI Whisper's is -1 (Radford et al. 2022, section 4.5).
    logprob_threshold: float
    # highest ratio of the text's size in bytes to its zlib-compressed size. OpenAI Whisper's is 2.4. `generate` of
    # Transformers computes its ratio on token bytes instead.
    compression_ratio_threshold: float
    repeated_5gram_threshold: float  # highest share of word 5-grams that occur earlier in the same text, percent


@dataclass
class PseudoLabel:
    """The teacher's transcript of a clip and its scores."""

    clip: str
    text: str
    reference: str | None  # the dataset's transcript, or None
    label: str | None  # the text to train on: `text` or `reference`
    segments: list[dict[str, Any]] | None  # the teacher's segments, None without timestamps; see `transcribe`
    words: list[dict[str, Any]] | None  # the teacher's words, None without word timestamps; see `transcribe`
    tokens: int  # number of generated tokens, without end of text
    ended: bool  # whether the teacher generated end of text before the token limit
    # avg_logprob, compression_ratio, repeated_5gram_rate: of `text`, as described in `Thresholds`
    avg_logprob: float
    compression_ratio: float
    repeated_5gram_rate: float
    wer: float | None  # percent; None without a reference, infinite if the reference is empty and the text isn't


@dataclass
class DropReason:
    """Why a transcript is dropped, and the value that violates the threshold, if any."""

    reason: str
    value: float | None = None
    option: str | None = None  # the threshold's


def score_transcripts(
    lines: list[dict[str, Any]],
    references: list[str | None],
    normalize: Callable[[str], str],
    language: str | None,
    label_source: Literal["teacher", "reference"] = "teacher",
) -> list[PseudoLabel]:
    """Compute the scores of the teacher's transcripts.

    Args:
        lines: the result of `transcribe`.
        references: the result of `known_references`.
        normalize: normalizer of texts for the WER, of `metrics.normalizer_for`.
        language: code of the texts' language. In languages without spaces each letter counts as a word.
        label_source: whether the label is the teacher's text or the reference. Default: "teacher".
    """
    rates = word_error_rates([line["text"] for line in lines], references, normalize)
    return [
        PseudoLabel(
            clip=line["clip"],
            text=line["text"],
            reference=reference,
            label=line["text"] if label_source == "teacher" else reference,
            segments=line.get("segments"),
            words=line.get("words"),
            tokens=line["tokens"],
            ended=line["ended"],
            avg_logprob=line["avg_logprob"],
            compression_ratio=compression_ratio(line["text"]),
            repeated_5gram_rate=repeated_ngrams([plain_words(line["text"], language)]),
            wer=rate,
        )
        for line, reference, rate in zip(lines, references, rates, strict=True)
    ]


def compression_ratio(text: str) -> float:
    """Return the ratio of the text's bytes to its zlib-compressed bytes, as whisper/utils.py of OpenAI does.

    Text of more than two UTF-8 bytes per letter, such as Thai or Hindi, is compressed with one byte per letter: the
    bytes that its letters share would count as repetitions, and text without any would exceed 2.4.

    Not the ratio of `generate` of Transformers, which is computed on token bytes.
    """
    content = text.encode("utf-8")
    letters = sorted(set(text))
    if len(content) > 2 * len(text) and len(letters) <= BYTE_VALUES:
        content = bytes(map(letters.index, text))
    return len(content) / len(zlib.compress(content))


def word_error_rates(
    texts: list[str], references: list[str | None], normalize: Callable[[str], str]
) -> list[float | None]:
    """Return the WER of each clip in percent, on normalized texts; None for clips without a reference."""
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
    """Return the references in the column `text`, None where there is none.

    None and markers of untranscribed audio such as TED-LIUM's mean that there is no reference. A transcript without
    letters and digits means no speech, which a warning counts, unless none has any: then the dataset counts as
    untranscribed.

    Raises `UserError` if references are `required` and there are none.
    """
    known = [None if text is None or is_untranscribed(text) else text for text in texts]
    empty = [not plain_words(text, None) for text in known if text is not None]
    if not all(empty):
        if any(empty):
            logger.warning(
                "%d of %d references are empty: these clips count as clips without speech, and are dropped if the "
                "teacher writes text for them. To label them, make a dataset of them alone",
                sum(empty),
                len(texts),
            )
        return known
    if required:
        raise UserError(
            "--label_source reference: the dataset has no transcripts. Choose their column with --text_column_name, "
            "or use --label_source teacher"
        )
    return [None] * len(known)


def reason_to_drop(transcript: PseudoLabel, limits: Thresholds) -> DropReason | None:
    """Return the first reason to drop a transcript, or None to keep it."""
    if transcript.wer == math.inf:  # whatever the threshold
        return DropReason("text for an empty reference", transcript.wer)
    if not transcript.text:
        return DropReason("empty transcript")
    if transcript.label is None:
        return DropReason("no reference")
    if not transcript.ended:
        return DropReason("truncated at the token limit", transcript.tokens)
    if transcript.wer is not None:
        if transcript.wer > limits.wer_threshold:
            return DropReason(f"word error rate over {limits.wer_threshold:g} %", transcript.wer, "wer_threshold")
        return None
    if transcript.avg_logprob < limits.logprob_threshold:
        reason = f"average log-probability under {limits.logprob_threshold:g}"
        return DropReason(reason, transcript.avg_logprob, "logprob_threshold")
    for value, option, reason in (
        (transcript.compression_ratio, "compression_ratio_threshold", "compression ratio over {:g}"),
        (transcript.repeated_5gram_rate, "repeated_5gram_threshold", "repeated 5-grams over {:g} %"),
    ):
        if value > (limit := getattr(limits, option)):
            return DropReason(reason.format(limit), value, option)
    return None


def filter_transcripts(transcripts: list[PseudoLabel], limits: Thresholds, file: Path) -> list[int]:
    """Return the indices of the transcripts to keep. Print the numbers of dropped ones by reason, and list them.

    Args:
        file: CSV file for the dropped transcripts: `clip`, `reason`, `value` (which violates the threshold), the
            teacher's `text`, and `reference`. On each disk one process writes it: all must call this.

    Raises `UserError` if no transcript passed the filters.
    """
    found = [reason_to_drop(transcript, limits) for transcript in transcripts]
    dropped = {i: reason for i, reason in enumerate(found) if reason is not None}
    counts = Counter(reason.reason for reason in dropped.values()).most_common()
    if is_first_on_disk(file.parent):
        _list_dropped(transcripts, dropped, file)
    if PartialState().is_main_process:
        print(f"{len(found) - len(dropped)} of {len(found)} transcripts are kept; dropped ones are listed in {file}")
        for text, count in counts:
            print(f"  {count} dropped: {text}")
    if len(dropped) == len(found):
        options = dict.fromkeys(f"--{reason.option}" for reason in dropped.values() if reason.option)
        change = f", and change askd-hf pseudo-label {', '.join(options)}" if options else ""
        raise UserError(f"no transcript passed the filters ({counts[0][0]}): see {file}{change}")
    return [i for i, reason in enumerate(found) if reason is None]


def _list_dropped(transcripts: list[PseudoLabel], dropped: dict[int, DropReason], file: Path) -> None:
    with disk_errors(f"list of dropped clips {file}"), file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["clip", "reason", "value", "text", "reference"])
        for i, reason in dropped.items():
            value = "" if reason.value is None else f"{reason.value:.4g}"
            writer.writerow([transcripts[i].clip, reason.reason, value, transcripts[i].text, transcripts[i].reference])
