"""Transcripts as Whisper knows them."""

import functools
import logging
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

LOOKED_AT = 100  # transcripts of a stream that decide about its case


def clean_texts(
    dataset: Dataset | IterableDataset, text_case: str, name: str, normalize: Callable[[str], str] | None = None
) -> Dataset | IterableDataset:
    """Squeeze the white space of transcripts, lower their case if `text_case` asks for it, and normalise them.

    Whisper's tokenizer splits capitals into about twice as many tokens, and a teacher hardly believes them.

    Args:
        dataset: with a column `text` (string or None), and perhaps `prompt` and `segments`, cleaned likewise.
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
    columns = [column for column in ("text", "prompt", "segments") if column in dataset.column_names]
    clean_row = functools.partial(_clean_row, columns=columns, clean=clean)
    if streamed:
        return dataset.map(clean_row, features=dataset.features)
    rows = [clean_row(row) for row in dataset.select_columns(columns)]
    for column in columns:
        kind = dataset.features[column]
        dataset = dataset.remove_columns(column).add_column(column, [row[column] for row in rows], feature=kind)
    return dataset


def _clean(text: str | None, lower: bool, normalize: Callable[[str], str] | None) -> str | None:
    if text is None:
        return None
    text = text if normalize is None else normalize(text)
    return " ".join((text.lower() if lower else text).split())


def _clean_row(row: dict, columns: list[str], clean: Callable[[str | None], str | None]) -> dict:
    cleaned = {column: clean(row[column]) for column in columns if column != "segments"}
    if "segments" in columns:
        segments = row["segments"]
        cleaned["segments"] = segments and [segment | {"text": clean(segment["text"])} for segment in segments]
    return cleaned


def replace_column(dataset: Dataset, name: str, values: list | pa.Array) -> Dataset:
    """The dataset with the column `name` set to `values`, at its end. No other column is copied."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    if dataset._indices is None:
        return dataset.add_column(name, values)
    # `add_column` would write all columns of the chosen rows anew, audio included: put the values beside the stored
    # rows instead, so that the mapping of indices finds them
    rows = dataset._indices.column(0).to_numpy()
    place = np.full(len(dataset.data), -1)
    place[rows] = np.arange(len(rows))
    if not np.array_equal(place[rows], np.arange(len(rows))):  # a row that was chosen twice may have two values
        return dataset.add_column(name, values)
    column = pa.array(values).take(pa.array(place, mask=place < 0))
    stored = Dataset(dataset.data, dataset.info, fingerprint=dataset._fingerprint).add_column(name, column)
    return Dataset(stored.data, stored.info, dataset.split, dataset._indices, stored._fingerprint)
