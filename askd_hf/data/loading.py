"""Load speech datasets of any layout with the columns `audio`, `text` and `clip`."""

import functools
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
)
from datasets.features.features import get_nested_type

from ..errors import UserError, warn_once
from .audio_column import find_audio, with_audio, with_located
from .columns import (
    AUDIO_FILE,
    COLUMNS,
    FORMER_COLUMNS,
    SEGMENTS,
    TRAINING_COLUMNS,
    VALIDATION_COLUMNS,
    are_segments,
    is_text,
    replace_column,
    require_audio_files,
    with_features,
)
from .soft_labels import SOFT_LABEL_COLUMNS
from .sources import load_split
from .splits import KINDS

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
STREAM_SHARDS = 64  # of a loaded dataset that is streamed: shared out over processes, and shuffled
CLIP_DIGEST_SIZE = 6  # bytes: in a million clips, two have the same name with a probability of 0.2 %
TEXT_TYPES = ("string", "large_string", "binary", "large_binary", "null", "int", "uint")  # prefixes of Arrow types
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


def load_speech_dataset(
    name: str,
    config: str | None,
    split: str,
    *,
    audio_column_name: str | None = None,
    text_column_name: str | None = None,
    text_required: bool = True,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load one split of a speech dataset. Only the files of this split are downloaded from the Hub.

    Args:
        name: a directory with `metadata.csv`, `.jsonl` or `.parquet` (audiofolder), or with one such file per split in
            subdirectories; a directory of `save_to_disk`; a `.parquet` file; a directory laid out as on the Hub; or a
            Hub id. Data without splits is the split `train`.
        config: configuration of a dataset laid out as on the Hub; None for the only one.
        split: with the slices and sums of `datasets`: `train`, `train[:100]`, `train[:10%]+test`.
        audio_column_name: default: `audio`, or the only audio column.
        text_column_name: default: the first existing one of `TEXT_COLUMNS`.
        text_required: False to set `text` to None if there is no transcript column, and to accept a directory of audio
            files without a metadata file. Default: True.
        num_proc: number of processes that prepare a Hub dataset; None for the current process.
        streaming: return an `IterableDataset`, without downloading or converting the dataset first. Split slices and
            audiofolder datasets on the Hub aren't supported. Default: False.

    Returns:
        The dataset with these and its other columns:

        audio: `{"path", "bytes"}`, not decoded.
        text: string or None.
        clip: name of the clip in messages: the column `clip` if it has strings, else the path, else `split[row]`. A
            clip without a path in a stream, where rows have no numbers, is named `split-` and a hash of its bytes.
        language, task, prompt, segments: of the types of `COLUMNS`. Other fields of segments are dropped. A column
            that can't be converted is dropped with a warning.

        Also dropped with a warning: a column `text` or `audio` that isn't the chosen one, and `TRAINING_COLUMNS`.
        `VALIDATION_COLUMNS` of another type are dropped without one, as every clip is measured again.

    Raises `UserError` if the dataset, configuration, split or column doesn't exist, or the Hub can't be reached.
    """
    parts = []
    for part in split.split("+"):
        base, bracket, _ = part.strip().partition("[")
        dataset, files = load_split(name, config, base, num_proc, streaming, text_required)
        if bracket and isinstance(dataset, IterableDataset):
            raise UserError(
                f"{name}: --streaming doesn't support split slices ({part.strip()!r}); use --max_train_samples"
            )
        dataset = _canonical(dataset, name, base, audio_column_name, text_column_name, text_required)
        dataset = with_located(dataset, files) if files is not None else dataset
        dataset = _slice(dataset, part.strip(), base) if bracket else dataset
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise UserError(f"{name}: split {split!r} has no rows")
        # local formats that need no conversion are loaded and then streamed
        parts.append(to_iterable_dataset(dataset) if streaming and isinstance(dataset, Dataset) else dataset)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def to_iterable_dataset(dataset: Dataset) -> IterableDataset:
    """Convert the result of `load_speech_dataset` to a stream. Raise `UserError` unless audio is stored as files."""
    require_audio_files(dataset.features["audio"], dataset[0]["clip"], "stream")
    shards = min(STREAM_SHARDS, len(dataset))
    return dataset.to_iterable_dataset(num_shards=shards).cast_column("audio", AUDIO_FILE)


def _slice(dataset: Dataset, part: str, base: str) -> Dataset:
    # `datasets` allows only word characters in split names, directories may have others: slice a split named "x"
    try:
        (read,) = ReadInstruction.from_spec("x" + part.removeprefix(base)).to_absolute({"x": len(dataset)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {part!r} of {len(dataset)} rows: {error}") from None
    if read.from_ >= read.to:
        raise UserError(f"split {part!r} of {len(dataset)} rows is empty")
    return dataset.select(range(read.from_, read.to))


def _canonical(
    dataset: Dataset | IterableDataset,
    name: str,
    split: str,
    audio_column_name: str | None,
    text_column_name: str | None,
    text_required: bool,
) -> Dataset | IterableDataset:
    audio_column_name = audio_column_name or find_audio(dataset)
    text_column_name = text_column_name or next((c for c in TEXT_COLUMNS if c in dataset.column_names), None)
    if text_column_name is None and not text_required:
        dataset, text_column_name = dataset.add_column("text", [None] * len(dataset), feature=Value("string")), "text"
    for column, option, what in (
        (audio_column_name, "--audio_column_name", "audio"),
        (text_column_name, "--text_column_name", "the transcript"),
    ):
        if column not in dataset.column_names:
            several = ""
            if column is not None and "+" in column:
                several = (
                    f" (for several datasets give one each, separated by spaces: {option} {column.replace('+', ' ')})"
                )
            raise UserError(
                f"{name}: {'no column found' if column is None else f'no column {column!r}'} for {what}; the columns "
                f"are {', '.join(dataset.column_names)}. Choose one with {option}{several}"
            )
    # before renaming: renaming a column of a stream makes `datasets` encode its audio
    dataset = with_audio(dataset, name, audio_column_name)
    _warn_split_column(dataset, name)
    for column, canonical in ((audio_column_name, "audio"), (text_column_name, "text")):
        if column != canonical:
            if canonical in dataset.column_names:
                logger.warning("%s: column %r is ignored, because column %r was chosen", name, canonical, column)
                dataset = dataset.remove_columns(canonical)
            dataset = dataset.rename_column(column, canonical)
    return _with_types(_drop_reserved(_with_text(dataset, name, text_column_name), name), split)


def _with_text(dataset: Dataset | IterableDataset, name: str, column: str) -> Dataset | IterableDataset:
    """Convert `text` to strings: numbers are formatted, class labels replaced by their names."""
    feature = dataset.features["text"]
    try:
        if isinstance(feature, ClassLabel):
            return _with_class_names(dataset, feature)
        if isinstance(feature, Value) and feature.dtype.startswith(TEXT_TYPES):
            if isinstance(dataset, IterableDataset) and "binary" in feature.dtype:  # a cast would give "b'...'"
                features = Features(dataset.features | {"text": Value("string")})
                return dataset.map(functools.partial(_decoded, name=name), features=features)
            if isinstance(dataset, IterableDataset):
                return dataset.cast_column("text", Value("string"))
            return with_features(dataset, Features(dataset.features | {"text": Value("string")}))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # bytes that aren't UTF-8
        pass
    raise UserError(
        f"{name}: column {column!r} has type {feature}, not text. Choose the transcript column with --text_column_name"
    )


def _decoded(row: Mapping[str, Any], name: str) -> dict[str, str | None]:
    try:
        return {"text": None if row["text"] is None else row["text"].decode()}
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: a transcript isn't UTF-8 ({error})") from None


def _with_class_names(dataset: Dataset | IterableDataset, classes: ClassLabel) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        features = Features(dataset.features | {"text": Value("string")})
        return dataset.map(functools.partial(_class_name, classes=classes), features=features)
    names = [_class_name({"text": number}, classes)["text"] for number in dataset["text"][:]]
    return replace_column(dataset, "text", pa.array(names, pa.string()))


def _class_name(row: Mapping[str, Any], classes: ClassLabel) -> dict[str, str | None]:
    number = row["text"]
    return {"text": None if number is None or number < 0 else classes.int2str(number)}


def _warn_split_column(dataset: Dataset | IterableDataset, name: str) -> None:
    """Warn if a column names several kinds of splits, since columns don't select what is trained on."""
    for column in SPLIT_COLUMNS:
        feature = dataset.features.get(column)
        if isinstance(dataset, IterableDataset) or not (isinstance(feature, ClassLabel) or is_text(feature)):
            continue
        values = dataset.unique(column)
        if isinstance(feature, ClassLabel):
            values = [_class_name({"text": number}, feature)["text"] for number in values]
        named = sorted(value for value in values if value is not None and value.strip().lower() in KINDS)
        if len({KINDS[value.strip().lower()] for value in named}) > 1:
            warn_once(
                f"{name}: column {column!r} contains {', '.join(named)}, but it is ignored: all {len(dataset)} rows "
                "are loaded as one split. To separate them, give each split its own directory or file"
            )


def _drop_reserved(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """Drop columns that share a name with `COLUMNS`, `TRAINING_COLUMNS` or `VALIDATION_COLUMNS` but not the type.

    `no_speech` is kept in a dataset with soft labels: `--teacher_cache_dir` saved it.
    """
    dropped = []
    for column in ("language", "task", "prompt", "segments"):
        feature = dataset.features.get(column)
        if feature is None or (are_segments(feature) if column == "segments" else is_text(feature)):
            continue
        if column in ("language", "task") and isinstance(feature, ClassLabel):  # converted by `with_language`
            continue
        dropped.append(column)
        wanted = "a list of {start, end, text}" if column == "segments" else "text"
        logger.warning("%s: column %r is dropped, because it has type %s, not %s", name, column, feature, wanted)
    # `filter_invalid_clips` computes its columns again. Columns of the same names but other types are the user's.
    former = {old for old, new in FORMER_COLUMNS.items() if new in TRAINING_COLUMNS}
    was_trained_on = set(SOFT_LABEL_COLUMNS) <= dataset.features.keys()
    kept = {"no_speech"} if was_trained_on and dataset.features.get("no_speech") == COLUMNS["no_speech"] else set()
    reserved = [
        column
        for column, feature in dataset.features.items()
        if (column in TRAINING_COLUMNS and column not in kept)
        or column in former
        or VALIDATION_COLUMNS.get(column, feature) != feature
    ]
    # no warning for what is measured again, and for the empty columns of a saved mix
    lost = [column for column in reserved if column not in VALIDATION_COLUMNS]
    used = [c for c in lost if isinstance(dataset, IterableDataset) or dataset.unique(c) != [None]]
    if used:
        columns = ", ".join(map(repr, used))
        logger.warning("%s: columns %s are dropped, because training adds its own of these names", name, columns)
    # the duration as an earlier version saved it
    if dataset.features.get("seconds") == VALIDATION_COLUMNS["duration"]:
        reserved.append("seconds")
    return dataset.remove_columns([*dropped, *reserved])


def _with_types(dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
    """Add the column `clip`, and cast the columns of `COLUMNS` to their types."""
    features = dataset.features
    named = "clip" in features and is_text(features["clip"]) and features["clip"].dtype != "null"
    optional = [name for name in ("language", "task", "prompt", "segments") if name in features]
    typed = {name: COLUMNS[name] for name in optional if not isinstance(features[name], ClassLabel)}
    typed |= {"clip": Value("string")} if named else {}
    if isinstance(dataset, IterableDataset):
        features = Features(features | typed | {"clip": Value("string")})
        return dataset.map(functools.partial(_typed_row, split=None if named else split), features=features)
    dataset = with_features(dataset, Features(features | typed))
    return dataset if named else replace_column(dataset, "clip", _clip_names(dataset, split))


def _clip_names(dataset: Dataset, split: str) -> list[str]:
    paths = [None] * len(dataset)
    if isinstance(dataset.features["audio"], Audio):
        # flatten to read only the paths, not gigabytes of audio
        paths = dataset.select_columns("audio").flatten()["audio.path"]
    return [path or f"{split}[{row}]" for row, path in enumerate(paths)]


def _typed_row(row: Mapping[str, Any], split: str | None) -> dict[str, Any]:
    """Return the columns of a streamed row that `_with_types` changes; `split` is None if clips have names."""
    changed = {}
    if split is not None:
        audio = row["audio"] or {}
        changed["clip"] = audio.get("path") or split
        if audio.get("bytes") is not None or not audio.get("path"):
            # names of embedded files may repeat. Not the row number, which depends on the order of the files and hence
            # on `shuffle`
            digest = hashlib.blake2b(audio.get("bytes") or b"", digest_size=CLIP_DIGEST_SIZE).hexdigest()
            changed["clip"] += f"-{digest}"
    if row.get("segments") is not None:
        changed["segments"] = pa.array([row["segments"]]).cast(get_nested_type(SEGMENTS))[0].as_py()
    return changed
