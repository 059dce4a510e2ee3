"""Cut clips that are longer than the student's window at pauses, with their text.

The times are those of the column `words`, or else of `segments`, as a teacher's pseudo-labels have them
(`askd-hf pseudo-label --timestamps`).
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import soundfile
from datasets import Dataset

from ..errors import UserError
from .audio import AudioError, read_audio
from .columns import are_segments
from .languages import word_separator

TIMES = ("words", "segments")  # columns with `start`, `end` and `text`, the finest first


def cut_points(units: Sequence[Mapping[str, Any]], duration: float, window: float) -> list[float]:
    """Return where a clip is cut, in seconds, so that no piece is longer than the window if that is possible.

    Each cut is in the middle of the longest pause in the second half of the window, or else of the last pause in its
    first half. A unit that is longer than the window stays whole.

    Args:
        units: words or segments with `start` and `end` in seconds, in order.
        duration: of the clip.
    """
    pauses = [
        ((one["end"] + following["start"]) / 2, following["start"] - one["end"])
        for one, following in itertools.pairwise(units)
    ]
    cuts: list[float] = []
    start = 0.0
    while duration - start > window:
        fitting = [pause for pause in pauses if start < pause[0] <= start + window]
        late = [pause for pause in fitting if pause[0] > start + window / 2]
        if late:
            at = max(late, key=lambda pause: (pause[1], pause[0]))[0]
        elif fitting:
            at = fitting[-1][0]
        else:  # a unit is longer than the window: cut behind it
            behind = [pause[0] for pause in pauses if pause[0] > start + window]
            if not behind:
                break
            at = behind[0]
        cuts.append(at)
        start = at
    return cuts


def cut_long_clips(dataset: Dataset, window: float, name: str, num_proc: int | None = None) -> Dataset:
    """Return the rows with clips longer than `window` seconds replaced by their pieces.

    A clip without times, or one that can't be decoded, is left unchanged. Pieces have a `clip` such as
    "a.wav, 12.3 to 17.9 s", the text of their words or segments, and `segments` relative to their start. The prompt of
    a later piece is the text of the one before it.

    Args:
        dataset: the result of `load_speech_dataset`.
        name: of the dataset, for the message.
        num_proc: number of processes; None for the current one.

    Raises `UserError` if the dataset has longer clips and no times.
    """
    if not any(column in dataset.column_names and are_segments(dataset.features[column]) for column in TIMES):
        if clip := _first_longer(dataset, window):
            raise UserError(
                f"--long_clips cut requires the times of words or segments, and {name} has neither a column words nor "
                f"segments with start, end and text, but clips that are longer than {window:g} s, the first of them "
                f"{clip}: transcribe it with askd-hf pseudo-label --timestamps, or choose skip"
            )
        return dataset
    # One row at a time, as a row may become several. Without the cache of `datasets`, which misses changed files
    options: dict[str, Any] = dict(batched=True, batch_size=1, num_proc=num_proc, load_from_cache_file=False)
    options["desc"] = "Cutting long clips"
    return dataset.map(_cut, fn_kwargs={"window": window}, **options)


def _first_longer(dataset: Dataset, window: float) -> str | None:
    """Return the name of the first clip that is longer than `window` seconds."""
    for row in dataset:
        try:
            samples, rate = read_audio(row["audio"])
        except AudioError:  # the check of the clips names it
            continue
        if len(samples) / rate > window:
            return row["clip"]
    return None


def _cut(batch: dict[str, list[Any]], window: float) -> dict[str, list[Any]]:
    row = {name: values[0] for name, values in batch.items()}
    units = next((row[name] for name in TIMES if row.get(name)), None)
    try:
        samples, rate = read_audio(row["audio"])
    except AudioError:  # the check of the clips names it
        return batch
    duration = len(samples) / rate
    if duration <= window or not units or any(unit["end"] is None for unit in units[:-1]):
        return batch
    units = [dict(unit, end=duration if unit["end"] is None else unit["end"]) for unit in units]
    edges = [0.0, *cut_points(units, duration, window), math.inf]
    separator = word_separator(row.get("language"), row.get("task"))
    rows, prompt = [], row.get("prompt")
    for start, end in itertools.pairwise(edges):
        own = [unit for unit in units if start <= (unit["start"] + unit["end"]) / 2 < end]
        text = separator.join(unit["text"].strip() for unit in own)
        file = io.BytesIO()
        until = min(end, duration)  # words at the very end of the clip belong to the last piece
        piece = samples[round(start * rate) : round(until * rate)]
        soundfile.write(file, piece, rate, format="FLAC", subtype="PCM_24")
        changes: dict[str, Any] = dict(audio={"bytes": file.getvalue(), "path": None}, text=text)
        changes["clip"] = f"{row['clip']}, {start:.1f} to {until:.1f} s"
        if "segments" in row:
            changes["segments"] = _within(row["segments"] or [], start, until)
        if "prompt" in row:
            changes["prompt"] = prompt
        rows.append(row | changes)
        prompt = text
    return {name: [each[name] for each in rows] for name in row}


def _within(segments: list[dict[str, Any]], start: float, end: float) -> list[dict[str, Any]] | None:
    """Return the segments of a piece, in its time; None if a cut goes through one of them."""
    own = [part for part in segments if part["start"] < end and (part["end"] is None or part["end"] > start)]
    if any(part["start"] < start or (part["end"] or end) > end for part in own):
        return None
    shifted = ({"start": part["start"] - start, "end": (part["end"] or end) - start} for part in own)
    return [part | {"text": unit["text"]} for part, unit in zip(shifted, own, strict=True)]
