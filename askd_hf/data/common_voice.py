"""Common Voice as Mozilla packs it: `clips/`, and one table of tab-separated values a split."""

from pathlib import Path, PurePath

import pyarrow as pa
from datasets import Dataset
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..errors import UserError
from .audiofolder import with_audio_files
from .metadata import csv_rows, warn_once

CLIPS = "clips"
NEEDED = ("path", "sentence")
OWN_CODES = {"zh-HK": "yue"}  # Cantonese; elsewhere what follows the hyphen is a country, as in sv-SE


def common_voice_splits(folder: Path) -> dict[str, Path]:
    """The tables of a language by their names without `.tsv`; none if the folder holds something else.

    Args:
        folder: `cv-corpus-VERSION/LANGUAGE`, or what it lies in if it is the only one there.

    Raises `UserError` if there are several languages.
    """
    if splits := _tables(folder):
        return splits
    languages = {
        entry.name: tables for entry in sorted(folder.iterdir()) if entry.is_dir() and (tables := _tables(entry))
    }
    if len(languages) > 1:
        raise UserError(
            f"{folder} has several languages, {', '.join(languages)}: choose one, as in {folder}/{min(languages)}"
        )
    return next(iter(languages.values()), {})


def _tables(folder: Path) -> dict[str, Path]:
    if not (folder / CLIPS).is_dir():
        return {}
    # others, such as reported.tsv and clip_durations.tsv, are about clips or sentences
    return {file.stem: file for file in sorted(folder.glob("*.tsv")) if set(NEEDED) <= set(_header(file))}


def _header(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        return [name.strip() for name in stream.readline().split("\t")]


def read_common_voice(table: Path) -> Dataset:
    """The clips of a table.

    Returns:
        `audio` (path only), `clip`, `speaker` (the table's `client_id`), `language` if Whisper knows that of the
        table's `locale`, and the other columns, all of them strings; the transcript is `sentence`.

    Raises `UserError` if a row has another length than the header, or no path.
    """
    try:
        header, *rows = csv_rows(table, delimiter="\t", quotes=False)
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header) if name}
    paths = columns.pop("path")
    if "" in paths:
        raise UserError(f"{table}: row {paths.index('')} (counted from 0) has no path")
    columns.pop("language", None)
    if speakers := columns.get("client_id"):
        columns["speaker"] = speakers
    if locales := columns.get("locale"):
        codes = {locale: _code(locale) for locale in set(locales)}
        unknown = sorted(locale for locale, code in codes.items() if code is None)
        if unknown:
            warn_once(f"{table}: Whisper doesn't know the language {', '.join(unknown)}; --language decides")
        else:
            columns["language"] = [codes[locale] for locale in locales]
    if table.stem == "validated":
        warn_once(f"{table} has the clips of dev and test as well: don't evaluate on these what is trained on it")
    folder = table.parent
    # the first versions left out the suffix
    files = [folder / CLIPS / (path if PurePath(path).suffix else f"{path}.mp3") for path in paths]
    table_of_strings = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return with_audio_files(Dataset(table_of_strings), files, folder, str(table))


def _code(locale: str) -> str | None:
    """Whisper's code of a language."""
    code = OWN_CODES.get(locale, locale.partition("-")[0].lower())
    return code if code in LANGUAGES else None
