"""Transcripts as Whisper knows them."""

import functools
import logging
from collections.abc import Callable

from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

LOOKED_AT = 100  # transcripts of a stream that decide about its case


def clean_texts(
    dataset: Dataset | IterableDataset, text_case: str, name: str, normalize: Callable[[str], str] | None = None
) -> Dataset | IterableDataset:
    """Squeeze the white space of the column `text`, lower its case if `text_case` asks for it, and normalise it.

    Whisper's tokenizer splits capitals into about twice as many tokens, and a teacher hardly believes them.

    Args:
        dataset: with a column `text` (string or None).
        text_case: "keep"; "lower"; "auto" lower-cases if not one transcript has a small letter and some have capitals;
            of a stream the first `LOOKED_AT` decide.
        name: the dataset's name in the log.
        normalize: a text normaliser.
    """
    streamed = isinstance(dataset, IterableDataset)
    if text_case == "auto":
        texts = (row["text"] for row in dataset.take(LOOKED_AT)) if streamed else dataset["text"]
        if "".join(filter(None, texts)).isupper():
            logger.warning("%s: the transcripts are all in capitals; lower-cased (--text_case keep leaves them)", name)
            text_case = "lower"
    clean = functools.partial(_clean, lower=text_case == "lower", normalize=normalize)
    if streamed:
        return dataset.map(functools.partial(_clean_row, clean=clean))
    return replace_column(dataset, "text", [clean(text) for text in dataset["text"]])


def _clean(text: str | None, lower: bool, normalize: Callable[[str], str] | None) -> str | None:
    if text is None:
        return None
    text = text if normalize is None else normalize(text)
    return " ".join((text.lower() if lower else text).split())


def _clean_row(row: dict, clean: Callable[[str | None], str | None]) -> dict:
    return {"text": clean(row["text"])}


def replace_column(dataset: Dataset, name: str, values: list) -> Dataset:
    """The dataset with the column `name` set to `values`, at its end."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, values)
