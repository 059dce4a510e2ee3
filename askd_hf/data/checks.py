"""Validate every clip before training."""

import contextlib
import csv
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from ..errors import UserError
from ..progress import Bar, progress_bar
from .audio_checks import AudioInfo, audio_infos
from .columns import iterate_rows, replace_column
from .labels import timestamp_error
from .markup import markup_error
from .shared_disk import is_first_on_disk, others_wait
from .speaking_rate import speaking_rate_error

logger = logging.getLogger(__name__)

MAX_LISTED = 10  # invalid clips in a message


@dataclass(frozen=True)
class Limits:
    """Limits of the model, beyond which a clip is invalid, and of the user's filters."""

    chunk_length: float  # longest clip that the model takes, seconds (`WhisperFeatureExtractor.chunk_length`)
    # label tokens that the decoder takes (`WhisperConfig.max_target_positions`)
    max_target_positions: float = math.inf
    # min_duration_in_seconds, max_duration_in_seconds, min_label_length, max_label_length: clips outside this range
    # are filtered out. Label lengths are tokens, including those of language, task and end of text.
    min_duration_in_seconds: float = 0.0
    max_duration_in_seconds: float = math.inf
    min_label_length: float = 0
    max_label_length: float = math.inf
    allow_empty_text: bool = False  # whether an empty transcript is valid, as it is for clips without speech
    skip_long: bool = False  # whether clips longer than `chunk_length` are filtered out instead of invalid
    check_timestamps: bool = False  # whether to validate `segments`
    check_prompts: bool = False  # whether to validate `prompt`

    def for_no_speech(self) -> "Limits":
        """Return the limits of clips without speech: those of the model, and empty transcripts are valid."""
        return Limits(self.chunk_length, self.max_target_positions, allow_empty_text=True, skip_long=self.skip_long)

    def for_joined(self) -> "Limits":
        """Return the limits of joined clips: those of the model. The user's filters were applied to each clip."""
        return replace(
            self,
            min_duration_in_seconds=0.0,
            max_duration_in_seconds=math.inf,
            min_label_length=0,
            max_label_length=math.inf,
        )

    def invalid_reason(
        self, audio_error: str, duration: float, row: Mapping[str, Any], label_tokens: int | None, silence: str = ""
    ) -> str | None:
        """Return why a clip is invalid, as "kind: details", or None if it is valid.

        Args:
            duration: in seconds.
            row: with `text`, optionally `segments` and `prompt`.
            label_tokens: number of label tokens; None if the transcript isn't used, and any is valid.
            silence: the result of `audio.silence`. Silent audio is valid only with an empty transcript.
        """
        if audio_error:
            return audio_error
        if duration > self.chunk_length and not self.skip_long:
            return f"too long: {duration:.2f} s, the limit is {self.chunk_length:g} s"
        if silence and (row["text"] or "").strip():
            return silence
        if label_tokens is not None:
            if row["text"] is None or not (self.allow_empty_text or row["text"].strip()):
                return "empty transcript"
            if label_tokens > self.max_target_positions:
                return f"transcript too long: {label_tokens} tokens, the limit is {self.max_target_positions}"
        if error := markup_error(row) or (markup_error(row, "prompt") if self.check_prompts else None):
            return error
        if label_tokens is not None and (error := speaking_rate_error(row["text"], duration)):
            return error
        if not self.check_timestamps:
            return None
        errors = (markup_error({"segment": part["text"]}, "segment") for part in row.get("segments") or [] if part)
        return next(filter(None, errors), None) or timestamp_error(row.get("segments"), duration)

    def filter_reason(self, duration: float, label_tokens: int | None) -> str | None:
        """Return why the user's filters drop a valid clip, as "kind: details", or None if they keep it."""
        if duration > self.chunk_length:
            return f"longer than the window of {self.chunk_length:g} s: {duration:.2f} s"
        if duration < self.min_duration_in_seconds:
            return f"under --min_duration_in_seconds: {duration:.2f} s"
        if duration > self.max_duration_in_seconds:
            return f"over --max_duration_in_seconds: {duration:.2f} s"
        if label_tokens is not None and label_tokens < self.min_label_length:
            return f"under --min_label_length: {label_tokens}"
        if label_tokens is not None and label_tokens > self.max_label_length:
            return f"over --max_label_length: {label_tokens}"
        return None


