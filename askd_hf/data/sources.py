"""Load the rows of one split from a directory, a file or the Hub, with their original columns."""

import fnmatch
import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
from huggingface_hub import constants

from ..errors import UserError, warn_once
from ..hub_access import hub_access, local_or_hub
from .audiofolder import METADATA_FILES, audio_files, audiofolder_splits, read_audio_files, read_audiofolder, walk
from .clip_files import ClipFiles, was_downloaded
from .common_voice import common_voice_splits, read_common_voice
from .dataset_files import load_saved
from .hub_audiofolder import load_hub_audiofolder
from .splits import pick

FORMATS = "a directory with metadata.csv, a directory saved by `datasets`, parquet files, or a Hub id"
DATA_FILES = ("*.parquet", "*.arrow")  # next to them audio files aren't the data
TABLES = (".csv", ".tsv", ".json", ".jsonl")
Rows: TypeAlias = Dataset | IterableDataset


def check_exist(names: Iterable[str | None]) -> None:
    """Raise `UserError` if a dataset is neither a local path nor on the Hub, before models are downloaded.

    Args:
        names: local paths and Hub ids. None is left out.
    """
    for name in dict.fromkeys(filter(None, names)):
        if "+" not in name and not local_or_hub(name):
            with hub_access("the dataset", name, repo_type="dataset"):
                pass  # it asks the Hub for the repository


def load_split(
    name: str, config: str | None, split: str, num_proc: int | None, streaming: bool, text_required: bool = True
) -> tuple[Rows, ClipFiles | None]:
    """Return the rows of a split, and how to resolve the paths in them; None if the paths are resolved already.

    Args:
        name, config, num_proc, streaming, text_required: as in `load_speech_dataset`.
        split: name of a split, without slices and sums.

    Raises `UserError` as `load_speech_dataset`.
    """
    if "+" in name and not Path(name).expanduser().exists():
        raise UserError(f"{name!r}: separate several datasets by spaces, not by +: {name.replace('+', ' ')}")
    if not local_or_hub(name):
        with hub_access("the dataset", name, repo_type="dataset"):
            return _load_built(name, None, config, split, num_proc, streaming)
    path = Path(name).expanduser().resolve()
    if path.is_file() and path.suffix != ".parquet":
        made = f". Make one of it: askd-hf prepare --source {name} --target my_speech" if path.suffix == ".csv" else ""
        raise UserError(f"{name} is not a dataset; expected {FORMATS}{made}")
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    folder = audiofolder_splits(path) if path.is_dir() else {}
    tables = common_voice_splits(path) if path.is_dir() and not (is_saved or folder) else {}
    bare = [] if text_required or is_saved or folder or tables else bare_audio(path)
    if config is not None and (folder or tables or is_saved or bare or path.is_file()):
        raise UserError(f"{name} has no configurations; remove --dataset_config {config}")
    downloaded = path.is_dir() and was_downloaded(path)
    files = ClipFiles(name, (path,), path if downloaded else None, downloaded)
    if is_saved:
        if folder:
            warn_once(f"{name} is loaded with load_from_disk; {', '.join(METADATA_FILES)} in it are ignored")
        saved = load_saved(path, "copy it or save it again")
        return pick(name, split, saved if isinstance(saved, DatasetDict) else {"train": saved}), files
    if folder:
        return read_audiofolder(pick(name, split, folder), path, name if downloaded else None), None
    if tables:
        return read_common_voice(pick(name, split, tables)), None
    if bare:
        return read_audio_files(pick(name, split, {"train": bare}), path), None
    if path.is_file():
        pick(name, split, {"train": path})
        rows = _load_parquet(name, {split: [str(path)]}, streaming)
        return rows, ClipFiles(name, (path.parent,))
    return _load_built(name, path, config, split, num_proc, streaming)


def bare_audio(folder: Path) -> list[Path]:
    """Return the audio files of a folder without a metadata file; empty if they lie beside the files of a dataset."""
    if not folder.is_dir():
        return []
    names = (name for _, _, files in walk(folder) for name in files)
    if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in DATA_FILES):
        return []
    return audio_files(folder)


def _load_parquet(name: str, data_files: dict[str, list[str]], streaming: bool) -> Rows:
    """Load the local files of one split. Their names aren't glob patterns."""
    ((split, files),) = data_files.items()
    options = dict(data_files={split: [glob.escape(file) for file in files]}, split=split, streaming=streaming)
    return _load_dataset(name, "parquet", None, options)


