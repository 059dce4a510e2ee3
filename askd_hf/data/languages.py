"""Which language is spoken in a row of speech, and what is to be made of it."""

import functools
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from .text import replace_column


def language_code(language: str | None) -> str | None:
    """`fr` for `French`; what isn't a name is a code already."""
    return language and TO_LANGUAGE_CODE.get(language.lower(), language.lower())


def with_language(
    dataset: Dataset | IterableDataset, language: str | None, task: str | None
) -> Dataset | IterableDataset:
    """The dataset with the columns `language`, a code, and `task`, for a multilingual model.

    Args:
        language: of all rows; None: as a column `language` says, or unknown.
        task: of all rows; None: as a column `task` says, or transcribe.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(functools.partial(_spoken, language=language, task=task))
    rows = len(dataset)
    given = dataset["language"][:] if "language" in dataset.column_names and not language else [language] * rows
    tasks = dataset["task"][:] if "task" in dataset.column_names and not task else [task] * rows
    dataset = replace_column(dataset, "language", [language_code(name) for name in given])
    return replace_column(dataset, "task", [name or "transcribe" for name in tasks])


def _spoken(row: Mapping[str, Any], language: str | None, task: str | None) -> dict[str, str | None]:
    return {
        "language": language_code(language or row.get("language")),
        "task": task or row.get("task") or "transcribe",
    }


def without_language(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The dataset for an English-only model."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(_unspoken)
    return dataset.remove_columns([name for name in ("language", "task") if name in dataset.column_names])


def _unspoken(row: Mapping[str, Any]) -> dict[str, None]:
    return {"language": None, "task": None}
