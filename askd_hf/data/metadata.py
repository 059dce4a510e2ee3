"""Metadata files of audio, read without type inference: a transcript "null" or "007" is text."""

import csv
import functools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from ..errors import UserError
from .columns import replace_column

logger = logging.getLogger(__name__)

EXPECTED = "file_name (the audio file, relative to the metadata file) and a transcript column such as transcription"
# what other tools call it: NeMo, SpeechBrain, torchaudio, Common Voice, Kaldi's converters
NOT_FILE_NAME = (
    *("file", "filename", "filepath", "file_path", "path", "audio", "audio_file", "audio_path", "audio_filepath"),
    *("wav", "wav_file", "wav_path", "wav_filename", "sound", "recording", "clip", "clip_path"),
)
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@functools.cache
def warn_once(message: str) -> None:
    """A warning that each process gives once, however many splits are read of a dataset."""
    logger.warning(message)


def read_metadata(file: Path) -> Dataset:
    """All columns of a metadata file: `file_name` as strings; of CSV all as strings; of parquet with their types.

    Raises:
        UserError: wrong header, a row of another length, a row without `file_name`, bad JSON, not UTF-8, not parquet.
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
                return f"{message}, separated by commas: here they are separated by {name}"
    meant = next((name for name in columns if name.lower() in NOT_FILE_NAME or name.lower() == "file_name"), None)
    return message if meant is None else f"{message}: rename the column {meant!r} to file_name"


def _from_rows(rows: Iterator[list], file: Path) -> Dataset:
    """From the names of the columns, and then the rows."""
    try:
        names = next(rows)
        if file.suffix == ".csv" and "file_name" not in names:  # or the first row of another length would be blamed
            raise UserError(_no_file_name(names, file))
        values = list(rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    columns = {name: _array([row[i] for row in values], name, file) for i, name in enumerate(names) if name}
    return Dataset(pa.table(columns))


def _parquet(file: Path) -> Dataset:
    """The columns that `datasets` has types for."""
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} can't be read as parquet ({str(error).splitlines()[0]})") from None
    for field in table.schema:
        try:
            Features.from_arrow_schema(pa.schema([field]))
        except ValueError:
            warn_once(f"{file}: the column {field.name!r} is ignored: `datasets` has no type for {field.type}")
            table = table.remove_column(table.schema.get_field_index(field.name))
    return Dataset(table)


def csv_rows(file: Path, delimiter: str = ",", quotes: bool = True) -> Iterator[list[str]]:
    """The header, then the rows. A column without a name is called "".

    Raises:
        UserError: two columns of one name; a row of another length; a quote without an end.
    """
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(
            stream, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE, strict=True
        )
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, file)
            yield header
            for fields in reader:
                if fields and len(fields) != len(header):
                    advice = "; put text with commas in double quotes" if delimiter == "," else ""
                    raise UserError(
                        f"{file}, line {reader.line_num}: {len(fields)} fields, the header has {len(header)} "
                        f"({', '.join(header)}){advice}"
                    )
                if fields:
                    yield fields
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: {error}") from None


def _check_header(header: list[str], file: Path) -> None:
    twice = [name for name, number in Counter(header).items() if name and number > 1]
    if twice:
        raise UserError(
            f"{file}: several columns are called {', '.join(map(repr, twice))}; rename or remove all but one"
        )
    for place, name in enumerate(header, start=1):
        if not name:
            warn_once(f"{file}: column {place} has no name in the header and is ignored")


def _json_rows(file: Path) -> Iterator[list]:
    """The names of all fields in the order of their appearance, then the rows; a field that a row lacks is None."""
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            if not rows and (line.strip() == "[" or line.lstrip().startswith(("[{", "[ {"))):
                raise UserError(f"{file} is one JSON array; expected one object a line: jq -c '.[]' writes it so")
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
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise UserError(f"{file}: column {name!r} mixes types ({error})") from None