def _load_dataset(name: str, path: str, config: str | None, options: dict) -> Rows:
    """Call `load_dataset`. Raise `UserError` for invalid parquet files and types that it doesn't support."""
    try:
        return load_dataset(path, config, **options)
    except (DatasetGenerationError, pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        message = " ".join(str(cause).split())
        if "does not have a datasets dtype" in message:
            raise UserError(f"{name}: {message}; remove this column") from None
        if isinstance(cause, pa.ArrowInvalid | pa.ArrowNotImplementedError):
            raise UserError(f"{name} can't be read as parquet ({message[:200]})") from error
        raise


def _load_built(
    name: str, path: Path | None, config: str | None, split: str, num_proc: int | None, streaming: bool
) -> tuple[Rows, ClipFiles]:
    """Load a Hub dataset, or a directory laid out as one.

    Args:
        path: the directory; None for a Hub dataset. The other arguments are those of `load_split`.
    """
    if path is not None and glob.escape(str(path)) != str(path):
        return _load_from_glob_like_path(name, path, config, split, streaming)
    try:
        builder = load_dataset_builder(str(path or name), config)
    except (EmptyDatasetError, DataFilesNotFoundError):
        raise UserError(f"no speech in {name}; expected {FORMATS}") from None
    except ValueError as error:  # the configuration is missing or doesn't exist
        if constants.HF_HUB_OFFLINE and "Couldn't find cache" in str(error):
            raise UserError(
                f"{name}: with HF_HUB_OFFLINE, `datasets` can't find a dataset if only one split was downloaded. Run "
                f"`hf download {name} --repo-type dataset --local-dir DIR` once, and use DIR as the dataset"
            ) from None
        if "Couldn't infer the same data file format" in str(error):
            raise UserError(
                f"{name} has files of several kinds, such as audio and tables; expected {FORMATS}"
            ) from None
        if "onfig" not in str(error):
            raise
        several = (
            f"; for several datasets give one each: {config.replace('+', ' ')}" if config and "+" in config else ""
        )
        raise UserError(f"{name}: {' '.join(str(error).split())} (--dataset_config{several})") from None
    if builder.name == "cache":  # offline
        return load_dataset(name, config, split=split), ClipFiles(name, downloaded=True)
    urls = {str(key): value for key, value in builder.config.data_files.items()}
    wanted = pick(name, split, urls)
    if builder.name == "audiofolder" and builder.repo_id is not None and streaming:
        raise UserError(
            f"{name}: --streaming doesn't support audio files with a metadata.csv on the Hub; remove --streaming, or "
            "upload the dataset as parquet (datasets.Dataset.push_to_hub)"
        )
    if builder.name == "audiofolder":
        return load_hub_audiofolder(name, builder, split, urls), None
    if builder.name not in ("parquet", "arrow"):
        raise UserError(_format_error(name, builder.name, wanted))
    # with `split` alone `datasets` downloads all splits of the configuration, with `data_files` only these files
    options: dict[str, Any] = dict(data_files={split: [glob.escape(url) for url in wanted]}, split=split)
    options |= dict(streaming=True) if streaming else dict(num_proc=num_proc)
    return _load_dataset(name, str(path or name), config, options), _clip_files(name, path, wanted)


def _clip_files(name: str, path: Path | None, data_files: list[str]) -> ClipFiles:
    """Return how paths in the rows are resolved; `path` is the dataset's directory, None for the Hub."""
    if path is None:
        return ClipFiles(name, downloaded=True)
    downloaded = was_downloaded(path)
    folders = tuple(dict.fromkeys([*(Path(file).parent for file in data_files), path]))
    return ClipFiles(name, folders, path if downloaded else None, downloaded)


def _load_from_glob_like_path(
    name: str, path: Path, config: str | None, split: str, streaming: bool
) -> tuple[Rows, ClipFiles]:
    """Load a directory of parquet files whose path has `[` or `*`, which `datasets` takes for a glob pattern."""
    pattern = glob.escape(str(path))
    try:
        patterns = get_data_patterns(pattern)
        found = {key: [f for p in patterns[key] for f in resolve_pattern(p, pattern)] for key in patterns}
    except FileNotFoundError:
        raise UserError(f"no speech in {name}; expected {FORMATS}") from None
    parquet = {key: [file for file in files if file.endswith(".parquet")] for key, files in found.items()}
    if config is not None or not any(parquet.values()) or "configs:" in _card(path):
        raise UserError(f"{name}: a path with [ ] * ? is supported for parquet files only; rename the directory")
    files = pick(name, split, {key: list(dict.fromkeys(files)) for key, files in parquet.items() if files})
    return _load_parquet(name, {split: files}, streaming), _clip_files(name, path, files)


def _card(path: Path) -> str:
    card = path / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def _format_error(name: str, kind: str, files: list[str]) -> str:
    message = f"{name} contains {kind} files; expected {FORMATS}"
    table = next((Path(file) for file in files if Path(file).suffix in TABLES), None)
    if table is None:
        return message
    advice = f"{table.stem}/metadata.{'jsonl' if 'json' in table.suffix else 'csv'}"
    return (
        f"{message}. If {table.name} lists audio files, rename it to {advice}, with comma-separated columns and the "
        "files, relative to it, in a column file_name"
    )
