"""Mix several speech datasets into one with the same columns."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets

from .columns import AUDIO_FILE, COLUMNS, VALIDATION_COLUMNS, require_audio_files, with_features

STREAMED = Features(COLUMNS | {"audio": AUDIO_FILE})


def with_equal_columns(datasets: list[Dataset]) -> list[Dataset]:
    """Return validated datasets with `COLUMNS`, `VALIDATION_COLUMNS` and the other columns that all of them have.

    No audio is copied. Raises `UserError` unless the audio is stored as files.
    """
    for dataset in datasets:
        require_audio_files(dataset.features["audio"], dataset[0]["clip"], "mix")
    first, *others = (dataset.features for dataset in datasets)
    common = {name: kind for name, kind in first.items() if all(other.get(name) == kind for other in others)}
    wanted = Features(common | COLUMNS | VALIDATION_COLUMNS)
    return [with_features(dataset, wanted) for dataset in datasets]


def select_training_columns(dataset: IterableDataset) -> IterableDataset:
    """Return the stream with exactly the columns `COLUMNS`; a missing one is None."""
    return dataset.map(_training_row, remove_columns=dataset.column_names, features=STREAMED)


def _training_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in COLUMNS}


def mix(datasets: list[Dataset], probabilities: list[float], seed: int) -> Dataset:
    """Mix datasets returned by `filter_invalid_clips`.

    Args:
        probabilities: sampling probability of each dataset, normalized to a sum of 1. Clips are repeated until all
            clips of all datasets are included (`stopping_strategy="all_exhausted"`). Empty to concatenate them.
    """
    if len(datasets) == 1:
        return datasets[0]
    datasets = with_equal_columns(datasets)
    if not probabilities:
        return concatenate_datasets(datasets)
    return interleave_datasets(datasets, normalized(probabilities), seed=seed, stopping_strategy="all_exhausted")


def with_no_speech(dataset: Dataset, no_speech_dataset: Dataset, probability: float, seed: int) -> Dataset:
    """Append random clips of `no_speech_dataset`, repeated if necessary, up to a share `probability` of the result."""
    number = max(round(len(dataset) * probability / (1.0 - probability)), 1)
    order = np.random.default_rng(seed).permutation(len(no_speech_dataset))
    chosen = no_speech_dataset.select(np.resize(order, number))
    return concatenate_datasets(with_equal_columns([dataset, chosen]))


def normalized(probabilities: list[float]) -> list[float]:
    return [probability / sum(probabilities) for probability in probabilities]
