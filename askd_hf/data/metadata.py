"""Read metadata files of audio without type inference: a transcript "null" or "007" is text."""

import bisect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from ..csv_files import SEPARATORS, csv_rows, read_utf8
from ..errors import UserError, warn_once
from .columns import replace_column

MIXED_TYPES = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)
EXPECTED = "file_name (the audio file, relative to the metadata file) and a transcript column such as transcription"
# names of the column in other tools: NeMo, SpeechBrain, torchaudio, Common Voice, Kaldi converters
NOT_FILE_NAME = (
    *("file", "filename", "filepath", "file_path", "path", "audio", "audio_file", "audio_path", "audio_filepath"),
    *("wav", "wav_file", "wav_path", "wav_filename", "sound", "recording", "clip", "clip_path"),
)


def read_metadata(file: Path) -> Dataset:
    """Return all columns of a metadata file. From CSV all are strings; from parquet they keep their types.

    Raises:
        UserError: the header is wrong, a row has another length or no `file_name`, or the file is not valid JSON,
            UTF-8 or parquet.
    """
    if file.suffix == ".parquet":
        columns = _parquet(file)
    else:
        rows = csv_rows(file) if file.suffix == ".csv" else _json_rows(file)
        columns = _from_rows(rows, file)
    if "file_name" not in columns.column_names:
        raise UserError(_no_file_name(columns.column_names, file))
    names = [name if isinstance(name, str) else None for name in columns["file_name"][:]]
    for row, name in enumerate(names):
        if not name:
            raise UserError(f"{file}: row {row} (counted from 0) has no file_name")
    return replace_column(columns, "file_name", pa.array(names, pa.string()))


def _no_file_name(columns: list[str], file: Path) -> str:
    message = f"{file}: the columns are {', '.join(columns) or 'none'}; expected {EXPECTED}"
    if len(columns) == 1:
        for separator, name in SEPARATORS.items():
            if separator in columns[0]:
                return f"{message}, separated by commas, not by {name}"
    meant = next((name for name in columns if name.lower() in NOT_FILE_NAME or name.lower() == "file_name"), None)
    if meant is None:
        return message
    return f"{message}: rename the column {meant!r} to file_name, or let askd-hf prepare make a dataset of the file"


def _from_rows(rows: Iterator[list], file: Path) -> Dataset:
    """Build a dataset from an iterator over the column names and then the rows."""
    names = next(rows)
    if file.suffix == ".csv" and "file_name" not in names:
        # checked first: the error would otherwise be the length of a row
        raise UserError(_no_file_name(names, file))
    values = list(rows)
    columns = {name: _array([row[i] for row in values], name, file) for i, name in enumerate(names) if name}
    return Dataset(pa.table(columns))


def _parquet(file: Path) -> Dataset:
    """Return the columns whose types `datasets` supports."""
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} can't be read as parquet ({str(error).splitlines()[0]})") from None
    for field in table.schema:
        try:
            Features.from_arrow_schema(pa.schema([field]))
        except ValueError:
            warn_once(
                f"{file}: column {field.name!r} is ignored, because `datasets` doesn't support type {field.type}"
            )
            table = table.remove_column(table.schema.get_field_index(field.name))
    return Dataset(table)


def _json_rows(file: Path) -> Iterator[list]:
    """Yield the names of all fields in order of appearance, then the rows. Missing fields are None."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_utf8(file), start=1):
        if not line.strip():
            continue
        if not rows and (line.strip() == "[" or line.lstrip().startswith(("[{", "[ {"))):
            raise UserError(f"{file} is a JSON array; expected one object per line (convert it with jq -c '.[]')")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: expected an object with {EXPECTED}")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    yield names
    yield from ([row.get(name) for name in names] for row in rows)


def _array(values: list, name: str, file: Path) -> pa.Array:
    try:
        return pa.array(values)
    except MIXED_TYPES as error:
        row = bisect.bisect_left(range(len(values)), True, key=lambda last: _mixes_types(values[: last + 1]))
        raise UserError(f"{file}: column {name!r} mixes types from row {row} (counted from 0) on: {error}") from None


def _mixes_types(values: list) -> bool:
    try:
        pa.array(values)
    except MIXED_TYPES:
        return True
    return False
