"""Cut clips that are longer than the student's window at pauses, with their text.

The times are those of the column `words`, or else of `segments`, as a teacher's pseudo-labels have them
(`askd-hf pseudo-label --timestamps`).
"""

import hashlib
import io
import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from huggingface_hub import constants

from ..errors import UserError, disk_errors
from ..progress import progress_bar
from .audio import read_audio
from .audio_checks import AudioInfo, audio_infos
from .columns import are_segments, iterate_rows, require_audio_files
from .languages import word_separator
from .shared_disk import locked_for, others_wait, processes_sharing

TIMES = ("words", "segments")  # columns with `start`, `end` and `text`, the finest first
SILENCE = 0.5  # seconds that stay before and after the words where silence is cut off
VERSION = 4  # raise it if `_cut` makes other pieces of the same row
CUT_FROM = "cut from"  # column of the pieces: the number of the long clip


def piece_bounds(units: Sequence[Mapping[str, Any]], duration: float, window: float) -> list[tuple[float, float]]:
    """Return start and end of the pieces of a clip, in seconds, each with at least one unit.

    A clip is cut in the middle of the longest pause in the second half of the window, or else of the last pause in its
    first half. A unit that is longer than the window stays whole. Silence is left out: that at the start and the end
    of a clip that is too long, and the middle of pauses of more than 1 s; `SILENCE` of it stays beside the words, or
    less if they fill the window.

    Args:
        units: words or segments with `start` and `end` in seconds, sorted by `start`.
        duration: of the clip.
    """
    if duration <= window:
        return [(0.0, duration)]
    ends = [*itertools.accumulate((unit["end"] for unit in units), max)]  # units may overlap
    starts = [unit["start"] for unit in units[1:]]
    pauses = [(end, start) for end, start in zip(ends, starts, strict=False) if end <= start]
    first, last = units[0]["start"], ends[-1]  # of the units that are left
    start, bounds = max(first - SILENCE, 0.0), []
    while last - first > window:
        fitting = [pause for pause in pauses if start < _middle(pause) <= start + window]
        late = [pause for pause in fitting if _middle(pause) > start + window / 2]
        behind = [pause for pause in pauses if _middle(pause) > start + window]
        if late:
            pause = max(late, key=lambda each: (each[1] - each[0], each[1]))
        elif fitting or behind:
            pause = fitting[-1] if fitting else behind[0]
        else:
            break
        end = min(_middle(pause), pause[0] + SILENCE)
        end = min(end, max(pause[0], start + window))  # in the silence, even if its middle is outside of the window
        if pause[0] - first <= window:
            start = max(start, end - window)
        bounds.append((start, end))
        first, start = pause[1], max(_middle(pause), pause[1] - SILENCE)
    margin = min(SILENCE, max(window - (last - first), 0.0) / 2)
    return [*bounds, (max(start, first - margin), min(last + margin, duration))]


def _middle(pause: tuple[float, float]) -> float:
    return (pause[0] + pause[1]) / 2


def cut_long_clips(
    dataset: Dataset, window: float, name: str, num_proc: int | None = None, recheck: bool = False
) -> Dataset:
    """Replace the clips that are longer than `window` seconds by their pieces.

    A clip without times, or one that can't be decoded, is left unchanged. Silence is left out (`piece_bounds`). Pieces
    have a `clip` such as "a.wav, 12.3 to 17.9 s", the text of their words or segments, and `segments` relative to
    their start. The prompt of a later piece is the text of the one before it.

    A later start decodes nothing: the durations are kept by `audio_infos`, the pieces in `kept_in`. The processes of a
    distributed run measure a part of the clips each, and one per disk cuts. All must call this, with the same dataset.

    Args:
        dataset: the result of `load_speech_dataset`.
        name: of the dataset, for messages.
        num_proc, recheck: see `audio_infos`. The current process cuts, or that many.

    Raises `UserError` if the dataset has longer clips and no times.
    """
    infos = _measured(dataset, name, num_proc, recheck)
    long = [row for row, info in enumerate(infos) if info.duration > window]
    if not long:
        return dataset
    require_audio_files(dataset.features["audio"], name, "cut long clips of")
    if not has_times(dataset):
        raise UserError(
            f"--long_clips cut requires the times of words or segments, and {name} has neither a column words nor "
            f"segments with start, end and text, but clips that are longer than {window:g} s, the first of them "
            f"{dataset[long[0]]['clip']}: transcribe it with askd-hf pseudo-label --timestamps, or choose skip"
        )
    pieces = _pieces(dataset.select(long), [infos[row].key for row in long], window, num_proc)
    places: dict[int, list[int]] = {row: [] for row in long}
    for place, cut in enumerate(pieces[CUT_FROM]):
        places[long[cut]].append(len(dataset) + place)
    order = itertools.chain.from_iterable(places.get(row, [row]) for row in range(len(dataset)))
    return concatenate_datasets([dataset, pieces.remove_columns(CUT_FROM)]).select(list(order))


def has_times(dataset: Dataset) -> bool:
    """Return whether a dataset has a column with the times of words or segments."""
    return any(column in dataset.column_names and are_segments(dataset.features[column]) for column in TIMES)


def kept_in() -> Path:
    """Return the directory of the pieces: `askd_hf/cut_clips-VERSION` in `HF_HOME`."""
    return Path(constants.HF_HOME) / "askd_hf" / f"cut_clips-{VERSION}"


