"""The columns of a speech dataset, and functions that change columns without copying the audio.

`Dataset.cast`, `Dataset.map`, and `Dataset.add_column` after a `select` rewrite all columns: gigabytes of audio, in
files next to the user's dataset. The functions here create a column in memory and leave the others in place.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Audio, Dataset, Features, LargeList, List, Value
from datasets.features.features import FeatureType, get_nested_type

from ..errors import UserError

# the storage of `Audio(decode=False)`; that type itself would be encoded again in a stream, which needs torchcodec
AUDIO_FILE = {"bytes": Value("binary"), "path": Value("string")}
SEGMENTS = List({"start": Value("float32"), "end": Value("float32"), "text": Value("string")})
COLUMNS = Features(
    audio=Audio(decode=False),
    text=Value("string"),
    clip=Value("string"),
    language=Value("string"),
    task=Value("string"),
    segments=SEGMENTS,
    prompt=Value("string"),
    no_speech=Value("bool"),
)
"""Columns used in training. A value is None if it doesn't apply; `no_speech` is True for clips without speech."""
VALIDATION_COLUMNS = Features(duration=Value("float64"), label_tokens=Value("int64"), audio_key=Value("string"))
"""Columns added by `filter_invalid_clips`: audio duration in seconds, label tokens per clip, hash of the audio."""
JOINED_COLUMNS = Features(more_audio=List(AUDIO_FILE), joined_keys=List(Value("string")))
"""Columns of clips joined at random, None in other rows: the files behind that of `audio`, and the `audio_key` of
each clip."""
TRAINING_COLUMNS = ("no_speech", "rng_key")
"""Columns added in training. A user's columns with these names are dropped."""
BATCH_ROWS = 1000  # read at a time
FORMER_COLUMNS = {"seconds": "duration", "negative": "no_speech", "draw": "rng_key"}
"""Former name of a column -> its name now. Datasets saved by earlier versions have the former names."""


def is_text(feature: FeatureType) -> bool:
    """Return whether the values of a column are strings, or all None."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")


def are_segments(feature: FeatureType) -> bool:
    """Return whether a column can be cast to `SEGMENTS`; other fields of the segments are dropped."""
    if feature == Value("null"):
        return True
    if not isinstance(feature, List | LargeList):
        return False
    segment = feature.feature
    if not isinstance(segment, dict):
        return segment == Value("null")
    numbers = (segment.get(name) for name in ("start", "end"))
    return is_text(segment.get("text")) and all(
        isinstance(number, Value) and number.dtype.startswith(("float", "int", "uint")) for number in numbers
    )


def require_audio_files(feature: FeatureType, name: str, action: str) -> None:
    """Raise `UserError` if the audio is stored as arrays, not as files.

    Args:
        action: what requires audio files, such as "stream".
    """
    if isinstance(feature, dict) and "array" in feature:
        raise UserError(
            f"{name}: cannot {action} datasets whose audio is stored as arrays; save it as audio files "
            "(soundfile.write) and load those"
        )


def with_features(dataset: Dataset, wanted: Features) -> Dataset:
    """Return the dataset with only the columns of `wanted`; a missing column is None in every row.

    Columns of another type are cast. pyarrow casts one column without reading the others, and raises `pa.ArrowInvalid`
    or `pa.ArrowNotImplementedError` if it can't.
    """
    # change all stored rows, including those that a `select` left out: the index mapping is put back at the end
    stored = Dataset(dataset.data, dataset.info, fingerprint=dataset._fingerprint)
    for name, feature in wanted.items():
        if stored.features.get(name) == feature:
            continue
        arrow_type = get_nested_type(feature)
        if name in stored.column_names:
            column = stored.data.column(name).cast(arrow_type)
            stored = stored.remove_columns(name)
        else:
            column = pa.nulls(len(stored), arrow_type)
        stored = stored.add_column(name, column, feature=feature)
    stored = stored.select_columns(list(wanted))
    return Dataset(stored.data, stored.info, dataset.split, dataset._indices, stored._fingerprint)


def iterate_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows as dictionaries. They are read in batches, which is faster than iterating over the dataset."""
    for batch in dataset.iter(BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def with_current_names(dataset: Dataset) -> Dataset:
    """Rename the columns that an earlier version saved under `FORMER_COLUMNS`. No column is copied."""
    present = dataset.column_names
    names = {old: new for old, new in FORMER_COLUMNS.items() if old in present and new not in present}
    return dataset.rename_columns(names) if names else dataset


def replace_column(dataset: Dataset, name: str, values: list | pa.Array) -> Dataset:
    """Return the dataset with the column `name`, now the last one, set to `values`. No other column is copied."""
    if name in dataset.column_names:
        # the old column is removed last, since a dataset without columns has no rows
        before = f"{name} before"
        return replace_column(dataset.rename_column(name, before), name, values).remove_columns(before)
    if dataset._indices is None:
        return dataset.add_column(name, values)
    # `add_column` would rewrite all columns of the selected rows, audio included. Instead, align the values with the
    # stored rows and keep the index mapping.
    rows = dataset._indices.column(0).to_numpy()
    place = np.full(len(dataset.data), -1)
    place[rows] = np.arange(len(rows))
    if not np.array_equal(place[rows], np.arange(len(rows))):  # a row selected twice may have two values
        return dataset.add_column(name, values)
    column = pa.array(values).take(pa.array(place, mask=place < 0))
    stored = Dataset(dataset.data, dataset.info, fingerprint=dataset._fingerprint).add_column(name, column)
    return Dataset(stored.data, stored.info, dataset.split, dataset._indices, stored._fingerprint)


def longest_first(clips: Dataset, above: float = 0.0, up_to: float = math.inf) -> Dataset:
    """Return the clips longer than `above` and not longer than `up_to` seconds, sorted by the column `duration`."""
    durations = clips["duration"][:]
    order = sorted(range(len(clips)), key=lambda row: -durations[row])
    return clips.select([row for row in order if above < durations[row] <= up_to])
