"""One look at every clip before training, rather than a crash in its third hour."""

import csv
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from ..errors import UserError
from .audio import AudioError, read_audio
from .text import replace_column

logger = logging.getLogger(__name__)

SHOWN = 10


def check_clips(
    dataset: Dataset,
    tokenize: Callable[[str], list[int]] | None,
    *,
    max_seconds: float,
    max_label_tokens: float = math.inf,
    on_bad_audio: Literal["error", "skip"],
    num_proc: int | None = None,
    report_file: Path | None = None,
    split: str = "train",
) -> Dataset:
    """Decode every clip, tokenize every transcript, and refuse or drop the rows that can't be used.

    Bad are: missing, corrupt, truncated and empty audio, NaN samples, clips over `max_seconds`, empty transcripts, and
    labels over `max_label_tokens`. Rows are counted from 0.

    Args:
        dataset: of `load_speech`.
        tokenize: text to label ids (`SpeechCollator.label_ids`). None, where nothing is trained: any transcript is
            good, and none at all is.
        max_seconds: what the feature extractor would cut off, its `chunk_length`.
        max_label_tokens: of the decoder, its `max_target_positions`.
        on_bad_audio: "error": raise if a row is bad. "skip": drop bad rows with a warning.
        num_proc: processes that decode. Default: this one.
        report_file: CSV (row, clip, reason) of the dropped rows; written only if there are any.
        split: its name in messages.

    Returns:
        The good rows, with `seconds` (float), `audio_key` (see `audio_key`) and, if tokenized, `label_tokens` (int)
        added.

    Raises:
        UserError: bad rows with "error", or not one good row.
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
    # An empty transcript counts as no labels, without the tokens of the prefix.
    lengths = None
    if tokenize is not None:
        lengths = [len(tokenize(text)) if text and text.strip() else 0 for text in dataset["text"]]
    seconds = sounds["seconds"][:]
    bad = {}
    for row, sound in enumerate(sounds):
        reason = _reason(sound, lengths and lengths[row], max_seconds, max_label_tokens)
        if reason is not None:
            bad[row] = reason
    checked = replace_column(dataset, "seconds", seconds)
    if lengths is not None:
        checked = replace_column(checked, "label_tokens", lengths)
    checked = replace_column(checked, "audio_key", sounds["audio_key"][:])
    if not bad:
        return checked
    _report(bad, dataset, on_bad_audio, report_file, split)
    return checked.select([row for row in range(len(dataset)) if row not in bad])


def _measure(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        samples, rate = read_audio(row["audio"])
    except AudioError as error:
        return {"seconds": 0.0, "audio_key": "", "problem": str(error)}
    return {"seconds": len(samples) / rate, "audio_key": audio_key(samples, rate), "problem": ""}


def audio_key(samples: np.ndarray, rate: int) -> str:
    """32 hexadecimal digits that stand for a clip's content, whatever its file is called and how it is compressed.

    Args:
        samples: float32 `(samples,)`, mono.
        rate: in Hz.
    """
    digest = hashlib.blake2b(f"{rate} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples, dtype="<f4"))
    return digest.hexdigest()


def _reason(
    sound: Mapping[str, Any], label_tokens: int | None, max_seconds: float, max_label_tokens: float
) -> str | None:
    """Why a row is bad: a kind, and after a colon the details. None if it is good."""
    if sound["problem"]:
        return sound["problem"]
    if sound["seconds"] > max_seconds:
        return f"too long: {sound['seconds']:.2f} s, the limit is {max_seconds:g} s"
    if label_tokens == 0:
        return "empty transcript"
    if label_tokens is not None and label_tokens > max_label_tokens:
        return f"transcript too long: {label_tokens} tokens, the limit is {max_label_tokens}"
    return None


def _report(bad: dict[int, str], dataset: Dataset, on_bad_audio: str, report_file: Path | None, split: str) -> None:
    """Raise for the bad rows, or write them to `report_file` and warn."""
    clips = dataset.select(list(bad))["clip"]
    kinds = Counter(reason.partition(":")[0] for reason in bad.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    summary = f"{split}: {len(bad)} of {len(dataset)} clips can't be used ({counts})"
    listed = [f"  row {row}, {clip}: {reason}" for (row, reason), clip in zip(bad.items(), clips, strict=True)]
    shown = "\n".join(listed[:SHOWN] + ([f"  and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []))
    if on_bad_audio == "error":
        raise UserError(f"{summary}:\n{shown}\nMend them, or go on without them: --on_bad_audio skip")
    if len(bad) == len(dataset):
        raise UserError(f"{summary}, so nothing is left:\n{shown}")
    if report_file is not None:
        report_file.parent.mkdir(parents=True, exist_ok=True)
        with report_file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "clip", "reason"])
            writer.writerows((row, clip, reason) for (row, reason), clip in zip(bad.items(), clips, strict=True))
        summary += f"; all are listed in {report_file}"
    logger.warning("%s. Skipped:\n%s", summary, shown)
