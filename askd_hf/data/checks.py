"""One look at every clip before training, rather than a crash in its third hour."""

import csv
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from ..errors import UserError
from .audio import AudioError, read_audio, silence
from .columns import replace_column
from .labels import wrong_times
from .markup import markup_problem
from .pace import too_fast

logger = logging.getLogger(__name__)

SHOWN = 10


@dataclass(frozen=True)
class Limits:
    """What a clip may be: what the model can take, and what the user wants of it.

    Attributes:
        window: seconds that the model hears at once; longer clips would be cut off.
        positions: label tokens that the decoder can take.
        min_seconds, max_seconds, min_label_tokens, max_label_tokens: clips outside of these aren't wanted. Label
            tokens count with those of language and task and the end.
        empty_text: whether a clip may have no text: one in which nobody speaks.
        times: whether the times of `segments` are used.
        prompts: whether the texts of `prompt` are.
    """

    window: float
    positions: float = math.inf
    min_duration_in_seconds: float = 0.0
    max_duration_in_seconds: float = math.inf
    min_label_length: float = 0
    max_label_length: float = math.inf
    empty_text: bool = False
    times: bool = False
    prompts: bool = False

    def of_negatives(self) -> "Limits":
        """Of clips in which nobody speaks: what the model can take."""
        return Limits(self.window, self.positions, empty_text=True)

    def unusable(
        self, problem: str, seconds: float, row: Mapping[str, Any], label_tokens: int | None, silence: str = ""
    ) -> str | None:
        """Why a clip can't be used: a kind, and after a colon the details. None if it can.

        Args:
            problem: with its audio, or "".
            silence: that its audio is silent, or "": good only without a transcript.
            row: with `text`, and perhaps `segments` and `prompt`.
            label_tokens: None where nothing is trained, and any text is good.
        """
        if problem:
            return problem
        if seconds > self.window:
            return f"too long: {seconds:.2f} s, the limit is {self.window:g} s"
        if silence and (row["text"] or "").strip():
            return silence
        if label_tokens is not None:
            if row["text"] is None or not (self.empty_text or row["text"].strip()):
                return "empty transcript"
            if label_tokens > self.positions:
                return f"transcript too long: {label_tokens} tokens, the limit is {self.positions}"
        if problem := markup_problem(row) or (markup_problem(row, "prompt") if self.prompts else None):
            return problem
        if label_tokens is not None and (hurry := too_fast(row["text"], seconds)):
            return hurry
        if not self.times:
            return None
        marked = (markup_problem({"segment": part["text"]}, "segment") for part in row.get("segments") or [] if part)
        return next(filter(None, marked), None) or wrong_times(row.get("segments"), seconds)

    def unwanted(self, seconds: float, label_tokens: int | None) -> str | None:
        """Why a filter leaves out a clip that can be used, likewise."""
        if seconds < self.min_duration_in_seconds:
            return f"under --min_duration_in_seconds: {seconds:.2f} s"
        if seconds > self.max_duration_in_seconds:
            return f"over --max_duration_in_seconds: {seconds:.2f} s"
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
    report_file: Path | None = None,
    split: str = "train",
) -> Dataset:
    """Decode every clip, tokenize every transcript, refuse or drop the rows that can't be used, drop the unwanted.

    Bad is audio that `read_audio` refuses (missing, corrupt, truncated, empty, samples that can't be right...), and
    what `limits.unusable` says: among it silence with a transcript, and transcripts that nobody speaks in so short a
    time. Rows are counted from 0.

    Args:
        dataset: of `load_speech_dataset`.
        tokenize: a row, without its audio, to its label ids (`SpeechCollator.label_ids`). None, where nothing is
            trained: any transcript is good, and none at all is.
        on_bad_audio: "error": raise if a row is bad. "skip": drop bad rows with a warning.
        num_proc: processes that decode. Default: this one.
        report_file: CSV (row, clip, reason) of the dropped rows; written only if there are any.
        split: its name in messages.

    Returns:
        The good rows, with `seconds` (float), `audio_key` (see `audio_key`) and, if tokenized, `label_tokens` (int)
        added.

    Raises:
        UserError: bad rows with "error", or not one row is left.
    """
    # In memory, so that no result can come from the cache of `datasets`: the files may have changed since. Only the
    # audio goes to the workers; tokenizers and torch stay out of forked processes, where their threads can hang.
    sounds = dataset.select_columns("audio").map(
        _measure,
        remove_columns="audio",
        num_proc=num_proc,
        keep_in_memory=True,
        desc=f"Checking the clips of {split}",
    )
    lengths, bad, unwanted = [], {}, {}
    for row, (sound, said) in enumerate(zip(sounds, dataset.remove_columns("audio"), strict=True)):
        tokens, reason = None, None
        try:
            tokens = None if tokenize is None else len(tokenize(said | {"text": said["text"] or ""}))
        except UserError as error:  # an unknown language
            reason = str(error)
        lengths.append(tokens)
        reason = limits.unusable(sound["problem"], sound["seconds"], said, tokens, sound["silence"]) or reason
        if reason is not None:
            bad[row] = reason
        elif reason := limits.unwanted(sound["seconds"], tokens):
            unwanted[row] = reason
    checked = replace_column(dataset, "seconds", sounds["seconds"][:])
    if tokenize is not None:
        checked = replace_column(checked, "label_tokens", lengths)
    checked = replace_column(checked, "audio_key", sounds["audio_key"][:])
    if not bad and not unwanted:
        return checked
    _report(bad, unwanted, dataset, on_bad_audio, report_file, split)
    return checked.select([row for row in range(len(dataset)) if row not in bad and row not in unwanted])


