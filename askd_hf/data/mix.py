"""Several sets of speech as one: with equal columns, in chosen shares."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets

from ..errors import UserError
from .columns import AUDIO_FILE, CHECKED, COLUMNS, refuse_arrays, with_features

STREAMED = Features(COLUMNS | {"audio": AUDIO_FILE})


def with_equal_columns(datasets: list[Dataset]) -> list[Dataset]:
    """Checked datasets with `COLUMNS`, `CHECKED`, and what else all of them have. No audio is copied.

    Raises `UserError` for audio that isn't files.
    """
    for dataset in datasets:
        refuse_arrays(dataset.features["audio"], dataset[0]["clip"], "mixed with other speech")
    first, *others = (dataset.features for dataset in datasets)
    common = {name: kind for name, kind in first.items() if all(other.get(name) == kind for other in others)}
    wanted = Features(common | COLUMNS | CHECKED)
    return [with_features(dataset, wanted) for dataset in datasets]


def as_stream(dataset: IterableDataset) -> IterableDataset:
    """A stream with `COLUMNS` alone."""
    return dataset.map(_row, remove_columns=dataset.column_names, features=STREAMED)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in COLUMNS}


def mix(datasets: list[Dataset], weights: list[float], seed: int) -> Dataset:
    """One dataset of several of `filter_invalid_clips`.

    Args:
        weights: their shares: it lasts until every clip of all is in it, those of the others repeatedly. None: every
            clip is in it once.
    """
    if len(datasets) == 1:
        return datasets[0]
    datasets = with_equal_columns(datasets)
    if not weights:
        return concatenate_datasets(datasets)
    return interleave_datasets(datasets, _shares(weights), seed=seed, stopping_strategy="all_exhausted")


def with_negatives(dataset: Dataset, no_speech_dataset: Dataset, share: float, seed: int) -> Dataset:
    """The dataset and so many rows of `negatives`, if need be repeatedly, that they are the `share` of the whole."""
    number = max(round(len(dataset) * share / (1.0 - share)), 1)
    order = np.random.default_rng(seed).permutation(len(no_speech_dataset))
    chosen = no_speech_dataset.select(np.resize(order, number))
    return concatenate_datasets(with_equal_columns([dataset, chosen]))


def _shares(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@dataclass
class SpeechStream:
    """Rows of several streams for ever, epoch after epoch, always in the order that the seed decides.

    A row stands at the same place in every run, whatever becomes of it: so a run that is resumed passes over as many
    rows as it has trained on, without decoding them.

    Attributes:
        datasets: of `as_stream`.
        weights: their shares: an epoch lasts until every clip of all has come, those of the others repeatedly. None:
            they take turns, and every clip comes once.
        buffer: rows of a dataset from which the next is drawn.
        negatives: mixed in with the `share`, repeatedly.
        on_bad_audio: "error": a row that can't be used ends the run. "skip": it is left out.
        held_out: the names of clips that never come.
    """

    datasets: list[IterableDataset]
    weights: list[float] = field(default_factory=list)
    seed: int = 0
    buffer: int = 1000
    no_speech_dataset: IterableDataset | None = None
    share: float = 0.0
    on_bad_audio: str = "error"
    held_out: frozenset[str] = frozenset()

    def __getitem__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row itself: what a sampler draws from a stream is the row and not a number."""
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each with its `draw`: seed, epoch, and number in the epoch.

        Raises `UserError` if there are none.
        """
        epoch = 0
        while True:
            number = -1
            for number, row in enumerate(self._epoch(epoch)):
                if row["clip"] not in self.held_out:
                    yield {**row, "draw": (self.seed, epoch, number)}
            if number < 0:
                raise UserError("the stream of speech has no rows")
            epoch += 1

    def hold_out(self, share: float, among: int) -> tuple["SpeechStream", list[dict[str, Any]], int]:
        """The stream without some of its clips, these as rows, and among how many clips they were chosen.

        They are the `share` of those with speech in the first `among` rows, or in the first epoch if that is shorter.
        """
        first = {row["clip"]: row for row in itertools.islice(self._epoch(0), among) if not row["negative"]}
        chosen = sorted(np.random.default_rng(0).permutation(list(first))[: int(share * len(first))].tolist())
        rows = [{**first[clip], "draw": (self.seed, 0, number)} for number, clip in enumerate(chosen)]
        return replace(self, held_out=frozenset(chosen)), rows, len(first)

    def _epoch(self, epoch: int) -> IterableDataset:
        # seeds of our own: whether `IterableDataset.set_epoch` reaches the buffers and shards of the parts of an
        # interleaved dataset differs between versions of `datasets`
        seeds = np.random.default_rng([self.seed, epoch]).integers(2**31, size=len(self.datasets) + 3).tolist()
        parts = [
            dataset.shuffle(seed=seed, buffer_size=self.buffer)
            for dataset, seed in zip(self.datasets, seeds, strict=False)
        ]
        speech = parts[0]
        if len(parts) > 1 and self.weights:
            speech = interleave_datasets(
                parts, _shares(self.weights), seed=seeds[-1], stopping_strategy="all_exhausted"
            )
        elif len(parts) > 1:
            speech = interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        if self.no_speech_dataset is None:
            return speech
        no_speech_dataset = self.no_speech_dataset.shuffle(seed=seeds[-2], buffer_size=self.buffer)
        shares = [1.0 - self.share, self.share]
        return interleave_datasets(
            [speech, no_speech_dataset], shares, seed=seeds[-3], stopping_strategy="all_exhausted"
        )
