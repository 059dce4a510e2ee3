"""Directories of audio with a metadata file: their splits, their rows, and what is left out of them."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import Audio, Dataset

from ..errors import UserError
from .clip_files import check_inside, check_target, clip_file
from .metadata import read_metadata, warn_once
from .splits import kind_of, split_directory

# what `decode_audio` knows, and what a file of it is usually called; a name in metadata.csv may have any suffix
AUDIO = (
    *(".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".aif", ".aiff"),
    *(".aifc", ".au", ".snd", ".sph", ".caf", ".m4a", ".m4b", ".aac", ".ac3", ".amr", ".awb", ".3gp", ".3g2"),
    *(".wma", ".wv", ".mka", ".webm", ".weba", ".mp4", ".m4v", ".mov", ".mkv"),
)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class FolderSplit:
    """A split of a directory.

    Attributes:
        metadata: the file with its rows.
        rows: all rows of the file, of `read_metadata`, if they were read before.
        chosen: the numbers of the split's own. None: all are.
    """

    metadata: Path
    rows: Dataset | None = None
    chosen: list[int] | None = None


def metadata_file(folder: Path) -> Path | None:
    """The metadata file of a folder, or None. Of several the first in the order of `METADATA`, which is said."""
    first, *others = [folder / name for name in METADATA if (folder / name).is_file()] or [None]
    if others:
        warn_once(f"{first} is read; {', '.join(other.name for other in others)} beside it is ignored")
    return first


def audiofolder_splits(folder: Path) -> dict[str, FolderSplit]:
    """Splits of a directory by their names; none if it has no metadata file.

    Each subdirectory with a metadata file is one. The rows of a metadata file at the top are those of the directories
    in which their files are, if these are called as splits are; otherwise they are `train`.

    Raises `UserError` if such a metadata file can't be read, or if only some of its rows belong to splits.
    """
    below = {name: FolderSplit(found) for name, found in _below(folder) if found}
    top = metadata_file(folder)
    if top is None:
        return below
    at_top = _splits_of_rows(top, list(below))
    for name in at_top:
        if name in below:
            warn_once(f"{top}: its rows of {name!r} are ignored, as that split has {below[name].metadata}")
    return at_top | below


def _below(folder: Path) -> Iterator[tuple[str, Path | None]]:
    """The subdirectories, and their metadata files."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield entry.name, metadata_file(entry)


def _splits_of_rows(metadata: Path, below: list[str]) -> dict[str, FolderSplit]:
    rows = read_metadata(metadata)
    where = [split_directory(name, below) for name in _without_common_root(rows["file_name"][:])]
    counts = Counter(where)
    outside = counts.pop(None, 0)
    held_out = [name for name in counts if name in below or kind_of(name) != "train"]
    if outside and held_out:
        row = where.index(None)
        inside = ", ".join(f"{name}/ {number}" for name, number in counts.items())
        raise UserError(
            f"{metadata}: some of its files lie in directories that are called as splits ({inside}), {outside} in "
            f"none, such as row {row}, {rows[row]['file_name']}: which split are they? Put them into one, or give "
            "each split a directory with a metadata file of its own"
        )
    if outside or not counts:
        return {"train": FolderSplit(metadata, rows)}
    return {
        name: FolderSplit(metadata, rows, [row for row, place in enumerate(where) if place == name]) for name in counts
    }


def _without_common_root(names: list[str]) -> list[str]:
    """Absolute names without the directories that all of them share: these say nothing about splits."""
    absolute = [os.path.dirname(name) for name in names if os.path.isabs(name)]
    root = os.path.commonpath(absolute) if absolute else ""
    return [os.path.relpath(name, root) if os.path.isabs(name) else name for name in names]


def read_audiofolder(split: FolderSplit, root: Path, downloaded: str | None = None) -> Dataset:
    """The rows of a split.

    Args:
        split: of `audiofolder_splits`.
        root: the dataset's directory; clips are named relative to it.
        downloaded: the name of a dataset that was: its files lie in `root`.

    Returns:
        `audio` (path only), `clip` and the other columns; all of them strings if they come from CSV.

    Raises:
        UserError: as `read_metadata`, and for a file that a downloaded dataset doesn't hold. Missing audio files are
            found later, by `filter_invalid_clips`, with all other bad rows.
    """
    folder = split.metadata.parent
    rows = read_metadata(split.metadata) if split.rows is None else split.rows
    if downloaded is None:
        _say_ignored(split.metadata, root, rows["file_name"][:])
    rows = rows if split.chosen is None else rows.select(split.chosen).flatten_indices(keep_in_memory=True)
    names = rows["file_name"][:]
    if downloaded is not None:
        for name in names:
            check_inside(name, folder, root, downloaded)
    files = [clip_file(folder, name) for name in names]
    if downloaded is not None:
        for file in files:
            check_target(file, root, downloaded)
    return with_audio_files(rows.remove_columns("file_name"), files, root, str(split.metadata))


def with_audio_files(rows: Dataset, files: list[Path], root: Path, name: str = "") -> Dataset:
    """The rows with the columns `audio` and `clip`, in front of their own."""
    table = _audio_table(files, root)
    for column in rows.column_names:
        if column in table.column_names:
            warn_once(f"{name}: the column {column!r} is ignored: file_name says what it would")
    rows = rows.remove_columns([column for column in rows.column_names if column in table.column_names])
    dataset = Dataset(table).cast_column("audio", Audio(decode=False))
    for column, feature in rows.features.items():
        dataset = dataset.add_column(column, rows.data.column(column), feature=feature)
    return dataset


def audio_files(folder: Path, suffixes: tuple[str, ...] = AUDIO) -> list[Path]:
    """All audio files in a folder and below, by path."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


def read_audio_files(files: list[Path], root: Path) -> Dataset:
    """Files that nothing is known of, with the columns of `read_audiofolder`, and `text`: None."""
    table = _audio_table(files, root).append_column("text", pa.nulls(len(files), pa.string()))
    return Dataset(table).cast_column("audio", Audio(decode=False))


def _audio_table(files: list[Path], root: Path) -> pa.Table:
    audio = [{"bytes": None, "path": str(file)} for file in files]
    clips = [str(file.relative_to(root)) if file.is_relative_to(root) else str(file) for file in files]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"audio": pa.array(audio, kind), "clip": pa.array(clips, pa.string())})


def _say_ignored(metadata: Path, root: Path, names: list[str]) -> None:
    """Warn of audio files that are in no row: beside the metadata file, and in directories without one."""
    folder = metadata.parent
    listed = {os.path.normpath(clip_file(folder, name)) for name in names}
    unlisted = [file for file in _audio_below(folder) if file not in listed]
    if unlisted:
        example = os.path.relpath(min(unlisted), folder)
        warn_once(f"{metadata}: {len(unlisted)} audio files below it have no row and are ignored, such as {example}")
    if folder == root:
        return
    bare = {name: files for name, found in _below(root) if not found and (files := list(_audio_below(root / name)))}
    if not bare:
        return
    for _, other in _below(root):
        if other and other != metadata:
            listed |= {os.path.normpath(clip_file(other.parent, name)) for name in read_metadata(other)["file_name"]}
    for name, files in bare.items():
        if not listed.intersection(files):
            warn_once(f"{root / name}: {len(files)} audio files without a metadata file are ignored")


def _audio_below(folder: Path) -> Iterator[str]:
    """Audio files in a folder and below, without subdirectories that have a metadata file of their own."""
    for place, folders, files in os.walk(folder):
        if place != str(folder) and any(name in files for name in METADATA):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(AUDIO) and not name.startswith("."):
                yield os.path.join(place, name)