def _measured(dataset: Dataset, name: str, num_proc: int | None, recheck: bool) -> list[AudioInfo]:
    """Return what is known of the audio of each row, in all processes."""
    process = PartialState()
    share = range(process.process_index, len(dataset), process.num_processes)
    with others_wait(), progress_bar(len(dataset), f"Measuring the clips of {name}") as bar:
        audio = dataset.select_columns("audio").select(share)
        own = audio_infos(audio, num_proc, recheck, lambda clips: bar.update(clips * process.num_processes))
    if process.num_processes == 1:
        return own
    parts = gather_object([own])
    return [parts[row % len(parts)][row // len(parts)] for row in range(len(dataset))]


def _pieces(long: Dataset, keys: list[str], window: float, num_proc: int | None) -> Dataset:
    """Return the pieces of long clips, each with the row it was cut from: as an earlier start left them, or cut.

    Args:
        keys: `audio_key` of the clips.
    """
    digest = hashlib.blake2b(f"{window}".encode(), digest_size=16)
    for key, row in zip(keys, iterate_rows(long.remove_columns("audio")), strict=True):
        digest.update(repr((key, row)).encode())
    folder = kept_in() / digest.hexdigest()
    with disk_errors(str(kept_in())):
        processes = processes_sharing(kept_in())
        with locked_for(kept_in(), processes), others_wait():
            if PartialState().process_index == processes[0] and not folder.exists():
                unfinished = folder.with_name("unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a start that was killed
                unfinished.mkdir()
                options: dict[str, Any] = dict(batched=True, batch_size=1, with_indices=True, num_proc=num_proc)
                options |= dict(fn_kwargs={"window": window}, desc="Cutting long clips", load_from_cache_file=False)
                # one row at a time, as a row becomes several
                long.map(_cut, cache_file_name=str(unfinished / "pieces.arrow"), **options)
                unfinished.rename(folder)
    # of each of `num_proc` processes, in their order
    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))])


def _cut(batch: dict[str, list[Any]], indices: list[int], window: float) -> dict[str, list[Any]]:
    row = {name: values[0] for name, values in batch.items()} | {CUT_FROM: indices[0]}
    units = next((row[name] for name in TIMES if row.get(name)), None)
    if not units or not _has_times(units):
        return batch | {CUT_FROM: indices}
    samples, rate = read_audio(row["audio"])
    duration = len(samples) / rate
    units = [dict(unit, end=duration if unit["end"] is None else unit["end"]) for unit in units]
    units.sort(key=lambda unit: unit["start"])  # segments of a conversation may be sorted by speaker
    bounds = piece_bounds(units, duration, window)
    limits = [-math.inf, *(start for start, _ in bounds[1:]), math.inf]  # a word may be at the very end of the clip
    separator = word_separator(row.get("language"), row.get("task"))
    rows, prompt = [], row.get("prompt")
    for (start, end), (since, until) in zip(bounds, itertools.pairwise(limits), strict=True):
        own = [unit for unit in units if since <= _middle((unit["start"], unit["end"])) < until]
        text = separator.join(unit["text"].strip() for unit in own)
        file = io.BytesIO()
        piece = samples[round(start * rate) : round(end * rate)]
        soundfile.write(file, piece, rate, format="FLAC", subtype="PCM_24")
        changes: dict[str, Any] = dict(audio={"bytes": file.getvalue(), "path": None}, text=text)
        changes["clip"] = f"{row['clip']}, {start:.1f} to {end:.1f} s"
        if row.get("words"):
            times = [(max(word["start"], start) - start, min(word["end"], end) - start) for word in own]
            changes["words"] = [dict(word, start=a, end=b) for word, (a, b) in zip(own, times, strict=True)]
        if "segments" in row:
            segments = row["segments"] or []
            timed = not segments or _has_times(segments)
            changes["segments"] = _within(segments, units, start, end) if timed else None
        if "prompt" in row:
            changes["prompt"] = prompt
        rows.append(row | changes)
        prompt = text
    return {name: [each[name] for each in rows] for name in row}


def _has_times(units: Sequence[Mapping[str, Any] | None]) -> bool:
    """Return whether all units have a text, a start and an end. The one that starts last needs no end."""
    if any(unit is None or unit["text"] is None or not _is_time(unit["start"]) for unit in units):
        return False
    *others, last = sorted((unit for unit in units if unit), key=lambda unit: unit["start"])
    return all(_is_time(unit["end"]) for unit in others) and (last["end"] is None or _is_time(last["end"]))


def _is_time(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _within(
    segments: list[dict[str, Any]], units: Sequence[Mapping[str, Any]], start: float, end: float
) -> list[dict[str, Any]] | None:
    """Return the segments of a piece, in its time; None if a cut goes through the words of one of them.

    Args:
        units: words or segments of the whole clip.
    """
    middles = [_middle((unit["start"], unit["end"])) for unit in units]
    found = []
    for part in sorted(segments, key=lambda segment: segment["start"]):
        until = math.inf if part["end"] is None else part["end"]
        spoken = [start <= at <= end for at in middles if part["start"] <= at <= until]
        if any(spoken) and not all(spoken):
            return None
        if any(spoken):
            bounds = {"start": max(part["start"], start) - start, "end": min(until, end) - start}
            found.append(part | bounds)
    return found
