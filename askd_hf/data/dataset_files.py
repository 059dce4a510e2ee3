"""Add rows to a dataset of `save_to_disk` without writing the rows that it has again."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME
from datasets.fingerprint import generate_random_fingerprint

from ..progress import hide_datasets_bars
from .columns import with_features
from .json_files import read_json, write_json


def add_files(stored: Dataset | None, parts: list[Path], directory: Path) -> None:
    """Add the rows of `parts` to the dataset in `directory`, atomically.

    The files of the parts become files of the dataset: hard links, or copies on a disk without links. If the columns
    of the stored rows have changed, all rows are written again.

    Args:
        stored: the rows of `directory`, with the columns of the parts. None if the directory is empty or missing.
        parts: datasets of `save_to_disk`. A column that one of them lacks is None in its rows.
    """
    rows = [load_from_disk(str(part)) for part in parts]
    features = rows[0].features
    equal = all(part.features == features for part in rows)
    if equal and stored is not None and has_columns(directory, features):
        _add(parts, directory)
        return
    saving, old = directory.with_name(f"{directory.name}.saving"), replaced(directory)
    shutil.rmtree(saving, ignore_errors=True)
    if equal and stored is None:
        shutil.copytree(parts[0], saving, ignore=lambda *_: _data_files(parts[0]))
        write_json(saving / DATASET_STATE_JSON_FILENAME, _state(parts[0]) | {"_data_files": []})
        _add(parts, saving)
    else:
        rows = [*([] if stored is None else [stored]), *rows]
        features = Features({name: feature for part in rows for name, feature in part.features.items()})
        with hide_datasets_bars():
            concatenate_datasets([with_features(part, features) for part in rows]).save_to_disk(str(saving))
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed before the last line
        directory.rename(old)
    saving.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def has_columns(directory: Path, features: Mapping[str, Any]) -> bool:
    """Return whether the dataset in `directory` has exactly these features. False if there is none."""
    if not (directory / DATASET_STATE_JSON_FILENAME).is_file():
        return False
    return load_from_disk(str(directory)).features == Features(features)


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
