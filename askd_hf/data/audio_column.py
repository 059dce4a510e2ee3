"""The column of audio, in whatever type it comes, as files: `{"bytes", "path"}`."""

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
from .columns import AUDIO_FILE, refuse_arrays, with_features

PLAIN = {"large_string": "string", "string_view": "string", "large_binary": "binary", "binary_view": "binary"}


def find_audio(dataset: Dataset | IterableDataset) -> str | None:
    """The column `audio`, or the only one of audio."""
    if "audio" in dataset.column_names:
        return "audio"
    found = [column for column, feature in dataset.features.items() if isinstance(feature, Audio)]
    return found[0] if len(found) == 1 else None


def with_audio(dataset: Dataset | IterableDataset, name: str, chosen: str) -> Dataset | IterableDataset:
    """The dataset with all its columns of audio as files: to decode them `datasets` would need torchcodec."""
    if isinstance(dataset.features[chosen], dict) and "array" in dataset.features[chosen]:
        if isinstance(dataset, IterableDataset):
            refuse_arrays(dataset.features[chosen], name, "streamed")
        return dataset
    for column, feature in dataset.features.items():
        if column == chosen or isinstance(feature, Audio):
            dataset = _as_files(dataset, name, column)
    return dataset


def _as_files(dataset: Dataset | IterableDataset, name: str, column: str) -> Dataset | IterableDataset:
    feature = dataset.features[column]
    try:
        if isinstance(dataset, Dataset):
            if isinstance(feature, Value) and feature.dtype in PLAIN:
                dataset = with_features(dataset, Features(dataset.features | {column: Value(PLAIN[feature.dtype])}))
            return dataset.cast_column(column, Audio(decode=False))
        if isinstance(feature, Audio):
            return dataset.cast_column(column, Audio(decode=False)).cast_column(column, AUDIO_FILE)
        if _may_be_audio(feature):
            return _mapped(dataset, column, ClipFiles(name))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError):
        pass
    raise UserError(f"{name}: the audio column holds {feature}, not audio. Name another: --audio_column_name")


def _may_be_audio(feature: FeatureType) -> bool:
    """Whether rows of a stream hold paths, bytes, or a struct with one of them."""
    if isinstance(feature, Value):
        return feature.dtype in ("string", "binary", "null", *PLAIN)
    return isinstance(feature, dict) and bool({"path", "bytes"} & set(feature))


def with_located(dataset: Dataset | IterableDataset, files: ClipFiles) -> Dataset | IterableDataset:
    """The dataset with each path in `audio` as `files` understands it, where the audio isn't in the row.

    Raises `UserError`, of a stream when the row comes, for a path that leads out of a downloaded dataset.
    """
    if isinstance(dataset, IterableDataset):
        return _mapped(dataset, "audio", files)
    if not isinstance(dataset.features["audio"], Audio):  # arrays of samples
        return dataset
    chunks, changed = [], []
    for chunk in dataset.data.column("audio").chunks:
        content, paths = chunk.field("bytes"), chunk.field("path")
        named = pc.and_(pc.is_valid(chunk), pc.and_(pc.is_null(content), pc.is_valid(paths)))
        if pc.any(named).as_py():
            rows = zip(paths.to_pylist(), named.to_pylist(), strict=True)
            located = [files.locate(path) if there else path for path, there in rows]
            changed.append(located)
            found = [content, pa.array(located, pa.string())]
            chunk = pa.StructArray.from_arrays(found, ["bytes", "path"], mask=pc.is_null(chunk))
        chunks.append(chunk)
    if not changed:
        return dataset
    # all stored rows, and not their bytes in the fingerprint
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
