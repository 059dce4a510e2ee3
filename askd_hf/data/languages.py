"""Which language is spoken in a row of speech, and what is to be made of it."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..errors import UserError
from .columns import replace_column

logger = logging.getLogger(__name__)

TASKS = ("transcribe", "translate")
UNKNOWN = ""  # the language of a row that doesn't say it
UNSPACED = ("zh", "ja", "th", "lo", "my", "km", "yue")  # languages that put no spaces between words
DOTLESS_I = ("tr", "az")  # languages in which I is the capital of ı, and İ that of i


def language_code(language: str | None) -> str | None:
    """`fr` for `French`; what isn't a name is a code already."""
    return language and TO_LANGUAGE_CODE.get(language.lower(), language.lower())


def lower_case(text: str, language: str | None) -> str:
    """The text in lower case, as its language has it: `IŞIK` is `ışık` in Turkish and Azerbaijani.

    `İ` is `i` in every language: `str.lower` leaves its dot behind as a combining mark, which no Whisper writes.

    Args:
        language: of the text, a code or a name. None counts as English.
    """
    text = text.replace("I\u0307", "İ").replace("İ", "i")
    return (text.replace("I", "ı") if language_code(language) in DOTLESS_I else text).lower()


def word_separator(language: str | None, task: str | None = None) -> str:
    """What Whisper writes before the first word of a text, and between two texts: a space, or nothing.

    Args:
        language: of the audio, a code or a name. None, as of an English-only model, counts as English.
        task: "translate" makes the text English.
    """
    return "" if task != "translate" and language_code(language) in UNSPACED else " "


def with_language(
    dataset: Dataset | IterableDataset, language: str | None, task: str | None, name: str = "the dataset"
) -> Dataset | IterableDataset:
    """The dataset with the columns `language`, a code or `UNKNOWN`, and `task`, for a multilingual model.

    Args:
        language: of all rows; None: as a column `language` says.
        task: of all rows; None: as a column `task` says, or transcribe.
        name: of the dataset, in messages.

    Raises `UserError` if such a column holds anything but names.
    """
    given = {"language": language, "task": task}
    kinds = {
        column: dataset.features[column]
        for column, value in given.items()
        if value is None and column in dataset.column_names
    }
    for column, kind in kinds.items():
        if not isinstance(kind, ClassLabel) and kind != Value("string"):
            raise UserError(f"{name}: the column {column!r} holds {kind}, not names: give --{column}")
    spoken = functools.partial(_spoken, given=given, kinds=kinds)
    if isinstance(dataset, IterableDataset):
        features = Features(dict(dataset.features) | {column: Value("string") for column in given})
        return dataset.map(spoken, features=features)
    rows = dataset.select_columns(list(kinds)) if kinds else [{}] * len(dataset)
    found = [spoken(row) for row in rows]
    if "task" in kinds and found and not any(row["task"] in TASKS for row in found):
        raise UserError(
            f"{name}: the column 'task' says {found[0]['task']!r}, and in no row {' or '.join(TASKS)}: give --task "
            "transcribe, which overrules it"
        )
    if "language" in kinds and not any(row["language"] for row in found):
        raise UserError(f"{name}: the column 'language' is empty in all rows: give --language")
    for column in given:
        dataset = replace_column(dataset, column, [row[column] for row in found])
    return dataset


def _spoken(row: Mapping[str, Any], given: dict[str, str | None], kinds: dict[str, Any]) -> dict[str, str]:
    values = dict(given)
    for column, kind in kinds.items():
        value = row[column]
        values[column] = kind.int2str(value) if isinstance(kind, ClassLabel) and value is not None else value
    return {
        "language": language_code((values["language"] or "").strip()) or UNKNOWN,
        "task": (values["task"] or "").strip().lower() or "transcribe",
    }


def without_language(dataset: Dataset | IterableDataset, name: str = "the dataset") -> Dataset | IterableDataset:
    """The dataset for an English-only model."""
    there = [column for column in ("language", "task") if column in dataset.column_names]
    if there:
        logger.warning("%s: the model knows English only; the columns %s don't count", name, ", ".join(there))
    return dataset.remove_columns(there)
