"""Add rows to a dataset of `save_to_disk` without writing the rows that it has again."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, concatenate_datasets, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME
from datasets.fingerprint import generate_random_fingerprint

from ..errors import UserError
from ..progress import hide_datasets_bars
from .columns import with_features
from .json_files import read_json, write_json


def load_saved(directory: Path, advice: str) -> Dataset | DatasetDict:
    """Return the dataset that `save_to_disk` wrote. Raise `UserError` for files that are damaged or missing."""
    try:
        return load_from_disk(str(directory))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory} is incomplete or damaged ({reason}): {advice}") from error


def add_files(stored: Dataset | None, parts: list[Path], directory: Path) -> None:
    """Add the rows of `parts` to the dataset in `directory`, atomically.

    The files of the parts become files of the dataset: hard links, or copies on a disk without links. So do the files
    of a dataset that lacks columns of the parts: `datasets` fills them with None when it loads the files. Only a
    dataset with other columns than those of the parts, as an earlier version wrote, is written again.

    Args:
        stored: the rows of `directory`, with the columns of the parts. None if the directory is empty or missing.
        parts: datasets of `save_to_disk`. A column that one of them lacks is None in its rows.
    """
    rows = [load_from_disk(str(part)) for part in parts]
    features = Features({name: feature for part in rows for name, feature in part.features.items()})
    if stored is not None and load_from_disk(str(directory)).features == features:
        _add(parts, directory)
        return
    saving, old = directory.with_name(f"{directory.name}.saving"), replaced(directory)
    shutil.rmtree(saving, ignore_errors=True)
    with hide_datasets_bars():
        if stored is None or not rewrites(directory, features):
            with_features(rows[0].select([]), features).save_to_disk(str(saving))
            _add(parts if stored is None else [directory, *parts], saving)
        else:
            whole = concatenate_datasets([with_features(part, features) for part in (stored, *rows)])
            whole.save_to_disk(str(saving))
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed before the last line
        directory.rename(old)
    saving.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def rewrites(directory: Path, features: Mapping[str, Any]) -> bool:
    """Return whether the rows in `directory` must be written again, audio included, to add rows with these features.

    False if there is no dataset.
    """
    if not (directory / DATASET_STATE_JSON_FILENAME).is_file():
        return False
    return not load_from_disk(str(directory)).features.items() <= features.items()


def replaced(directory: Path) -> Path:
    """Return the name of the directory while its dataset is replaced by a new one."""
    return directory.with_name(f"{directory.name}.replaced")


def _add(parts: list[Path], directory: Path) -> None:
    """Link the files of the parts, then replace the list of files."""
    state = _state(directory)
    listed = _data_files(directory)
    for file in directory.glob("*.arrow"):
        if file.name not in listed:  # of a process that was killed before the last line
            file.unlink()
    for part in parts:
        for name in _data_files(part):
            target = directory / f"{uuid.uuid4().hex}.arrow"
            try:
                os.link(part / name, target)
            except OSError:
                shutil.copy2(part / name, target)
            listed.append(target.name)
    files = [{"filename": name} for name in listed]
    write_json(
        directory / DATASET_STATE_JSON_FILENAME,
        state | {"_data_files": files, "_fingerprint": generate_random_fingerprint()},
    )


def _state(directory: Path) -> dict[str, Any]:
    return read_json(directory / DATASET_STATE_JSON_FILENAME)


def _data_files(directory: Path) -> list[str]:
    return [file["filename"] for file in _state(directory)["_data_files"]]
