"""Read CSV files strictly: nothing is guessed, and a wrong row is an error that names its line."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError, warn_once

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # beside the comma


def csv_rows(file: Path, delimiter: str = ",", quotes: bool = True) -> Iterator[list[str]]:
    """Yield the header, then the rows. A column without a name is named "".

    Not `pyarrow.csv`, which accepts an unclosed quote.

    Raises `UserError` if two columns have the same name, a row has another length, a quote isn't closed, or the file
    isn't UTF-8.
    """
    lines = read_utf8(file)
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE, strict=True
    )
    line = 1  # the first line of the row, which an unclosed quote extends to the next quote or the end of the file
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, file)
        yield header
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                advice = "; enclose text with commas in double quotes" if delimiter == "," else ""
                raise UserError(
                    f"{file}, line {line}: {len(fields)} fields, the header has {len(header)} "
                    f"({', '.join(header)}){advice}"
                )
            if fields:
                yield fields
            line = reader.line_num + 1
    except csv.Error as error:
        end = f" to {reader.line_num}, of one row" if reader.line_num > line else ""
        raise UserError(f"{file}, line {line}{end}: {error}; is a double quote not closed, or not doubled?") from None


def read_utf8(file: Path) -> io.StringIO:
    """Return the lines of a text file, without a byte order mark, which spreadsheet programs write at its start.

    Raises `UserError` if the file isn't UTF-8.
    """
    content = file.read_bytes()
    try:
        return io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8; save it as UTF-8, in Excel as `CSV UTF-8`") from None


def _check_header(header: list[str], file: Path) -> None:
    duplicates = [name for name, number in Counter(header).items() if name and number > 1]
    if duplicates:
        raise UserError(
            f"{file}: several columns are named {', '.join(map(repr, duplicates))}; rename or remove all but one"
        )
    for place, name in enumerate(header, start=1):
        if not name:
            warn_once(f"{file}: column {place} has no name in the header and is ignored")
