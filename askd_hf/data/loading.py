"""Speech with transcripts from wherever it lies, always with the columns `audio`, `text` and `clip`."""

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

from ..errors import UserError
from .audio_column import find_audio, with_audio, with_located
from .columns import (
    AUDIO_FILE,
    CHECKED,
    COLUMNS,
    OF_TRAINING,
    SEGMENTS,
    are_segments,
    arrow_type,
    is_text,
    refuse_arrays,
    replace_column,
    with_features,
)
from .metadata import warn_once
from .sources import load_split
from .splits import KINDS

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
CLIP_DIGEST_SIZE = 6  # bytes: among a million clips two are called the same with a probability of 0.2 %
TEXT_TYPES = ("string", "large_string", "binary", "large_binary", "null", "int", "uint")  # of Arrow
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
    """Load one split of a speech dataset. Of a Hub dataset only the files of that split are downloaded.

    Args:
        name: a directory with `metadata.csv`, `.jsonl` or `.parquet` (audiofolder), at its top or one a split in
            subdirectories; a directory of `save_to_disk`; a `.parquet` file; a directory laid out as on the Hub; or a
            Hub id. What has no splits is the split `train`.
        config: configuration of a dataset laid out as on the Hub.
        split: with the slices and sums of `datasets`: `train`, `train[:100]`, `train[:10%]+test`.
        audio_column: default: `audio`, or the only column of audio.
        text_column: default: the first of `TEXT_COLUMNS` that is there.
        text_required: False: where no such column is there `text` is None.
        num_proc: processes that prepare a Hub dataset.
        streaming: read row by row what would have to be downloaded or converted as a whole: an `IterableDataset`.
            Of such a split there are no slices, and of audio files beside a `metadata.csv` on the Hub no stream.

    Returns:
        `audio`: `{"path", "bytes"}`, not decoded; `text`: string or None; `clip`: the name of the clip in messages,
        its path or `split[row]`, unless there is such a column of strings; and the other columns. In a stream a clip
        without a path is `split-` and a hash of its bytes, as rows have no numbers there. `language`, `task`, `prompt`
        and `segments` are as in `COLUMNS`: segments lose other fields, and a column that can't be so is dropped with
        a warning. So are a column `text` or `audio` that isn't the chosen one, and those called as training's own:
        `OF_TRAINING`, and `CHECKED` of another type.

    Raises:
        UserError: no such dataset, configuration, split or column; or the Hub can't be reached.
    """
    parts = []
    for part in split.split("+"):
        base, bracket, _ = part.strip().partition("[")
        dataset, files = load_split(name, config, base, num_proc, streaming)
        if bracket and isinstance(dataset, IterableDataset):
            raise UserError(f"{name}: a stream can't be sliced like {part.strip()!r}; take --max_train_samples")
        dataset = _canonical(dataset, name, base, audio_column_name, text_column_name, text_required)
        dataset = with_located(dataset, files) if files is not None else dataset
        dataset = _slice(dataset, part.strip(), base) if bracket else dataset
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise UserError(f"{name}: split {split!r} has no rows")
        # what lies on a disk as it is needs no conversion to be read row by row
        parts.append(to_stream(dataset) if streaming and isinstance(dataset, Dataset) else dataset)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def to_stream(dataset: Dataset) -> IterableDataset:
    """The rows of a dataset of `load_speech_dataset` one after another."""
    refuse_arrays(dataset.features["audio"], dataset[0]["clip"], "streamed")
    return dataset.to_iterable_dataset().cast_column("audio", AUDIO_FILE)


def _slice(dataset: Dataset, part: str, base: str) -> Dataset:
    # `datasets` takes only word characters in the name of a split; directories have others: so slice a split "x".
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
                several = f" (of several datasets one each, separated by spaces: {option} {column.replace('+', ' ')})"
            raise UserError(
                f"{name}: {'no column found' if column is None else f'no column {column!r}'} for {what}; the columns "
                f"are {', '.join(dataset.column_names)}. Name one with {option}{several}"
            )
    # first of all: to rename a column of a stream `datasets` would encode its audio
    dataset = with_audio(dataset, name, audio_column_name)
    _say_split_column(dataset, name)
    for column, canonical in ((audio_column_name, "audio"), (text_column_name, "text")):
        if column != canonical:
            if canonical in dataset.column_names:
                logger.warning("%s: no use is made of the column %r; %r is chosen", name, canonical, column)
                dataset = dataset.remove_columns(canonical)
            dataset = dataset.rename_column(column, canonical)
    return _with_types(_without_foreign(_with_text(dataset, name, text_column_name), name), split)


