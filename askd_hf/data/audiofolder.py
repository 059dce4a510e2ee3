"""Read directories of audio files with a metadata file: splits, rows, and warnings about ignored files."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import Audio, Dataset

from ..errors import UserError, warn_once
from .clip_files import check_inside, check_target, clip_file
from .metadata import read_metadata
from .splits import kind_of, split_directory

# usual suffixes of the formats that `decode_audio` reads; `file_name` in a metadata file may have any suffix
AUDIO_SUFFIXES = (
    *(".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".aif", ".aiff"),
    *(".aifc", ".au", ".snd", ".sph", ".caf", ".m4a", ".m4b", ".aac", ".ac3", ".amr", ".awb", ".3gp", ".3g2"),
    *(".wma", ".wv", ".mka", ".webm", ".weba", ".mp4", ".m4v", ".mov", ".mkv"),
)
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class FolderSplit:
    """A split of a directory."""

    metadata: Path
    rows: Dataset | None = None  # `read_metadata(metadata)` if it was read already, else None
    chosen: list[int] | None = None  # indices of the rows that belong to the split; None if all do


def _metadata_file(folder: Path) -> Path | None:
    """Return the first of `METADATA_FILES` in a folder, or None. Warn if there are several."""
    first, *others = [folder / name for name in METADATA_FILES if (folder / name).is_file()] or [None]
    if others:
        warn_once(f"{first} is used; {', '.join(other.name for other in others)} in the same directory is ignored")
    return first


def audiofolder_splits(folder: Path) -> dict[str, FolderSplit]:
    """Return the splits of a directory by name; empty if it has no metadata file.

    Each subdirectory with a metadata file is a split. A metadata file at the top is divided by the directories of its
    audio files if their names are split names; otherwise all its rows are the split `train`.

    Raises `UserError` if such a metadata file can't be read, or if only some of its rows are in directories of splits.
    """
    below = {name: FolderSplit(found) for name, found in _below(folder) if found}
    top = _metadata_file(folder)
    if top is None:
        return below
    at_top = _splits_of_rows(top, list(below))
    for name in at_top:
        if name in below:
            warn_once(f"{top}: the rows of split {name!r} are ignored, because {below[name].metadata} defines it")
    return at_top | below


def _below(folder: Path) -> Iterator[tuple[str, Path | None]]:
    """Yield each subdirectory's name and its metadata file, if any."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield entry.name, _metadata_file(entry)


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
            f"{metadata}: some audio files are in directories named like splits ({inside}), but {outside} are not, "
            f"such as row {row}, {rows[row]['file_name']}. Move these into the directory of a split, or give each "
            "split a directory with its own metadata file"
        )
    if outside or not counts:
        return {"train": FolderSplit(metadata, rows)}
    return {
        name: FolderSplit(metadata, rows, [row for row, place in enumerate(where) if place == name]) for name in counts
    }


def _without_common_root(names: list[str]) -> list[str]:
    """Remove the directories that all absolute paths have in common: they don't name splits."""
    absolute = [os.path.dirname(name) for name in names if os.path.isabs(name)]
    root = os.path.commonpath(absolute) if absolute else ""
    return [os.path.relpath(name, root) if os.path.isabs(name) else name for name in names]


def read_audiofolder(split: FolderSplit, root: Path, downloaded: str | None = None) -> Dataset:
    """Return the rows of a split.

    Args:
        root: the dataset's directory; clips are named relative to it.
        downloaded: name of the dataset if it was downloaded to `root`, else None.

    Returns:
        `audio` (path only), `clip` and the other columns; from CSV all of them are strings.

    Raises:
        UserError: as `read_metadata`, and for a path outside a downloaded dataset. Missing audio files are reported
            later, by `filter_invalid_clips`, with all other invalid rows.
    """
    folder = split.metadata.parent
    rows = read_metadata(split.metadata) if split.rows is None else split.rows
    if downloaded is None:
        _warn_ignored(split.metadata, root, rows["file_name"][:])
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
    """Return the rows with the columns `audio` and `clip` in front."""
    table = _audio_table(files, root)
    for column in rows.column_names:
        if column in table.column_names:
            warn_once(f"{name}: column {column!r} is ignored, because it is derived from file_name")
    rows = rows.remove_columns([column for column in rows.column_names if column in table.column_names])
    dataset = Dataset(table).cast_column("audio", Audio(decode=False))
    for column, feature in rows.features.items():
        dataset = dataset.add_column(column, rows.data.column(column), feature=feature)
    return dataset


def audio_files(folder: Path, suffixes: tuple[str, ...] = AUDIO_SUFFIXES) -> list[Path]:
    """Return all audio files in a folder and its subdirectories, sorted by path. Hidden files are left out.

    Links to directories are followed, each directory once.
    """
    return sorted(
        Path(place, name)
        for place, _, files in walk(folder)
        for name in files
        if name.lower().endswith(suffixes) and not name.startswith(".") and Path(place, name).is_file()
    )


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each directory, its subdirectories and its files, as `os.walk`, each once. Links are followed last."""
    seen = set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        yield place, folders, files


def read_audio_files(files: list[Path], root: Path) -> Dataset:
    """Return rows for audio files without metadata: `audio` and `clip` as in `read_audiofolder`; `text` is None."""
    table = _audio_table(files, root).append_column("text", pa.nulls(len(files), pa.string()))
    return Dataset(table).cast_column("audio", Audio(decode=False))


def _audio_table(files: list[Path], root: Path) -> pa.Table:
    audio = [{"bytes": None, "path": str(file)} for file in files]
    clips = [str(file.relative_to(root)) if file.is_relative_to(root) else str(file) for file in files]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"audio": pa.array(audio, kind), "clip": pa.array(clips, pa.string())})


def _warn_ignored(metadata: Path, root: Path, names: list[str]) -> None:
    """Warn about audio files that no row refers to: below the metadata file, or in directories without one."""
    folder = metadata.parent
    listed = {os.path.normpath(clip_file(folder, name)) for name in names}
    unlisted = [file for file in _audio_below(folder) if file not in listed]
    if unlisted:  # or listed by another path, through a link
        real = {os.path.realpath(file) for file in listed}
        unlisted = [file for file in unlisted if os.path.realpath(file) not in real]
    if unlisted:
        example = os.path.relpath(min(unlisted), folder)
        warn_once(
            f"{metadata}: {len(unlisted)} audio files in its directory have no row and are ignored, such as {example}"
        )
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
    """Yield the audio files in a folder and its subdirectories, except those with their own metadata file."""
    for place, folders, files in walk(folder):
        if place != str(folder) and any(name in files for name in METADATA_FILES):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith("."):
                yield os.path.join(place, name)
