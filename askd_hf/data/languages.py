"""Language and task of rows, and language-dependent properties of texts."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..errors import UserError
from .columns import iterate_rows, replace_column

logger = logging.getLogger(__name__)

TASKS = ("transcribe", "translate")
UNKNOWN = ""  # language of a row without one; the collator raises for it (None: the tokenizer's language)
UNSPACED = ("zh", "ja", "th", "lo", "my", "km", "yue")  # languages without spaces between words
DOTLESS_I = ("tr", "az")  # languages in which I is upper case of ı, and İ of i


def language_code(language: str | None) -> str | None:
    """Return the code of a language name, such as `fr` for `French`. Codes are returned in lower case."""
    return language and TO_LANGUAGE_CODE.get(language.lower(), language.lower())


def lower_case(text: str, language: str | None) -> str:
    """Lower-case a text by the rules of its language: `IŞIK` is `ışık` in Turkish and Azerbaijani.

    `İ` becomes `i` in every language. `str.lower` would add a combining dot, which Whisper doesn't produce.

    Args:
        language: of the text, a code or a name; None for English.
    """
    text = text.replace("I\u0307", "İ").replace("İ", "i")
    return (text.replace("I", "ı") if language_code(language) in DOTLESS_I else text).lower()


def word_separator(language: str | None, task: str | None = None) -> str:
    """Return what precedes the first word of a text and separates two texts: " ", or "" in `UNSPACED` languages.

    Args:
        language: of the audio, a code or a name; None for English.
        task: with "translate" the text is English.
    """
    return "" if task != "translate" and language_code(language) in UNSPACED else " "


def with_language(
    dataset: Dataset | IterableDataset, language: str | None, task: str | None, name: str = "the dataset"
) -> Dataset | IterableDataset:
    """Set the columns `language`, a code or `UNKNOWN`, and `task`, as a multilingual model needs them.

    Args:
        dataset: the result of `load_speech_dataset`, whose columns `language` and `task`, if any, have names or
            class labels.
        language: of all rows; None to use the column `language`.
        task: of all rows; None to use the column `task`, or else "transcribe".

    Raises `UserError` if the column `language` is empty in all rows, or `task` is invalid in all rows.
    """
    fixed = {"language": language, "task": task}
    features = {
        column: dataset.features[column]
        for column, value in fixed.items()
        if value is None and column in dataset.column_names
    }
    normalize = functools.partial(_language_and_task, fixed=fixed, features=features)
    if isinstance(dataset, IterableDataset):
        columns = Features(dict(dataset.features) | {column: Value("string") for column in fixed})
        return dataset.map(normalize, features=columns)
    rows = iterate_rows(dataset.select_columns(list(features))) if features else [{}] * len(dataset)
    values = [normalize(row) for row in rows]
    if "task" in features and values and not any(row["task"] in TASKS for row in values):
        raise UserError(
            f"{name}: column 'task' must be {' or '.join(TASKS)}, got {values[0]['task']!r}; --task transcribe "
            "overrides it"
        )
    if "language" in features and not any(row["language"] for row in values):
        raise UserError(f"{name}: column 'language' is empty in all rows; set --language")
    for column in fixed:
        dataset = replace_column(dataset, column, [row[column] for row in values])
    return dataset


def _language_and_task(
    row: Mapping[str, Any], fixed: dict[str, str | None], features: dict[str, Any]
) -> dict[str, str]:
    values = dict(fixed)
    for column, feature in features.items():
        value = row[column]
        values[column] = feature.int2str(value) if isinstance(feature, ClassLabel) and value is not None else value
    return {
        "language": language_code((values["language"] or "").strip()) or UNKNOWN,
        "task": (values["task"] or "").strip().lower() or "transcribe",
    }


def without_language(dataset: Dataset | IterableDataset, name: str = "the dataset") -> Dataset | IterableDataset:
    """Drop the columns `language` and `task`, with a warning, for an English-only model."""
    present = [column for column in ("language", "task") if column in dataset.column_names]
    if present:
        logger.warning("%s: columns %s are ignored, because the model is English-only", name, ", ".join(present))
    return dataset.remove_columns(present)
