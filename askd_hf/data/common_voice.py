"""Read Common Voice in Mozilla's layout: `clips/`, and one TSV file per split."""

from pathlib import Path, PurePath

import pyarrow as pa
from datasets import Dataset
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..csv_files import csv_rows
from ..errors import UserError, warn_once
from .audiofolder import with_audio_files

CLIPS = "clips"
NEEDED = ("path", "sentence")
LOCALE_CODES = {"zh-HK": "yue"}  # Cantonese; in other locales the code precedes the hyphen, as in sv-SE


def common_voice_splits(folder: Path) -> dict[str, Path]:
    """Return the TSV files of a language by name without suffix; empty if the folder has another layout.

    Args:
        folder: `cv-corpus-VERSION/LANGUAGE`, or its parent directory if that has only one language.

    Raises `UserError` if there are several languages.
    """
    if splits := _tables(folder):
        return splits
    languages = {
        entry.name: tables for entry in sorted(folder.iterdir()) if entry.is_dir() and (tables := _tables(entry))
    }
    if len(languages) > 1:
        raise UserError(
            f"{folder} has several languages ({', '.join(languages)}); choose one, such as {folder}/{min(languages)}"
        )
    return next(iter(languages.values()), {})


def _tables(folder: Path) -> dict[str, Path]:
    if not (folder / CLIPS).is_dir():
        return {}
    # other files, such as reported.tsv and clip_durations.tsv, have other columns
    return {file.stem: file for file in sorted(folder.glob("*.tsv")) if set(NEEDED) <= set(_header(file))}


def _header(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        return [name.strip() for name in stream.readline().split("\t")]


def read_common_voice(table: Path) -> Dataset:
    """Return the clips of a TSV file.

    Returns:
        `audio` (path only), `clip`, `speaker` (from `client_id`), `language` if Whisper supports that of the column
        `locale`, and the other columns as strings. The transcript is `sentence`.

    Raises `UserError` if a row has another length than the header, or no path.
    """
    header, *rows = csv_rows(table, delimiter="\t", quotes=False)
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
            warn_once(f"{table}: Whisper doesn't support language {', '.join(unknown)}; set --language")
        else:
            columns["language"] = [codes[locale] for locale in locales]
    if table.stem == "validated":
        warn_once(f"{table} includes the clips of dev and test: don't evaluate on them after training on it")
    folder = table.parent
    # early versions have paths without suffix
    files = [folder / CLIPS / (path if PurePath(path).suffix else f"{path}.mp3") for path in paths]
    table_of_strings = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return with_audio_files(Dataset(table_of_strings), files, folder, str(table))


def _code(locale: str) -> str | None:
    """Return Whisper's code for a locale, or None if Whisper doesn't support the language."""
    code = LOCALE_CODES.get(locale, locale.partition("-")[0].lower())
    return code if code in LANGUAGES else None
