"""Transcripts as Whisper knows them."""

import logging

from datasets import Dataset

logger = logging.getLogger(__name__)


def normalize_case(dataset: Dataset, text_case: str, name: str) -> Dataset:
    """Squeeze the white space of the column `text`, and lower its case if `text_case` asks for it.

    Whisper's tokenizer splits capitals into about twice as many tokens, and a teacher hardly believes them.

    Args:
        dataset: with a column `text` (string or None).
        text_case: "keep"; "lower"; "auto" lower-cases if not one transcript has a small letter and some have capitals.
        name: the dataset's name in the log.
    """
    texts = [None if text is None else " ".join(text.split()) for text in dataset["text"]]
    if text_case == "auto" and "".join(filter(None, texts)).isupper():
        logger.warning("%s: the transcripts are all in capitals; lower-cased (--text_case keep leaves them)", name)
        text_case = "lower"
    if text_case == "lower":
        texts = [text and text.lower() for text in texts]
    return replace_column(dataset, "text", texts)


def replace_column(dataset: Dataset, name: str, values: list) -> Dataset:
    """The dataset with the column `name` set to `values`, at its end."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, values)
