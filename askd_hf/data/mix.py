"""Mix several speech datasets into one with the same columns, as a `Dataset` or a stream."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets

from ..errors import UserError
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
    return interleave_datasets(datasets, _normalized(probabilities), seed=seed, stopping_strategy="all_exhausted")


def with_no_speech(dataset: Dataset, no_speech_dataset: Dataset, probability: float, seed: int) -> Dataset:
    """Append random clips of `no_speech_dataset`, repeated if necessary, up to a share `probability` of the result."""
    number = max(round(len(dataset) * probability / (1.0 - probability)), 1)
    order = np.random.default_rng(seed).permutation(len(no_speech_dataset))
    chosen = no_speech_dataset.select(np.resize(order, number))
    return concatenate_datasets(with_equal_columns([dataset, chosen]))


def _normalized(probabilities: list[float]) -> list[float]:
    return [probability / sum(probabilities) for probability in probabilities]


@dataclass
class SpeechStream:
    """Infinite stream of rows of several datasets. The order depends only on the seed.

    Invalid rows keep their place in the order, so a resumed run skips the rows it has trained on without decoding.
    """

    datasets: list[IterableDataset]  # results of `select_training_columns`
    # sampling probability of each dataset, normalized to a sum of 1. Clips are repeated until all clips of all
    # datasets have occurred in the epoch. Empty to alternate between the datasets, each clip once.
    probabilities: list[float] = field(default_factory=list)
    seed: int = 0  # of shuffling, sampling and augmentation
    buffer_size: int = 1000  # rows per dataset in the shuffle buffer. Default: 1000.
    # clips without speech, repeated as needed; None for no such clips
    no_speech_dataset: IterableDataset | None = None
    no_speech_probability: float = 0.0  # their share of the rows
    on_bad_audio: str = "error"  # "error" if an invalid row ends the run, "skip" if it is skipped
    held_out: frozenset[str] = frozenset()  # names of clips that are excluded

    def __getitem__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `row`: `StreamSampler` yields rows instead of indices, and the data loader looks them up here."""
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield rows with their `rng_key`, `(seed, epoch, row number in the epoch)`.

        Raises `UserError` if there are none.
        """
        epoch = 0
        while True:
            number = -1
            for number, row in enumerate(self._epoch(epoch)):
                if row["clip"] not in self.held_out:
                    yield {**row, "rng_key": (self.seed, epoch, number)}
            if number < 0:
                raise UserError("--streaming: the datasets have no rows")
            epoch += 1

    def hold_out(self, share: float, among: int) -> tuple["SpeechStream", list[dict[str, Any]], int]:
        """Hold out clips with speech.

        Args:
            share: fraction of the candidates to hold out.
            among: the candidates are the clips with speech in the first `among` rows of the first epoch.

        Returns:
            The stream without the held-out clips, the held-out rows, and the number of candidates.
        """
        first = {row["clip"]: row for row in itertools.islice(self._epoch(0), among) if not row["no_speech"]}
        chosen = sorted(np.random.default_rng(0).permutation(list(first))[: int(share * len(first))].tolist())
        rows = [{**first[clip], "rng_key": (self.seed, 0, number)} for number, clip in enumerate(chosen)]
        return replace(self, held_out=frozenset(chosen)), rows, len(first)

    def _epoch(self, epoch: int) -> IterableDataset:
        # Shuffle again with new seeds. `IterableDataset.set_epoch` reshuffles only the buffers of interleaved
        # datasets, not the order of their shards, and differs between versions of `datasets`.
        seeds = np.random.default_rng([self.seed, epoch]).integers(2**31, size=len(self.datasets) + 3).tolist()
        parts = [
            dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
            for dataset, seed in zip(self.datasets, seeds, strict=False)
        ]
        speech = parts[0]
        if len(parts) > 1 and self.probabilities:
            speech = interleave_datasets(
                parts, _normalized(self.probabilities), seed=seeds[-1], stopping_strategy="all_exhausted"
            )
        elif len(parts) > 1:
            speech = interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        if self.no_speech_dataset is None:
            return speech
        no_speech_dataset = self.no_speech_dataset.shuffle(seed=seeds[-2], buffer_size=self.buffer_size)
        probabilities = [1.0 - self.no_speech_probability, self.no_speech_probability]
        return interleave_datasets(
            [speech, no_speech_dataset], probabilities, seed=seeds[-3], stopping_strategy="all_exhausted"
        )
