"""Directories of audio with a metadata file, read without type inference: a transcript "null" or "007" is text."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Audio, Dataset

from ..errors import UserError

# what `decode_audio` knows, and what a file of it is usually called; a name in metadata.csv may have any suffix
AUDIO = (
    *(".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".aif", ".aiff"),
    *(".aifc", ".au", ".snd", ".sph", ".caf", ".m4a", ".m4b", ".aac", ".ac3", ".amr", ".awb", ".3gp", ".3g2"),
    *(".wma", ".wv", ".mka", ".webm", ".weba", ".mp4", ".m4v", ".mov", ".mkv"),
)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
EXPECTED = "file_name (the audio file, relative to the metadata file) and a transcript column such as transcription"


def metadata_file(folder: Path) -> Path | None:
    """The metadata file of a folder, or None."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def audiofolder_splits(folder: Path) -> dict[str, Path]:
    """Splits and their metadata files: one a subdirectory; the top's own is `train` unless there is a `train/`."""
    splits = {
        entry.name: found for entry in sorted(folder.iterdir()) if entry.is_dir() and (found := metadata_file(entry))
    }
    top = metadata_file(folder)
    return {"train": top, **splits} if top else splits


def read_audiofolder(metadata: Path, root: Path) -> Dataset:
    """The rows of a metadata file.

    Args:
        metadata: `metadata.csv`, `.jsonl` or `.parquet` with a column `file_name`, relative to it.
        root: the dataset's directory; clips are named relative to it.

    Returns:
        `audio` (path only), `clip` and the other columns; all of them strings if they come from CSV.

    Raises:
        UserError: wrong header, a row of another length, bad JSON, not UTF-8. Missing audio files are found later, by
            `check_clips`, with all other bad rows.
    """
    columns = _read_columns(metadata)
    if "file_name" not in columns:
        raise UserError(f"{metadata}: the columns are {', '.join(columns) or 'none'}; expected {EXPECTED}")
    for row, name in enumerate(columns["file_name"]):
        if not isinstance(name, str) or not name:
            raise UserError(f"{metadata}: row {row} (counted from 0) has no file_name")
    files = [metadata.parent / name for name in columns.pop("file_name")]
    table = _audio_table(files, root)
    table.update({name: _array(values, name, metadata) for name, values in columns.items() if name not in table})
    return Dataset(pa.table(table)).cast_column("audio", Audio(decode=False))


def audio_files(folder: Path) -> list[Path]:
    """All audio files in a folder and below, by path."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in AUDIO and file.is_file())


def read_audio_files(files: list[Path], root: Path) -> Dataset:
    """Files that nothing is known of, with the columns of `read_audiofolder`, and `text`: None."""
    table = _audio_table(files, root)
    table["text"] = pa.nulls(len(files), pa.string())
    return Dataset(pa.table(table)).cast_column("audio", Audio(decode=False))


def _audio_table(files: list[Path], root: Path) -> dict[str, pa.Array | list[str]]:
    audio = [{"bytes": None, "path": str(file)} for file in files]
    return {
        "audio": pa.array(audio, type=pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "clip": [str(file.relative_to(root)) if file.is_relative_to(root) else str(file) for file in files],
    }


def _read_columns(metadata: Path) -> dict[str, list]:
    if metadata.suffix == ".parquet":
        return pq.read_table(metadata).to_pydict()
    rows = _csv_rows(metadata) if metadata.suffix == ".csv" else _json_rows(metadata)
    try:
        names = list(next(rows))
        values = list(rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{metadata}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return {name: [row[i] for row in values] for i, name in enumerate(names)}


def _csv_rows(metadata: Path) -> Iterator[list[str]]:
    """The header, then the rows."""
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name
    with metadata.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            yield header
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise UserError(
                        f"{metadata}, line {reader.line_num}: {len(fields)} fields, the header has {len(header)} "
                        f"({', '.join(header)}); put text with commas in double quotes"
                    )
                if fields:
                    yield fields
        except csv.Error as error:
            raise UserError(f"{metadata}, line {reader.line_num}: {error}") from None


def _json_rows(metadata: Path) -> Iterator[list]:
    """The names of all fields in the order of their appearance, then the rows; a field that a row lacks is None."""
    rows = []
    with metadata.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{metadata}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{metadata}, line {number}: expected an object with {EXPECTED}")
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    yield names
    yield from ([row.get(name) for name in names] for row in rows)


def _array(values: list, name: str, metadata: Path) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{metadata}: column {name!r} mixes types ({error})") from None
