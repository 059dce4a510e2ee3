"""An infinite stream of rows of several datasets, of which each process reads its share."""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import IterableDataset, interleave_datasets

from ..errors import UserError
from .mix import normalized
from .packing import Packing

logger = logging.getLogger(__name__)

PARTS_OF_A_STREAM = 10  # of a run: what else happens once per epoch happens once per part
MOST_READS = 1.25  # of a row, in an epoch of all processes


def steps_per_part(max_steps: int) -> int:
    """Return the number of updates of a part of a run."""
    return max(max_steps // PARTS_OF_A_STREAM, 1)


@dataclass
class SpeechStream:
    """Infinite stream of rows of several datasets. The order depends only on the seed and the number of processes.

    Each process reads its share of the shards (files, or row groups of a Parquet file). If a dataset has fewer shards
    than there are processes, some processes read the same shard and take turns with its rows. Every epoch has each
    clip once over all processes. As shares differ in size, one process may begin its next epoch before the others.

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
    packing: Packing | None = None  # joins clips to fill the window; None to leave them as they are
    process: int = 0  # index of this process
    processes: int = 1  # number of processes
    # options that change the rows and can't be seen in the fields above; a resumed run must have the same
    options: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `row`: `StreamSampler` yields rows instead of indices, and the data loader looks them up here."""
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of this process with their `rng_key`, `(seed, epoch, number in the epoch)`.

        Keys of different processes differ.

        Raises `UserError` if there are none.
        """
        for epoch in itertools.count():
            rows = self._kept(epoch)
            if self.packing is not None:
                rows = self.packing.pack(rows, (self.seed, epoch, self.process))
            first = next(rows, None)
            if first is None:
                processes = "" if self.processes == 1 else f" for process {self.process} of {self.processes}"
                raise UserError(f"--streaming: the datasets have no rows{processes}")
            yield first
            yield from rows

    def _kept(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of an epoch that aren't held out, with their `rng_key`."""
        for number, row in enumerate(self._epoch(epoch)):
            if row["clip"] not in self.held_out:
                yield {**row, "rng_key": (self.seed, epoch, number * self.processes + self.process)}

    def choose_held_out(self, share: float, among: int) -> tuple[list[dict[str, Any]], int]:
        """Choose clips with speech to hold out.

        Args:
            share: fraction of the candidates to hold out.
            among: the candidates are the clips with speech in the first `among` rows of the first epoch, as a single
                process has them.

        Returns:
            The held-out rows, and the number of candidates.
        """
        whole = replace(self, process=0, processes=1)
        first = {row["clip"]: row for row in itertools.islice(whole._epoch(0), among) if not row["no_speech"]}
        chosen = sorted(np.random.default_rng(0).permutation(list(first))[: int(share * len(first))].tolist())
        rows = [{**first[clip], "rng_key": (self.seed, 0, number)} for number, clip in enumerate(chosen)]
        return rows, len(first)

    def without(self, rows: Iterable[Mapping[str, Any]]) -> "SpeechStream":
        """Return the stream without the clips of these rows."""
        return replace(self, held_out=frozenset(row["clip"] for row in rows))

    def _epoch(self, epoch: int) -> IterableDataset:
        # Shuffle again with new seeds. `IterableDataset.set_epoch` reshuffles only the buffers of interleaved
        # datasets, not the order of their shards, and differs between versions of `datasets`.
        seeds = np.random.default_rng([self.seed, epoch]).integers(2**31, size=len(self.datasets) + 3).tolist()
        parts = [self._share(dataset, seed) for dataset, seed in zip(self.datasets, seeds, strict=False)]
        speech = parts[0]
        if len(parts) > 1 and self.probabilities:
            speech = interleave_datasets(
                parts, normalized(self.probabilities), seed=seeds[-1], stopping_strategy="all_exhausted"
            )
        elif len(parts) > 1:
            speech = interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        if self.no_speech_dataset is None:
            return speech
        no_speech_dataset = self._share(self.no_speech_dataset, seeds[-2])
        probabilities = [1.0 - self.no_speech_probability, self.no_speech_probability]
        return interleave_datasets(
            [speech, no_speech_dataset], probabilities, seed=seeds[-3], stopping_strategy="all_exhausted"
        )

    def _share(self, dataset: IterableDataset, seed: int) -> IterableDataset:
        """Shuffle shards and rows of a dataset, and return those of this process."""
        if self.processes == 1:
            return dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        if dataset.num_shards < self.processes:
            dataset = dataset.reshard()
        shuffled = dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        groups = [process * dataset.num_shards // self.processes for process in range(self.processes)]
        if dataset.num_shards >= self.processes:
            groups = list(range(self.processes))
        # the shards are shuffled by now, so that a process has other ones in every epoch
        share = shuffled.shard(groups[-1] + 1, groups[self.process], contiguous=False)
        members = groups.count(groups[self.process])
        turn = self.process - groups.index(groups[self.process])
        return share if members == 1 else share.filter(lambda row, number: number % members == turn, with_indices=True)


def warn_of_repeated_reads(names: Iterable[str], datasets: Iterable[IterableDataset], processes: int) -> None:
    """Warn of each dataset with so few shards that the processes read its rows more than `MOST_READS` times in all."""
    for name, dataset in zip(names, datasets, strict=True):
        if processes <= MOST_READS * dataset.num_shards:
            continue
        if processes > MOST_READS * (shards := dataset.reshard().num_shards):
            logger.warning(
                "%s has %d shards for %d processes: up to %d processes read the same shard, and each trains on a part "
                "of its rows. Save it in at least %d files, or one Parquet file with as many row groups",
                *(name, shards, processes, math.ceil(processes / shards), processes),
            )