def filter_invalid_clips(
    dataset: Dataset,
    tokenize: Callable[[Mapping[str, Any]], list[int]] | None,
    limits: Limits,
    *,
    on_bad_audio: Literal["error", "skip"],
    num_proc: int | None = None,
    recheck: bool = False,
    share_work: bool = False,
    report_file: Path | None = None,
    split: str = "train",
    bar: Bar | None = None,
) -> Dataset:
    """Check the audio and the transcript of every row, and drop the rows that are invalid or filtered out.

    A file is decoded once: later checks use what the first one found, in any process, as long as path, size and time
    of change are the same. See `audio_infos`.

    A row is invalid if `read_audio` can't decode its audio (missing, corrupt, truncated, empty, ...), or for a reason
    of `limits.invalid_reason`, such as silence with a transcript, or a transcript too long for its audio. Rows with a
    true `no_speech` have the limits of clips without speech. Row numbers start at 0.

    Args:
        dataset: the result of `load_speech_dataset`.
        tokenize: returns the label ids of a row without audio (`SpeechCollator.label_ids`); None if transcripts aren't
            used, and any is valid.
        on_bad_audio: "error" to raise if a row is invalid, "skip" to drop invalid rows with a warning.
        num_proc, recheck: see `audio_infos`.
        share_work: whether the processes of a distributed run check a part each, and tell each other what they found.
            All must call this, with the same dataset.
        report_file: CSV file (row, clip, reason) for the dropped rows; written only if there are any.
        bar: the progress bar of several datasets. Default: one of this dataset.

    Returns:
        The remaining rows with the added columns `duration` (seconds, float), `audio_key` (the result of `audio_key`)
        and, with `tokenize`, `label_tokens` (number of label tokens, int).

    Raises `UserError` if there are invalid rows and `on_bad_audio` is "error", or no row is left.
    """
    process = PartialState() if share_work else None
    processes, index = (process.num_processes, process.process_index) if process else (1, 0)
    has_share = index < len(dataset)  # else there are more processes than rows, and `shard` fails
    share = dataset.shard(processes, index, contiguous=True) if has_share else dataset.select([])
    known = 0

    def count(clips: int) -> None:
        """Show the progress of all processes: as far as this one, the first, is with its share."""
        nonlocal known
        before, known = known, known + clips
        if has_share:
            progress.update(known * len(dataset) // len(share) - before * len(dataset) // len(share))

    shown = progress_bar(len(dataset), f"Checking {split}") if bar is None else contextlib.nullcontext(bar)
    with others_wait() if share_work else contextlib.nullcontext():
        with shown as progress:
            if processes > 1:
                progress.set_postfix_str("estimated from the first process")
            infos = audio_infos(share.select_columns("audio"), num_proc, recheck, count)
        found = _check_rows(share.remove_columns("audio"), infos, tokenize, limits)
    if processes > 1:
        found = _joined(gather_object([found]))
    invalid, filtered = found.invalid, found.filtered
    # arrays, as `datasets` would pickle lists for the fingerprint
    validated = replace_column(dataset, "duration", pa.array(found.durations, pa.float64()))
    if tokenize is not None:
        validated = replace_column(validated, "label_tokens", pa.array(found.label_lengths, pa.int64()))
    validated = replace_column(validated, "audio_key", pa.array(found.keys, pa.string()))
    if invalid or filtered:
        _report(invalid, filtered, dataset, on_bad_audio, report_file, split, share_work)
        validated = validated.select(
            [row for row in range(len(dataset)) if row not in invalid and row not in filtered]
        )
    elif report_file is not None:
        report_file.unlink(missing_ok=True)  # of an earlier command: these clips are valid now
    if tokenize is not None:
        _warn_of_contradictions(validated, split)
    return validated


def _warn_of_contradictions(clips: Dataset, split: str) -> None:
    """Warn about rows with the same audio, language and task, but other transcripts."""
    columns = [clips[name][:] for name in ("audio_key", "language", "task") if name in clips.column_names]
    first: dict[tuple[str, ...], int] = {}
    texts = clips["text"][:]
    found = [
        (other, row)
        for row, key in enumerate(zip(*columns, strict=True))
        if key[0] and texts[other := first.setdefault(key, row)] != texts[row]
    ]
    if found:
        other, row = found[0]
        logger.warning(
            "%s: %d of %d clips have the audio of an earlier row and another transcript, such as %s: %r and %r",
            *(split, len(found), len(clips), clips[row]["clip"]),
            *((texts[each] or "")[:40] for each in (other, row)),
        )


@dataclass
class _Checked:
    """What is known of some rows, in their order, and by row number why rows are dropped."""

    durations: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    label_lengths: list[int | None] = field(default_factory=list)
    invalid: dict[int, str] = field(default_factory=dict)
    filtered: dict[int, str] = field(default_factory=dict)


def _check_rows(
    rows: Dataset,
    infos: list[AudioInfo],
    tokenize: Callable[[Mapping[str, Any]], list[int]] | None,
    limits: Limits,
) -> _Checked:
    found = _Checked([info.duration for info in infos], [info.key for info in infos])
    for number, (info, row) in enumerate(zip(infos, iterate_rows(rows), strict=True)):
        tokens, reason = None, None
        try:
            tokens = None if tokenize is None else len(tokenize(row | {"text": row["text"] or ""}))
        except UserError as error:  # an unknown language
            reason = str(error)
        found.label_lengths.append(tokens)
        of_row = limits.for_no_speech() if row.get("no_speech") else limits
        reason = of_row.invalid_reason(info.error, info.duration, row, tokens, info.silence) or reason
        if reason is not None:
            found.invalid[number] = reason
        elif reason := of_row.filter_reason(info.duration, tokens):
            found.filtered[number] = reason
    return found


def _joined(parts: list[_Checked]) -> _Checked:
    """Concatenate what the processes found in their shares."""
    whole = _Checked()
    for part in parts:
        first = len(whole.keys)
        whole.invalid |= {first + row: reason for row, reason in part.invalid.items()}
        whole.filtered |= {first + row: reason for row, reason in part.filtered.items()}
        whole.durations += part.durations
        whole.keys += part.keys
        whole.label_lengths += part.label_lengths
    return whole


def _report(
    invalid: dict[int, str],
    filtered: dict[int, str],
    dataset: Dataset,
    on_bad_audio: str,
    report_file: Path | None,
    split: str,
    share_work: bool,
) -> None:
    """Raise for invalid rows, or write invalid and filtered rows to `report_file` and log their numbers.

    With `share_work` one process writes on each disk.
    """
    reasons = dict(sorted((invalid | filtered).items()))
    clips = dict(zip(reasons, dataset.select(list(reasons))["clip"], strict=True))
    invalid_summary = f"{split}: {len(invalid)} of {len(dataset)} clips are invalid ({_counts(invalid)})"
    lines = [f"  row {row}, {clips[row]}: {reason}" for row, reason in invalid.items()]
    listed = "\n".join(lines[:MAX_LISTED] + ([f"  and {len(lines) - MAX_LISTED} more"] if lines[MAX_LISTED:] else []))
    if invalid and on_bad_audio == "error":
        raise UserError(f"{invalid_summary}:\n{listed}\nFix the clips, or skip invalid clips with --on_bad_audio skip")
    filter_summary = f"{split}: {len(filtered)} of {len(dataset)} clips are filtered out ({_counts(filtered)})"
    if len(reasons) == len(dataset):
        summaries = [text for text, rows in ((invalid_summary, invalid), (filter_summary, filtered)) if rows]
        raise UserError(f"{'; '.join(summaries)}, so no clip is left:\n{listed}".rstrip(":\n"))
    where = ""
    if report_file is not None:
        if not share_work or is_first_on_disk(report_file.parent):
            report_file.parent.mkdir(parents=True, exist_ok=True)
            with report_file.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["row", "clip", "reason"])
                writer.writerows((row, clips[row], reason) for row, reason in reasons.items())
        where = f"; all are listed in {report_file}"
    if invalid:
        logger.warning("%s%s. Skipped:\n%s", invalid_summary, where, listed)
    if filtered:
        logger.warning("%s%s", filter_summary, where)


def _counts(reasons: dict[int, str]) -> str:
    kinds = Counter(reason.partition(":")[0] for reason in reasons.values())
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
