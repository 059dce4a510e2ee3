"""Audio files with a metadata file on the Hub: only those of a split are downloaded.

`datasets` needs torchcodec to build it, so its files are fetched and read as a local directory.
"""

import glob
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from datasets import Dataset, DatasetBuilder
from huggingface_hub import HfApi, snapshot_download

from ..errors import UserError
from .audiofolder import AUDIO, METADATA, FolderSplit, read_audiofolder
from .clip_files import check_inside
from .metadata import read_metadata
from .splits import pick

FOLDERS = 100  # of a split that are named apart in a download


def load_hub_audiofolder(name: str, builder: DatasetBuilder, split: str, urls: Mapping[str, list[str]]) -> Dataset:
    """A split: the rows of the metadata file that is nearest above its audio, without those of other splits.

    Args:
        builder: of `load_dataset_builder`; it finds the splits, as `datasets` does.
        urls: the files of all splits.

    Raises `UserError` if there is no metadata file, or several, and as `read_audiofolder`.
    """
    splits = {key: [PurePosixPath(url.removeprefix(f"{builder.base_path}/")) for url in urls[key]] for key in urls}
    own = pick(name, split, splits)
    found = {file for file in own if file.name in METADATA}
    if builder.repo_id is not None and not found:  # `datasets` gives a split no metadata file above its directory
        there = HfApi().list_repo_files(name, repo_type="dataset", revision=builder.hash)
        found = {file for file in map(PurePosixPath, there) if file.name in METADATA}
    nearest = {_nearest(file, found) for file in own if file.suffix.lower() in AUDIO} - {None}
    if builder.repo_id is None or not nearest:
        deeper = f" ({min(found)} is too deep: give {name}/{_grandparent(min(found))})" if found else ""
        raise UserError(f"{name}: audio files, but none of {', '.join(METADATA)} beside them{deeper}")
    if len(nearest) > 1:
        raise UserError(f"{name}: split {split!r} has several metadata files, {', '.join(map(str, sorted(nearest)))}")
    (metadata,) = nearest
    root = _download(name, builder, [glob.escape(str(metadata))])
    rows = read_metadata(root / metadata)
    folder = root / metadata.parent
    others = {root / file for files in splits.values() if files is not own for file in files}
    chosen, below = [], set()
    for row, file_name in enumerate(rows["file_name"][:]):
        check_inside(file_name, folder, root, name)
        file = Path(os.path.normpath(folder / file_name.replace("\\", "/")))
        if file not in others:
            chosen.append(row)
            below.add(file.parent.relative_to(root).as_posix())
    below = below if len(below) <= FOLDERS else {metadata.parent.as_posix()}
    root = _download(name, builder, [f"{glob.escape(path)}/*" if path != "." else "*" for path in sorted(below)])
    return read_audiofolder(FolderSplit(root / metadata, rows, chosen), root, name)


def _nearest(file: PurePosixPath, metadata: set[PurePosixPath]) -> PurePosixPath | None:
    """The metadata file beside a file, or in the nearest directory above."""
    beside = (parent / name for parent in file.parents for name in METADATA)
    return next((candidate for candidate in beside if candidate in metadata), None)


def _grandparent(file: PurePosixPath) -> str:
    return file.parent.parent.as_posix()


def _download(name: str, builder: DatasetBuilder, patterns: list[str]) -> Path:
    return Path(snapshot_download(name, repo_type="dataset", revision=builder.hash, allow_patterns=patterns))
