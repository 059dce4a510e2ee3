"""Training clips that are joined at random.

A student trained on single short clips writes loops where clips are longer than those it has seen. In a first
measurement, joined clips in a quarter of the rows removed most loops on other speech and cost nothing in the domain.
"""

import hashlib
import logging
import uuid
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, concatenate_datasets
from datasets.fingerprint import get_temporary_cache_files_directory

from ..errors import disk_errors
from ..progress import hide_datasets_bars
from .audio import PAUSE
from .columns import AUDIO_FILE, JOINED_COLUMNS, require_audio_files, with_features
from .languages import word_separator

logger = logging.getLogger(__name__)

MOST_CLIPS = 3  # per joined clip
ATTEMPTS = 30  # random choices per joined clip: most don't fit if the window is short
MARGIN = 0.5  # seconds of the window that stay free
WRITTEN_ROWS = 100  # joined rows in memory at once


def with_concatenated(
    dataset: Dataset, probability: float, window_seconds: float, max_label_length: int, seed: int
) -> Dataset:
    """Append rows of two or three random clips of a speaker, so that they are a share `probability` of the result.

    The audio of a joined row is put together when it is read. The columns `JOINED_COLUMNS` are added.
    Clips have the same speaker, if the dataset has a column `speaker`, and the same language and task. Clips without
    speech aren't joined.

    Args:
        dataset: the result of `filter_invalid_clips` or `mix`.
        window_seconds: of the student. Joined clips leave 0.5 s of it free.
        max_label_length: in label tokens.
        seed: of the choice.

    If no two clips fit, none are joined, and a warning is logged.
    """
    require_audio_files(dataset.features["audio"], "--concatenate_probability", "join clips of")
    number = round(len(dataset) * probability / (1.0 - probability))
    facts = dataset.remove_columns("audio")
    rows = [dict(row) for row in facts]
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["text"] and row["text"].strip() and not row.get("no_speech"):
            groups[tuple(row.get(name) for name in ("speaker", "language", "task"))].append(i)
    speech = [i for members in groups.values() for i in members]
    group_of = {i: members for members in groups.values() for i in members}
    generator = np.random.default_rng([seed, 0])
    chosen: dict[tuple[int, ...], None] = {}  # each once, in the order of the choice
    for _ in range(ATTEMPTS * number if speech else 0):
        clips = _choose(speech, group_of, generator)
        while len(clips) > 1 and not fits([rows[i] for i in clips], window_seconds, max_label_length):
            clips.pop()
        if len(clips) > 1:
            chosen.setdefault(tuple(clips))
        if len(chosen) == number:
            break
    if len(chosen) < number:
        logger.warning(
            "--concatenate_probability: joined %d clips instead of %d, as few clips of a speaker fit in %g s together",
            len(chosen),
            number,
            window_seconds,
        )
    features = Features(dataset.features | JOINED_COLUMNS)
    if not chosen:
        return with_features(dataset, features)
    added = _joined(dataset.select_columns("audio"), rows, list(chosen), features)
    return concatenate_datasets([with_features(dataset, features), with_features(added, features)])


def _joined(audio: Dataset, rows: list[dict[str, Any]], chosen: list[tuple[int, ...]], features: Features) -> Dataset:
    """Return the joined rows. They contain copies of embedded audio, and so are in a temporary file, not in memory."""

    def join(first: Mapping[str, Any], number: int) -> dict[str, Any]:
        clips = chosen[number]
        return joined_row([rows[i] for i in clips], [first["audio"], *(audio[i]["audio"] for i in clips[1:])])

    fingerprint, directory = uuid.uuid4().hex, get_temporary_cache_files_directory()
    with hide_datasets_bars(), disk_errors(f"--concatenate_probability: joined clips in {directory}"):
        return audio.select([clips[0] for clips in chosen]).map(
            join,
            with_indices=True,
            features=Features(features | {"audio": AUDIO_FILE}),
            writer_batch_size=WRITTEN_ROWS,
            cache_file_name=str(Path(directory) / f"joined-{fingerprint}.arrow"),
            new_fingerprint=fingerprint,  # otherwise all clips would be hashed
        )


def _choose(speech: list[int], group_of: dict[int, list[int]], generator: np.random.Generator) -> list[int]:
    """Return two or three random clips of a group, in random order. The first is any clip."""
    first = speech[generator.integers(len(speech))]
    clips = [first]
    for _ in range(int(generator.integers(2, MOST_CLIPS, endpoint=True)) - 1):
        other = group_of[first][generator.integers(len(group_of[first]))]
        clips += [other] if other not in clips else []
    return clips


def fits(rows: list[dict[str, Any]], window_seconds: float, max_label_length: int) -> bool:
    """Return whether clips with `duration` and `label_tokens` fit into a window together."""
    duration = sum(row["duration"] for row in rows) + PAUSE * (len(rows) - 1)
    return duration <= window_seconds - MARGIN and sum(row["label_tokens"] for row in rows) <= max_label_length


def joined_row(rows: list[dict[str, Any]], audio: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of several clips. Values of other columns are those of the first.

    Args:
        rows: with `duration` and `label_tokens`, and without `audio` unless it is to be replaced.
        audio: the files of the clips.
    """
    first, offset, segments = rows[0], 0.0, []
    for row in rows:
        for segment in row.get("segments") or []:
            end = row["duration"] if segment["end"] is None else segment["end"]  # the last one may be open
            segments.append(segment | {"start": segment["start"] + offset, "end": end + offset})
        offset += row["duration"] + PAUSE
    keys = [row.get("audio_key", row["clip"]) for row in rows]  # a stream has no keys
    space = word_separator(first.get("language"), first.get("task"))
    times = {"segments": segments if all(row["segments"] for row in rows) else None} if "segments" in first else {}
    return (
        first
        | times
        | dict(
            audio=audio[0],
            more_audio=audio[1:],
            text=space.join(row["text"].strip() for row in rows),
            clip=" + ".join(row["clip"] for row in rows),
            duration=offset - PAUSE,
            label_tokens=sum(row["label_tokens"] for row in rows),
            audio_key=hashlib.blake2b("+".join(keys).encode(), digest_size=16).hexdigest(),
            joined_keys=keys,
        )
    )
