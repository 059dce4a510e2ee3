"""The columns of speech, and how they are changed without a copy of the audio.

`Dataset.cast`, `map`, and `add_column` after a `select`, write all columns anew: gigabytes of audio, in files beside
the user's dataset. So here a column is made in memory, and put beside those that stay where they are.
"""

import numpy as np
import pyarrow as pa
from datasets import Audio, Dataset, Features, LargeList, List, Value
from datasets.features.features import FeatureType

from ..errors import UserError

# as `Audio(decode=False)` has it; in a stream `datasets` would encode that again, for which it needs torchcodec
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
    negative=Value("bool"),
)
"""What a row of speech may have, for training. None where it doesn't apply."""
CHECKED = Features(seconds=Value("float64"), label_tokens=Value("int64"), audio_key=Value("string"))
"""What `filter_invalid_clips` adds."""
OF_TRAINING = ("negative", "draw")
"""What training adds to rows; a user's columns of these names say something else."""


def is_text(feature: FeatureType) -> bool:
    """Whether a column holds strings, or nothing but None."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")


def are_segments(feature: FeatureType) -> bool:
    """Whether a column can be cast to `SEGMENTS`, losing the other fields of the segments."""
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


def refuse_arrays(feature: FeatureType, name: str, what: str) -> None:
    """Raise `UserError` if audio isn't files.

    Args:
        name: of the speech or its first clip.
        what: can't be done.
    """
    if not isinstance(feature, Audio):
        raise UserError(
            f"{name}: audio as arrays of samples can't be {what}; save it as audio files (soundfile.write), and give "
            "their paths"
        )


def with_features(dataset: Dataset, wanted: Features) -> Dataset:
    """The dataset with the columns of `wanted` alone; one that it lacks is None in every row.

    Columns of another type are cast, which pyarrow does without a look at the others; it raises `pa.ArrowInvalid` or
    `pa.ArrowNotImplementedError` for what can't be.
    """
    # all stored rows, those that a `select` has left out as well: its mapping of indices comes back at the end
    stored = Dataset(dataset.data, dataset.info, fingerprint=dataset._fingerprint)
    for name, feature in wanted.items():
        if stored.features.get(name) == feature:
            continue
        kind = arrow_type(feature)
        if name in stored.column_names:
            column = stored.data.column(name).cast(kind)
            stored = stored.remove_columns(name)
        else:
            column = pa.nulls(len(stored), kind)
        stored = stored.add_column(name, column, feature=feature)
    stored = stored.select_columns(list(wanted))
    return Dataset(stored.data, stored.info, dataset.split, dataset._indices, stored._fingerprint)


def arrow_type(feature: FeatureType) -> pa.DataType:
    return Features(column=feature).arrow_schema.field("column").type


def replace_column(dataset: Dataset, name: str, values: list | pa.Array) -> Dataset:
    """The dataset with the column `name` set to `values`, at its end. No other column is copied."""
    if name in dataset.column_names:
        # removed at the end: a dataset without columns has no rows
        before = f"{name} before"
        return replace_column(dataset.rename_column(name, before), name, values).remove_columns(before)
    if dataset._indices is None:
        return dataset.add_column(name, values)
    # `add_column` would write all columns of the chosen rows anew, audio included: put the values beside the stored
    # rows instead, so that the mapping of indices finds them
    rows = dataset._indices.column(0).to_numpy()
    place = np.full(len(dataset.data), -1)
    place[rows] = np.arange(len(rows))
    if not np.array_equal(place[rows], np.arange(len(rows))):  # a row that was chosen twice may have two values
        return dataset.add_column(name, values)
    column = pa.array(values).take(pa.array(place, mask=place < 0))
    stored = Dataset(dataset.data, dataset.info, fingerprint=dataset._fingerprint).add_column(name, column)
    return Dataset(stored.data, stored.info, dataset.split, dataset._indices, stored._fingerprint)
