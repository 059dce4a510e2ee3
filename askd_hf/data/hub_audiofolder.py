"""Load audio files with a metadata file from the Hub, downloading only the files of one split.

`datasets` needs torchcodec to build such a dataset, so the files are downloaded and read as a local directory.
"""

import glob
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from datasets import Dataset, DatasetBuilder
from huggingface_hub import HfApi, snapshot_download

from ..errors import UserError
from .audiofolder import AUDIO_SUFFIXES, METADATA_FILES, FolderSplit, read_audiofolder
from .clip_files import check_inside
from .metadata import read_metadata
from .splits import pick

MAX_PATTERNS = 100  # directories of a split that are downloaded by name


def load_hub_audiofolder(name: str, builder: DatasetBuilder, split: str, urls: Mapping[str, list[str]]) -> Dataset:
    """Return the rows of a split: those of the nearest metadata file above its audio, without rows of other splits.

    Raises `UserError` if there is no metadata file, or several, and as `read_audiofolder`.
    """
    splits = {key: [PurePosixPath(url.removeprefix(f"{builder.base_path}/")) for url in urls[key]] for key in urls}
    own = pick(name, split, splits)
    found = {file for file in own if file.name in METADATA_FILES}
    if (
        builder.repo_id is not None and not found
    ):  # `datasets` doesn't assign metadata files above the directory of a split
        files = HfApi().list_repo_files(name, repo_type="dataset", revision=builder.hash)
        found = {file for file in map(PurePosixPath, files) if file.name in METADATA_FILES}
    nearest = {_nearest(file, found) for file in own if file.suffix.lower() in AUDIO_SUFFIXES} - {None}
    if builder.repo_id is None or not nearest:
        deeper = f" ({min(found)} is too deep; use {name}/{min(found).parent.parent.as_posix()})" if found else ""
        raise UserError(
            f"{name}: no {', '.join(METADATA_FILES)} found for the audio files{deeper}: add one with the columns "
            "file_name and transcription"
        )
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
    below = below if len(below) <= MAX_PATTERNS else {metadata.parent.as_posix()}
    root = _download(name, builder, [f"{glob.escape(path)}/*" if path != "." else "*" for path in sorted(below)])
    return read_audiofolder(FolderSplit(root / metadata, rows, chosen), root, name)


def _nearest(file: PurePosixPath, metadata: set[PurePosixPath]) -> PurePosixPath | None:
    """Return the metadata file in the directory of a file, or in the nearest directory above."""
    candidates = (parent / name for parent in file.parents for name in METADATA_FILES)
    return next((candidate for candidate in candidates if candidate in metadata), None)


def _download(name: str, builder: DatasetBuilder, patterns: list[str]) -> Path:
    return Path(snapshot_download(name, repo_type="dataset", revision=builder.hash, allow_patterns=patterns))
