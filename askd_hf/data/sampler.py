"""Samplers, and the dataset wrapper that seeds the random augmentation of each row."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from .stream import SpeechStream


class ResumableLengthGroupedSampler(Sampler[int]):
    """The sampler of `--train_sampling_strategy group_by_length`, whose order depends only on seed and epoch.

    Trainer's sampler uses the global random state before it is restored from a checkpoint. A run resumed within an
    epoch would train on some clips twice and skip others.

    Args:
        seed: the order is that of `seed + epoch()`.
        epoch: returns the current epoch. `set_epoch` can't be used, because accelerate's batch sampler for several
            processes doesn't forward it.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]):
        self.batch_size, self.seed, self.epoch = sampler.batch_size, seed, epoch
        self.lengths = list(sampler.lengths[:])  # a column of `datasets` takes 20 to 50 us per element

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator))


class StreamSampler(Sampler[Mapping[str, Any] | None]):
    """Yield the first `num_rows` rows of a stream in the main process; workers decode them.

    The order of the rows doesn't depend on the workers, and a resumed run skips rows without decoding them.

    With several processes accelerate gives batch `i` to process `i % processes`. The rows of a stream are those of its
    own process, and the rows of all other batches are None: nothing is read for them.

    Args:
        num_rows: of all processes.
        batch_size: rows per batch. Default: 1.
    """

    def __init__(self, stream: SpeechStream, num_rows: int, batch_size: int = 1):
        self.stream, self.num_rows, self.batch_size = stream, num_rows, batch_size

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[Mapping[str, Any] | None]:
        rows, process, processes = self.stream.rows(), self.stream.process, self.stream.processes
        for number in range(self.num_rows):
            yield next(rows) if number // self.batch_size % processes == process else None


class SeededDataset(Dataset):
    """Add to each row of `dataset` its `rng_key`, `(seed, epoch, row number)`, which seeds its random augmentation.

    Attributes:
        epoch: to be set before the data loader starts the workers of an epoch.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.dataset[row], "rng_key": (self.seed, self.epoch, row)}
