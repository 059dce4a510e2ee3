"""From a name to the rows of one split, of a directory, a file, or the Hub; the columns as they are there."""

import glob
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
from huggingface_hub import constants

from ..errors import UserError
from ..hub_access import hub_access, local_or_hub
from .audiofolder import METADATA, audiofolder_splits, read_audiofolder
from .clip_files import ClipFiles, was_downloaded
from .common_voice import common_voice_splits, read_common_voice
from .hub_audiofolder import load_hub_audiofolder
from .metadata import warn_once
from .splits import pick

FORMATS = "a directory with metadata.csv, a directory saved by `datasets`, parquet files, or a Hub id"
TABLES = (".csv", ".tsv", ".json", ".jsonl")
Rows: TypeAlias = Dataset | IterableDataset


def load_split(
    name: str, config: str | None, split: str, num_proc: int | None, streaming: bool
) -> tuple[Rows, ClipFiles | None]:
    """The rows of a split, and what the paths in them mean; None where they are whole.

    Args:
        name, config, num_proc, streaming: as in `load_speech_dataset`.
        split: a name, without slices and sums.

    Raises `UserError` as `load_speech_dataset`.
    """
    if "+" in name and not Path(name).expanduser().exists():
        raise UserError(f"{name!r}: several datasets are separated by spaces, not by +: {name.replace('+', ' ')}")
    if not local_or_hub(name):
        with hub_access("the dataset", name, repo_type="dataset"):
            return _load_built(name, None, config, split, num_proc, streaming)
    path = Path(name).expanduser().resolve()
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{name} is not a dataset; expected {FORMATS}")
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    folder = audiofolder_splits(path) if path.is_dir() else {}
    tables = common_voice_splits(path) if path.is_dir() and not (is_saved or folder) else {}
    if config is not None and (folder or tables or is_saved or path.is_file()):
        raise UserError(f"{name} has no configurations: leave out --dataset_config {config}")
    downloaded = path.is_dir() and was_downloaded(path)
    files = ClipFiles(name, (path,), path if downloaded else None, downloaded)
    if is_saved:
        if folder:
            warn_once(f"{name} is read as `datasets` saved it; {', '.join(METADATA)} in it are ignored")
        saved = load_from_disk(str(path))
        return pick(name, split, saved if isinstance(saved, DatasetDict) else {"train": saved}), files
    if folder:
        return read_audiofolder(pick(name, split, folder), path, name if downloaded else None), None
    if tables:
        return read_common_voice(pick(name, split, tables)), None
    if path.is_file():
        pick(name, split, {"train": path})
        rows = _load_parquet(name, {split: [str(path)]}, streaming)
        return rows, ClipFiles(name, (path.parent,))
    return _load_built(name, path, config, split, num_proc, streaming)


def _load_parquet(name: str, data_files: dict[str, list[str]], streaming: bool) -> Rows:
    """Local files of one split. Their names are no patterns."""
    ((split, files),) = data_files.items()
    options = dict(data_files={split: [glob.escape(file) for file in files]}, split=split, streaming=streaming)
    return _generated(name, "parquet", None, options)


def _generated(name: str, path: str, config: str | None, options: dict) -> Rows:
    """What `load_dataset` makes; raises `UserError` for files that aren't parquet, and for types that it hasn't."""
    try:
        return load_dataset(path, config, **options)
    except (DatasetGenerationError, pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        message = " ".join(str(cause).split())
        if "does not have a datasets dtype" in message:
            raise UserError(f"{name}: {message}; write it without this column") from None
        if isinstance(cause, pa.ArrowInvalid | pa.ArrowNotImplementedError):
            raise UserError(f"{name} can't be read as parquet ({message[:200]})") from error
        raise


def _load_built(
    name: str, path: Path | None, config: str | None, split: str, num_proc: int | None, streaming: bool
) -> tuple[Rows, ClipFiles]:
    """A Hub dataset, or a directory laid out as one.

    Args:
        path: of the directory; None on the Hub.
    """
    if path is not None and glob.escape(str(path)) != str(path):
        return _load_named_as_pattern(name, path, config, split, streaming)
    try:
        builder = load_dataset_builder(str(path or name), config)
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
        several = f"; several datasets have one each: {config.replace('+', ' ')}" if config and "+" in config else ""
        raise UserError(f"{name}: {' '.join(str(error).split())} (--dataset_config{several})") from None
    if builder.name == "cache":  # offline
        return load_dataset(name, config, split=split), ClipFiles(name, downloaded=True)
    urls = {str(key): value for key, value in builder.config.data_files.items()}
    wanted = pick(name, split, urls)
    if builder.name == "audiofolder" and builder.repo_id is not None and streaming:
        raise UserError(
            f"{name}: audio files beside a metadata.csv have to be downloaded before they are read: leave out "
            "--streaming, or upload the dataset as parquet (datasets.Dataset.push_to_hub)"
        )
    if builder.name == "audiofolder":
        return load_hub_audiofolder(name, builder, split, urls), None
    if builder.name not in ("parquet", "arrow"):
        raise UserError(_of_another_format(name, builder.name, wanted))
    # With `split` alone `datasets` downloads every split of the configuration; with `data_files` only these.
    options: dict[str, Any] = dict(data_files={split: [glob.escape(url) for url in wanted]}, split=split)
    options |= dict(streaming=True) if streaming else dict(num_proc=num_proc)
    return _generated(name, str(path or name), config, options), _clip_files(name, path, wanted)


def _clip_files(name: str, path: Path | None, data_files: list[str]) -> ClipFiles:
    """What a path in the files of a directory, or of the Hub if there is no `path`, means."""
    if path is None:
        return ClipFiles(name, downloaded=True)
    downloaded = was_downloaded(path)
    folders = tuple(dict.fromkeys([*(Path(file).parent for file in data_files), path]))
    return ClipFiles(name, folders, path if downloaded else None, downloaded)


def _load_named_as_pattern(
    name: str, path: Path, config: str | None, split: str, streaming: bool
) -> tuple[Rows, ClipFiles]:
    """A directory of parquet whose own name `datasets` would take for a pattern, as it does `[` and `*`."""
    pattern = glob.escape(str(path))
    try:
        patterns = get_data_patterns(pattern)
        found = {key: [f for p in patterns[key] for f in resolve_pattern(p, pattern)] for key in patterns}
    except FileNotFoundError:
        raise UserError(f"no speech in {name}; expected {FORMATS}") from None
    parquet = {key: [file for file in files if file.endswith(".parquet")] for key, files in found.items()}
    if config is not None or not any(parquet.values()) or "configs:" in _card(path):
        raise UserError(
            f"{name}: no speech that can be read in a directory with such a name: rename it, without [ ] * ?"
        )
    files = pick(name, split, {key: list(dict.fromkeys(files)) for key, files in parquet.items() if files})
    return _load_parquet(name, {split: files}, streaming), _clip_files(name, path, files)


def _card(path: Path) -> str:
    card = path / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def _of_another_format(name: str, kind: str, files: list[str]) -> str:
    message = f"{name} consists of {kind} files; expected {FORMATS}"
    table = next((Path(file) for file in files if Path(file).suffix in TABLES), None)
    if table is None:
        return message
    advice = f"{table.stem}/metadata.{'jsonl' if 'json' in table.suffix else 'csv'}"
    return (
        f"{message}. If {table.name} lists audio files: call it {advice}, with commas between the columns and the "
        "files in a column file_name, relative to it"
    )
