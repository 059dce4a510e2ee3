"""Consecutive clips of a speaker joined to the length of Whisper's window.

Whisper pads every clip to 30 s, so that short ones cost as much as long ones, and a student that has heard only short
ones gets lost in long recordings (Gandhi et al. 2023, Distil-Whisper, section 4, pack their data as well).
"""

import io
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import Audio, Dataset, Features, List, Value
from transformers import WhisperTokenizer

from ..data.audio import SAMPLING_RATE, waveform
from ..data.labels import text_ids
from ..data.languages import word_separator
from ..errors import UserError
from .transcribe import RESOLUTION, in_seconds

PACKING = "packing"  # the folder, removed at the end
FRAME_TOKENS = 4  # of labels around their text: language, task, whether with timestamps, end of text
TIMES_OF_SEGMENT = 2  # tokens: its start and its end
# of the measures of several clips: that of their pack
WORST = dict(avg_log_prob=min, compression_ratio=max, repetition=max, wer=max)


def check_can_pack(clips: Dataset, window: float, seconds: float | None) -> None:
    """Raise `UserError` if it isn't known who speaks, or if packs would be longer than the window."""
    if "speaker" not in clips.column_names:
        raise UserError(
            "--pack joins clips of one speaker, and the dataset doesn't say who speaks: name its column with "
            "--speaker_column, or add one (to metadata.csv a column `speaker`)"
        )
    if seconds is not None and seconds > window:
        raise UserError(f"--pack_seconds {seconds:g} is more than {window:g} s, what the teacher hears at once")


def plan_packs(
    seconds: list[float],
    speakers: list[str | None],
    tokens: list[int],
    max_duration_in_seconds: float,
    max_tokens: int,
) -> list[list[int]]:
    """Which clips, by their place, go into which pack.

    Clips are taken in their order, and a pack ends where the speaker changes, or the next clip doesn't fit. A clip of
    an unknown speaker, or one that doesn't fit by itself, stays alone.

    Args:
        seconds, speakers, tokens: of the clips; tokens as labels have them, with those of timestamps.
        max_seconds, max_tokens: of a pack.
    """
    packs: list[list[int]] = []
    filled = used = 0
    for i, (length, speaker, count) in enumerate(zip(map(_samples, seconds), speakers, tokens, strict=True)):
        same = packs and speaker is not None and speaker == speakers[packs[-1][-1]]
        if same and filled + length <= _samples(max_duration_in_seconds) and used + count <= max_tokens:
            packs[-1].append(i)
            filled, used = filled + length, used + count
        else:
            packs.append([i])
            filled, used = length, count
    return packs


def pack(
    clips: Dataset,
    tokenizer: WhisperTokenizer,
    *,
    max_duration_in_seconds: float,
    max_label_length: int,
    directory: Path,
    num_proc: int | None = None,
) -> Dataset:
    """Pack clips that are to be learned.

    Of a clip that was dropped nothing is left: its neighbours may stand in one pack, whose audio is that of its clips
    one after the other.

    Args:
        clips: of `label_clips`, with `speaker`.
        tokenizer: of the teacher, to count tokens.
        max_seconds, max_label_tokens: of a pack of several clips; these as `SpeechCollator.label_ids` has them.
        directory: for the packs, until they are saved.
        num_proc: processes that decode and encode audio. Default: this one.

    Returns:
        A row a pack with the columns of `clips`. `audio`: FLAC of 16 kHz and 16 bits; `text`: joined by spaces,
        if the language puts any between words; `segments`: those of the clips or, if they have none, the clips
        themselves, in seconds from the pack's beginning, multiples of 0.02; `clip`: the first and the last one's name;
        `prompt`: the text of the pack before, None if that isn't of the same speaker; `reference`: joined like `text`,
        None if a clip has none; of the measures the worst.

    Raises:
        UserError: a clip can't be decoded any more.
    """
    folder = directory / PACKING
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    rows = list(clips.remove_columns("audio"))
    tokens = [
        len(text_ids(tokenizer, row["text"], row.get("language"), row.get("task")))
        + TIMES_OF_SEGMENT * len(row["segments"] or [row])
        for row in rows
    ]
    packs = plan_packs(
        clips["seconds"][:], clips["speaker"][:], tokens, max_duration_in_seconds, max_label_length - FRAME_TOKENS
    )
    packed: list[dict[str, Any]] = []
    for members in packs:
        row = _joined([rows[i] for i in members])
        before = packed[-1] if packed else None
        same = before is not None and row["speaker"] is not None and before["speaker"] == row["speaker"]
        packed.append(row | {"prompt": before["text"] if same else None, "members": members})
    sounds = clips.select_columns(["audio", "clip"])

    def with_audio(row: dict[str, Any]) -> dict[str, Any]:
        limit = max(max_duration_in_seconds, row["seconds"])  # a clip that is longer is a pack of its own, whole
        return {"audio": {"bytes": _flac([sounds[i] for i in row["members"]], _samples(limit)), "path": None}}

    without_audio = Features({name: feature for name, feature in clips.features.items() if name != "audio"})
    return Dataset.from_list(packed, features=Features(without_audio | {"members": List(Value("int64"))})).map(
        with_audio,
        remove_columns="members",
        features=Features(audio=Audio(decode=False), **without_audio),
        cache_file_name=str(folder / "packs.arrow"),
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,  # or all clips would be hashed for one
        writer_batch_size=100,
        num_proc=num_proc,
        desc="Packing",
    )


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several, without audio."""
    segments: list[dict[str, Any]] = []
    seconds = 0.0
    last = math.floor(sum(row["seconds"] for row in rows) / RESOLUTION + 1e-6)
    for row in rows:
        own = row["segments"] or [dict(start=0.0, end=row["seconds"], text=row["text"])]
        for segment in own:
            times = {name: min(round((seconds + segment[name]) / RESOLUTION), last) for name in ("start", "end")}
            segments.append({name: in_seconds(steps) for name, steps in times.items()} | {"text": segment["text"]})
        seconds += row["seconds"]
    space = word_separator(rows[0].get("language"), rows[0].get("task"))
    names = [rows[0]["clip"], rows[-1]["clip"]] if len(rows) > 1 else [rows[0]["clip"]]
    joined = rows[0] | dict(
        text=space.join(row["text"] for row in rows), clip="..".join(names), segments=segments, seconds=seconds
    )
    if "reference" in joined:
        references = [row["reference"] for row in rows]
        joined["reference"] = None if None in references else space.join(references)
    for name, worst in WORST.items():
        known = [row[name] for row in rows if row[name] is not None]
        joined[name] = worst(known) if known else None
    return joined


def _flac(rows: list[dict[str, Any]], limit: int) -> bytes:
    """The clips one after the other, `limit` samples at most: resampling may give a sample more a clip."""
    file = io.BytesIO()
    wave = np.concatenate([waveform(row) for row in rows])[:limit]
    soundfile.write(file, wave, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLING_RATE)
