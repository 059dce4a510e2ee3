"""Speech with transcripts from wherever it lies, always with the columns `audio`, `text` and `clip`."""

import functools
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from huggingface_hub import constants, snapshot_download

from ..errors import UserError
from ..hub import hub_access, local_or_hub
from .audiofolder import METADATA, audiofolder_splits, read_audiofolder
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
    with_features,
)
from .text import replace_column

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
CLIP_DIGEST_SIZE = 6  # bytes: among a million clips two are called the same with a probability of 0.2 %
FORMATS = "a directory with metadata.csv, a directory saved by `datasets`, parquet files, or a Hub id"


def load_speech(
    name: str,
    config: str | None,
    split: str,
    *,
    audio_column: str | None = None,
    text_column: str | None = None,
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
        dataset = _load_split(name, config, base, num_proc, streaming)
        if bracket and isinstance(dataset, IterableDataset):
            raise UserError(f"{name}: a stream can't be sliced like {part.strip()!r}; take --max_train_samples")
        dataset = _canonical(dataset, name, base, audio_column, text_column, text_required)
        dataset = _slice(dataset, part.strip(), base) if bracket else dataset
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise UserError(f"{name}: split {split!r} has no rows")
        # what lies on a disk as it is needs no conversion to be read row by row
        parts.append(to_stream(dataset) if streaming and isinstance(dataset, Dataset) else dataset)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def to_stream(dataset: Dataset) -> IterableDataset:
    """The rows of a dataset of `load_speech` one after another."""
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


def _load_split(
    name: str, config: str | None, split: str, num_proc: int | None, streaming: bool
) -> Dataset | IterableDataset:
    if not local_or_hub(name):
        with hub_access("the dataset", name, repo_type="dataset"):
            return _load_built(name, config, split, num_proc, streaming)
    path = Path(name).expanduser().resolve()
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{name} is not a dataset; expected {FORMATS}")
    has_metadata = path.is_dir() and audiofolder_splits(path)
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if config is not None and (has_metadata or is_saved or path.is_file()):
        raise UserError(f"{name} has no configurations: leave out --dataset_config {config}")
    if is_saved:
        saved = load_from_disk(str(path))
        return _pick(name, split, saved if isinstance(saved, DatasetDict) else {"train": saved})
    if has_metadata:
        return read_audiofolder(_pick(name, split, has_metadata), path)
    if path.is_file():
        _pick(name, split, {"train": path})
        return load_dataset("parquet", data_files={split: [str(path)]}, split=split, streaming=streaming)
    return _load_built(str(path), config, split, num_proc, streaming)


def _load_built(
    name: str, config: str | None, split: str, num_proc: int | None, streaming: bool
) -> Dataset | IterableDataset:
    """A Hub dataset, or a directory laid out as one."""
    try:
        builder = load_dataset_builder(name, config)
    except (EmptyDatasetError, DataFilesNotFoundError):
        raise UserError(f"no speech in {name}; expected {FORMATS}") from None
    except ValueError as error:  # no such configuration, or one has to be chosen
        if constants.HF_HUB_OFFLINE and "Couldn't find cache" in str(error):
            raise UserError(
                f"{name}: HF_HUB_OFFLINE is set, and a dataset of which only a split was downloaded can't be found "
                f"again then. Once: hf download {name} --repo-type dataset --local-dir DIR; then give DIR"
            ) from None
        if "onfig" not in str(error):
            raise
        raise UserError(f"{name}: {' '.join(str(error).split())} (--dataset_config)") from None
    if builder.name == "cache":  # offline
        return load_dataset(name, config, split=split)
    files = {str(key): value for key, value in builder.config.data_files.items()}
    wanted = _pick(name, split, files)
    if builder.name == "audiofolder" and builder.repo_id is not None and streaming:
        raise UserError(
            f"{name}: audio files beside a metadata.csv have to be downloaded before they are read: leave out "
            "--streaming, or upload the dataset as parquet (datasets.Dataset.push_to_hub)"
        )
    if builder.name == "audiofolder":
        return _load_hub_audiofolder(name, builder, wanted)
    if builder.name not in ("parquet", "arrow"):
        raise UserError(f"{name} consists of {builder.name} files; expected {FORMATS}")
    # With `split` alone `datasets` downloads every split of the configuration; with `data_files` only these.
    options = dict(data_files={split: wanted}, split=split)
    if streaming:
        return load_dataset(name, config, streaming=True, **options)
    return load_dataset(name, config, num_proc=num_proc, **options)


def _load_hub_audiofolder(name: str, builder: DatasetBuilder, urls: Iterable[str]) -> Dataset:
    """`datasets` needs torchcodec to build it: fetch the files of the split, and read them as a local directory."""
    files = (Path(url.removeprefix(f"{builder.base_path}/")) for url in urls)
    metadata = next((file for file in files if file.name in METADATA), None)
    if builder.repo_id is None or metadata is None:
        raise UserError(f"{name}: audio files, but none of {', '.join(METADATA)} beside them")
    beside = (metadata.parent / "*").as_posix()
    root = Path(snapshot_download(name, repo_type="dataset", revision=builder.hash, allow_patterns=beside))
    return read_audiofolder(root / metadata, root)


def _pick(name: str, split: str, splits: dict):
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _canonical(
    dataset: Dataset | IterableDataset,
    name: str,
    split: str,
    audio_column: str | None,
    text_column: str | None,
    text_required: bool,
) -> Dataset | IterableDataset:
    audio_column = audio_column or _find_audio(dataset)
    text_column = text_column or next((c for c in TEXT_COLUMNS if c in dataset.column_names), None)
    if text_column is None and not text_required:
        dataset, text_column = dataset.add_column("text", [None] * len(dataset), feature=Value("string")), "text"
    for column, option, what in (
        (audio_column, "--audio_column", "audio"),
        (text_column, "--text_column", "the transcript"),
    ):
        if column not in dataset.column_names:
            raise UserError(
                f"{name}: {'no column found' if column is None else f'no column {column!r}'} for {what}; the columns "
                f"are {', '.join(dataset.column_names)}. Name one with {option}"
            )
    # first of all: to rename a column of a stream `datasets` would encode its audio
    dataset = _with_audio(dataset, name, audio_column)
    for column, canonical in ((audio_column, "audio"), (text_column, "text")):
        if column != canonical:
            if canonical in dataset.column_names:
                logger.warning("%s: no use is made of the column %r; %r is chosen", name, canonical, column)
                dataset = dataset.remove_columns(canonical)
            dataset = dataset.rename_column(column, canonical)
    return _with_types(_without_foreign(_with_text(dataset, name), name), split)


def _find_audio(dataset: Dataset | IterableDataset) -> str | None:
    if "audio" in dataset.column_names:
        return "audio"
    found = [column for column, feature in dataset.features.items() if isinstance(feature, Audio)]
    return found[0] if len(found) == 1 else None


def _with_audio(dataset: Dataset | IterableDataset, name: str, chosen: str) -> Dataset | IterableDataset:
    """The dataset with all its columns of audio as files: to decode them `datasets` would need torchcodec."""
    if isinstance(dataset.features[chosen], dict) and "array" in dataset.features[chosen]:
        if isinstance(dataset, IterableDataset):
            refuse_arrays(dataset.features[chosen], name, "streamed")
        return dataset
    for column, feature in dataset.features.items():
        if column != chosen and not isinstance(feature, Audio):
            continue
        try:
            dataset = dataset.cast_column(column, Audio(decode=False))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError):
            raise UserError(
                f"{name}: the audio column holds {feature}, not audio. Name another: --audio_column"
            ) from None
        if isinstance(dataset, IterableDataset):
            dataset = dataset.cast_column(column, AUDIO_FILE)
    return dataset


def _with_text(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    feature = dataset.features["text"]
    try:
        if isinstance(feature, Value) and isinstance(dataset, IterableDataset):
            return dataset.cast_column("text", Value("string"))
        if isinstance(feature, Value):
            return with_features(dataset, Features(dataset.features | {"text": Value("string")}))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # not text: bytes, for one
        pass
    raise UserError(f"{name}: the transcript column holds {feature}, not text. Name another: --text_column")


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
    # `check_clips` measures again what it has measured before; what else is called so isn't the same
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
    named = given.get("clip") == Value("string")
    optional = [name for name in ("language", "task", "prompt", "segments") if name in given]
    typed = {name: COLUMNS[name] for name in optional if not isinstance(given[name], ClassLabel)}
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
