"""Concatenate consecutive clips of a speaker up to the length of Whisper's window.

Whisper pads every clip to 30 s, so short clips cost as much as long ones, and a student trained only on short clips
fails on long recordings. Distil-Whisper concatenates its training data as well (Gandhi et al. 2023, section 4).
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
from ..data.labels import TIME_PRECISION, text_ids
from ..data.languages import word_separator
from ..errors import UserError
from .transcription import to_seconds

TEMPORARY_DIR = "concatenation"  # removed once the dataset is saved
PREFIX_TOKENS = 4  # label tokens besides text and timestamps: language, task, <|notimestamps|>, end of text
TIMESTAMPS_PER_SEGMENT = 2
# score of concatenated clips: the worst of their scores
WORST = dict(avg_logprob=min, compression_ratio=max, repeated_5gram_rate=max, wer=max)


def check_can_concatenate(clips: Dataset, window: float, seconds: float | None) -> None:
    """Raise `UserError` if the speakers are unknown, or `seconds` exceeds the teacher's window."""
    if "speaker" not in clips.column_names:
        raise UserError(
            "--concatenate requires a speaker column: choose it with --speaker_column, or add a column `speaker` to "
            "the dataset (to metadata.csv)"
        )
    if seconds is not None and seconds > window:
        raise UserError(f"--concatenate_seconds must be at most {window:g}, the teacher's window, got {seconds:g}")


def plan_groups(
    durations: list[float],
    speakers: list[str | None],
    tokens: list[int],
    max_duration_in_seconds: float,
    max_tokens: int,
) -> list[list[int]]:
    """Return the indices of the clips in each group.

    Clips stay in order. A group ends when the speaker changes or the next clip doesn't fit. A clip with an unknown
    speaker, or one that exceeds a limit by itself, is a group of its own.

    Args:
        durations, speakers, tokens: of the clips; tokens are label tokens including timestamps.
        max_duration_in_seconds, max_tokens: of a group.
    """
    groups: list[list[int]] = []
    group_samples = group_tokens = 0
    for i, (samples, speaker, count) in enumerate(zip(map(_samples, durations), speakers, tokens, strict=True)):
        same = groups and speaker is not None and speaker == speakers[groups[-1][-1]]
        fits = group_samples + samples <= _samples(max_duration_in_seconds) and group_tokens + count <= max_tokens
        if same and fits:
            groups[-1].append(i)
            group_samples, group_tokens = group_samples + samples, group_tokens + count
        else:
            groups.append([i])
            group_samples, group_tokens = samples, count
    return groups


def concatenate_clips(
    clips: Dataset,
    tokenizer: WhisperTokenizer,
    *,
    max_duration_in_seconds: float,
    max_label_length: int,
    directory: Path,
    num_proc: int | None = None,
) -> Dataset:
    """Concatenate the clips of a dataset.

    Dropped clips leave no gap: their neighbors may be concatenated.

    Args:
        clips: the result of `build_dataset`, with `speaker`.
        tokenizer: the teacher's, to count label tokens.
        max_duration_in_seconds, max_label_length: of several clips together; the length is in label tokens, as of
            `SpeechCollator.label_ids`.
        directory: for temporary files, until the result is saved.
        num_proc: number of processes that decode and encode audio; None for the current process.

    Returns:
        One row per group of clips, with the columns of `clips`:

        audio: FLAC, 16 kHz, 16 bits.
        text: texts joined by spaces, or without in languages that have none.
        segments: those of the clips, or one per clip without segments. Times are relative to the start of the group,
            in multiples of 0.02 s.
        clip: names of the first and the last clip, as "first..last".
        prompt: text of the previous group, None if its speaker is another one.
        reference: joined like `text`; None if a clip has none.
        avg_logprob, compression_ratio, repeated_5gram_rate, wer: the worst of the clips.

    Raises `UserError` if a clip can no longer be decoded.
    """
    folder = directory / TEMPORARY_DIR
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    folder.mkdir(parents=True)
    rows = list(clips.remove_columns("audio"))
    tokens = [
        len(text_ids(tokenizer, row["text"], row.get("language"), row.get("task")))
        + TIMESTAMPS_PER_SEGMENT * len(row["segments"] or [row])
        for row in rows
    ]
    groups = plan_groups(
        clips["duration"][:], clips["speaker"][:], tokens, max_duration_in_seconds, max_label_length - PREFIX_TOKENS
    )
    joined: list[dict[str, Any]] = []
    for members in groups:
        row = _joined([rows[i] for i in members])
        previous = joined[-1] if joined else None
        same = previous is not None and row["speaker"] is not None and previous["speaker"] == row["speaker"]
        joined.append(row | {"prompt": previous["text"] if same else None, "members": members})
    audio = clips.select_columns(["audio", "clip"])

    def with_audio(row: dict[str, Any]) -> dict[str, Any]:
        limit = max(
            max_duration_in_seconds, row["duration"]
        )  # a longer clip is a group of its own, and isn't truncated
        return {"audio": {"bytes": _flac([audio[i] for i in row["members"]], _samples(limit)), "path": None}}

    without_audio = Features({name: feature for name, feature in clips.features.items() if name != "audio"})
    return Dataset.from_list(joined, features=Features(without_audio | {"members": List(Value("int64"))})).map(
        with_audio,
        remove_columns="members",
        features=Features(audio=Audio(decode=False), **without_audio),
        cache_file_name=str(folder / "groups.arrow"),
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,  # otherwise all clips would be hashed
        writer_batch_size=100,
        num_proc=num_proc,
        desc="Concatenating",
    )


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge rows into one, without audio."""
    segments: list[dict[str, Any]] = []
    offset = 0.0
    last = math.floor(sum(row["duration"] for row in rows) / TIME_PRECISION + 1e-6)
    for row in rows:
        row_segments = row["segments"] or [dict(start=0.0, end=row["duration"], text=row["text"])]
        for segment in row_segments:
            times = {name: min(round((offset + segment[name]) / TIME_PRECISION), last) for name in ("start", "end")}
            segments.append({name: to_seconds(steps) for name, steps in times.items()} | {"text": segment["text"]})
        offset += row["duration"]
    space = word_separator(rows[0].get("language"), rows[0].get("task"))
    names = [rows[0]["clip"], rows[-1]["clip"]] if len(rows) > 1 else [rows[0]["clip"]]
    joined = rows[0] | dict(
        text=space.join(row["text"] for row in rows), clip="..".join(names), segments=segments, duration=offset
    )
    if "reference" in joined:
        references = [row["reference"] for row in rows]
        joined["reference"] = None if None in references else space.join(references)
    for name, worst in WORST.items():
        known = [row[name] for row in rows if row[name] is not None]
        joined[name] = worst(known) if known else None
    return joined


def _flac(rows: list[dict[str, Any]], limit: int) -> bytes:
    """Return the concatenated clips as FLAC, truncated to `limit` samples: resampling may add a sample per clip."""
    file = io.BytesIO()
    wave = np.concatenate([waveform(row) for row in rows])[:limit]
    soundfile.write(file, wave, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLING_RATE)
