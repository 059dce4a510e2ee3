"""Convert the audio column of a dataset to audio files, `{"bytes", "path"}`, whatever its type."""

import functools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Dataset, Features, IterableDataset, Value
from datasets.features.features import FeatureType
from datasets.fingerprint import Hasher

from ..errors import UserError
from .clip_files import ClipFiles
from .columns import AUDIO_FILE, require_audio_files, with_features

STANDARD_TYPES = {"large_string": "string", "string_view": "string", "large_binary": "binary", "binary_view": "binary"}


def find_audio(dataset: Dataset | IterableDataset) -> str | None:
    """Return "audio" if there is such a column, else the only column of type `Audio`, else None."""
    if "audio" in dataset.column_names:
        return "audio"
    found = [column for column, feature in dataset.features.items() if isinstance(feature, Audio)]
    return found[0] if len(found) == 1 else None


def with_audio(dataset: Dataset | IterableDataset, name: str, chosen: str) -> Dataset | IterableDataset:
    """Cast all audio columns to files, because `datasets` needs torchcodec to decode them."""
    if isinstance(dataset.features[chosen], dict) and "array" in dataset.features[chosen]:
        if isinstance(dataset, IterableDataset):
            require_audio_files(dataset.features[chosen], name, "stream")
        return dataset
    for column, feature in dataset.features.items():
        if column == chosen or isinstance(feature, Audio):
            dataset = _as_files(dataset, name, column)
    return dataset


def _as_files(dataset: Dataset | IterableDataset, name: str, column: str) -> Dataset | IterableDataset:
    feature = dataset.features[column]
    try:
        if isinstance(dataset, Dataset):
            if isinstance(feature, Value) and feature.dtype in STANDARD_TYPES:
                dataset = with_features(
                    dataset, Features(dataset.features | {column: Value(STANDARD_TYPES[feature.dtype])})
                )
            return dataset.cast_column(column, Audio(decode=False))
        if isinstance(feature, Audio):
            return dataset.cast_column(column, Audio(decode=False)).cast_column(column, AUDIO_FILE)
        if _may_be_audio(feature):
            return _mapped(dataset, column, ClipFiles(name))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError):
        pass
    raise UserError(
        f"{name}: column {column!r} has type {feature}, not audio. Choose the audio column with --audio_column_name"
    )


def _may_be_audio(feature: FeatureType) -> bool:
    """Return whether rows of a stream contain paths, bytes, or a struct with one of them."""
    if isinstance(feature, Value):
        return feature.dtype in ("string", "binary", "null", *STANDARD_TYPES)
    return isinstance(feature, dict) and bool({"path", "bytes"} & set(feature))


def with_located(dataset: Dataset | IterableDataset, files: ClipFiles) -> Dataset | IterableDataset:
    """Resolve the paths in `audio` with `files.locate`, except in rows that contain the audio itself.

    Raises `UserError` for a path outside a downloaded dataset; for a stream, when the row is read.
    """
    if isinstance(dataset, IterableDataset):
        return _mapped(dataset, "audio", files)
    if not isinstance(dataset.features["audio"], Audio):  # arrays of samples
        return dataset
    chunks, changed = [], []
    for chunk in dataset.data.column("audio").chunks:
        content, paths = chunk.field("bytes"), chunk.field("path")
        has_path_only = pc.and_(pc.is_valid(chunk), pc.and_(pc.is_null(content), pc.is_valid(paths)))
        if pc.any(has_path_only).as_py():
            rows = zip(paths.to_pylist(), has_path_only.to_pylist(), strict=True)
            located = [files.locate(path) if path_only else path for path, path_only in rows]
            changed.append(located)
            fields = [content, pa.array(located, pa.string())]
            chunk = pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=pc.is_null(chunk))
        chunks.append(chunk)
    if not changed:
        return dataset
    # Replace the column in all stored rows, selected or not. The fingerprint covers the paths, not the audio bytes.
    stored = Dataset(dataset.data, dataset.info, fingerprint=dataset._fingerprint)
    fingerprint = Hasher.hash([dataset._fingerprint, changed])
    stored = stored.remove_columns("audio")
    stored = stored.add_column(
        "audio", pa.chunked_array(chunks), new_fingerprint=fingerprint, feature=Audio(decode=False)
    )
    return Dataset(stored.data, stored.info, dataset.split, dataset._indices, fingerprint)


def _mapped(dataset: IterableDataset, column: str, files: ClipFiles) -> IterableDataset:
    features = Features(dataset.features | {column: AUDIO_FILE})
    return dataset.map(functools.partial(_located_row, column=column, files=files), features=features)


def _located_row(row: Mapping[str, Any], column: str, files: ClipFiles) -> dict[str, Any]:
    return {column: files.of_row(row[column])}