def _with_text(dataset: Dataset | IterableDataset, name: str, column: str) -> Dataset | IterableDataset:
    """The dataset with strings in `text`: numbers as they are written, classes by their names."""
    feature = dataset.features["text"]
    try:
        if isinstance(feature, ClassLabel):
            return _with_class_names(dataset, feature)
        if isinstance(feature, Value) and feature.dtype.startswith(TEXT_TYPES):
            if isinstance(dataset, IterableDataset) and "binary" in feature.dtype:  # a cast would write b'...'
                features = Features(dataset.features | {"text": Value("string")})
                return dataset.map(functools.partial(_decoded, name=name), features=features)
            if isinstance(dataset, IterableDataset):
                return dataset.cast_column("text", Value("string"))
            return with_features(dataset, Features(dataset.features | {"text": Value("string")}))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # bytes that aren't UTF-8
        pass
    raise UserError(
        f"{name}: the transcript column {column!r} holds {feature}, not text. Name another: --text_column_name"
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


def _say_split_column(dataset: Dataset | IterableDataset, name: str) -> None:
    """Warn of a column that says which split a row is: columns don't decide what is trained on."""
    for column in SPLIT_COLUMNS:
        feature = dataset.features.get(column)
        if isinstance(dataset, IterableDataset) or not (isinstance(feature, ClassLabel) or is_text(feature)):
            continue
        values = dataset.unique(column)
        if isinstance(feature, ClassLabel):
            values = [_class_name({"text": number}, feature)["text"] for number in values]
        said = sorted(value for value in values if value is not None and value.strip().lower() in KINDS)
        if len({KINDS[value.strip().lower()] for value in said}) > 1:
            warn_once(
                f"{name}: the column {column!r} says {', '.join(said)}, but it doesn't count: all {len(dataset)} rows "
                "are read as one split. To tell them apart give each split a directory or a file of its own"
            )


def _without_foreign(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The dataset without columns that are called as `COLUMNS` and hold something else."""
    foreign = []
    for column in ("language", "task", "prompt", "segments"):
        feature = dataset.features.get(column)
        if feature is None or (are_segments(feature) if column == "segments" else is_text(feature)):
            continue
        if column in ("language", "task") and isinstance(feature, ClassLabel):  # names all the same
            continue
        foreign.append(column)
        wanted = "a list of {start, end, text}" if column == "segments" else "text"
        logger.warning("%s: the column %r is left out: it holds %s, not %s", name, column, feature, wanted)
    # `filter_invalid_clips` measures again what it has measured before; what else is called so isn't the same
    reserved = [c for c, kind in dataset.features.items() if c in OF_TRAINING or CHECKED.get(c, kind) != kind]
    # those of a mix that was saved are there, and empty
    said = [c for c in reserved if isinstance(dataset, IterableDataset) or dataset.unique(c) != [None]]
    if said:
        columns = ", ".join(map(repr, said))
        logger.warning("%s: no use is made of the columns %s; training has its own of these names", name, columns)
    return dataset.remove_columns([*foreign, *reserved])


def _with_types(dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
    """The dataset with a column `clip`, and with the types of `COLUMNS`."""
    given = dataset.features
    named = "clip" in given and is_text(given["clip"]) and given["clip"].dtype != "null"
    optional = [name for name in ("language", "task", "prompt", "segments") if name in given]
    typed = {name: COLUMNS[name] for name in optional if not isinstance(given[name], ClassLabel)}
    typed |= {"clip": Value("string")} if named else {}
    if isinstance(dataset, IterableDataset):
        features = Features(given | typed | {"clip": Value("string")})
        return dataset.map(functools.partial(_typed_row, split=None if named else split), features=features)
    dataset = with_features(dataset, Features(given | typed))
    return dataset if named else replace_column(dataset, "clip", _clip_names(dataset, split))


def _clip_names(dataset: Dataset, split: str) -> list[str]:
    paths = [None] * len(dataset)
    if isinstance(dataset.features["audio"], Audio):
        # flattened, so that only the paths are read and not gigabytes of audio
        paths = dataset.select_columns("audio").flatten()["audio.path"]
    return [path or f"{split}[{row}]" for row, path in enumerate(paths)]


def _typed_row(row: Mapping[str, Any], split: str | None) -> dict[str, Any]:
    """What `_with_types` changes in a row of a stream; `split` is None where the clips have names."""
    changed = {}
    if split is not None:
        audio = row["audio"] or {}
        # a row's number depends on the order of the files, which `shuffle` changes
        digest = hashlib.blake2b(audio.get("bytes") or b"", digest_size=CLIP_DIGEST_SIZE).hexdigest()
        changed["clip"] = audio.get("path") or f"{split}-{digest}"
    if row.get("segments") is not None:
        changed["segments"] = pa.array([row["segments"]]).cast(arrow_type(SEGMENTS))[0].as_py()
    return changed