def _measure(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        samples, rate = read_audio(row["audio"])
    except AudioError as error:
        return {"seconds": 0.0, "audio_key": "", "problem": str(error), "silence": ""}
    seconds, key = len(samples) / rate, audio_key(samples, rate)
    return {"seconds": seconds, "audio_key": key, "problem": "", "silence": silence(samples)}


def audio_key(samples: np.ndarray, rate: int) -> str:
    """32 hexadecimal digits that stand for a clip's content, whatever its file is called and how it is compressed.

    Args:
        samples: float32 `(samples,)`, mono.
        rate: in Hz.
    """
    digest = hashlib.blake2b(f"{rate} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples, dtype="<f4").data)
    return digest.hexdigest()


def _report(
    bad: dict[int, str],
    unwanted: dict[int, str],
    dataset: Dataset,
    on_bad_audio: str,
    report_file: Path | None,
    split: str,
) -> None:
    """Raise for the bad rows, or write them and the unwanted ones to `report_file` and say how many there are."""
    reasons = dict(sorted((bad | unwanted).items()))
    clips = dict(zip(reasons, dataset.select(list(reasons))["clip"], strict=True))
    summary = f"{split}: {len(bad)} of {len(dataset)} clips can't be used ({_counts(bad)})"
    listed = [f"  row {row}, {clips[row]}: {reason}" for row, reason in bad.items()]
    shown = "\n".join(listed[:SHOWN] + ([f"  and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []))
    if bad and on_bad_audio == "error":
        raise UserError(f"{summary}:\n{shown}\nMend them, or go on without them: --on_bad_audio skip")
    filtered = f"{split}: the filters leave out {len(unwanted)} of {len(dataset)} clips ({_counts(unwanted)})"
    if len(reasons) == len(dataset):
        summaries = [text for text, rows in ((summary, bad), (filtered, unwanted)) if rows]
        raise UserError(f"{'; '.join(summaries)}, so nothing is left:\n{shown}".rstrip(":\n"))
    where = ""
    if report_file is not None:
        report_file.parent.mkdir(parents=True, exist_ok=True)
        with report_file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "clip", "reason"])
            writer.writerows((row, clips[row], reason) for row, reason in reasons.items())
        where = f"; all are listed in {report_file}"
    if bad:
        logger.warning("%s%s. Skipped:\n%s", summary, where, shown)
    if unwanted:
        logger.warning("%s%s", filtered, where)


def _counts(reasons: dict[int, str]) -> str:
    kinds = Counter(reason.partition(":")[0] for reason in reasons.values())
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
