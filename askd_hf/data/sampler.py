"""Samplers, and the dataset wrappers that seed the random augmentation of each row and fill the last batches."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from .collator import PADDING
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


class PaddedDataset(Dataset):
    """Make rows from `len(dataset)` on: the first ones again, with `PADDING`, so that they get no labels.

    They fill the last batches of an epoch, of which every process needs the same number. accelerate would repeat
    labeled rows: the update would depend on the number of processes.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        """Return several rows, as PyTorch's data loader asks for them. `datasets` reads them at once."""
        places = [row % len(self) for row in rows]
        whole = hasattr(self.dataset, "__getitems__")
        found = self.dataset.__getitems__(places) if whole else [self.dataset[place] for place in places]
        return [
            {**values, PADDING: True} if row >= len(self) else values for row, values in zip(rows, found, strict=True)
        ]


class PaddedSampler(Sampler[int]):
    """Yield the rows of `sampler`, then further ones of a `PaddedDataset`, up to a multiple of `multiple`."""

    def __init__(self, sampler: Any, multiple: int):
        self.sampler, self.multiple = sampler, multiple

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(len(self.sampler), len(self))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of accelerate's sampler, whose order depends on it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def pad_last_batches(loader: Any) -> None:
    """Fill the last batches of all processes with rows without labels.

    Args:
        loader: of accelerate for several processes, with a `PaddedDataset`.
    """
    shard: BatchSamplerShard = loader.batch_sampler
    batches = shard.batch_sampler
    batches.sampler = PaddedSampler(
        batches.sampler, batches.batch_size * (1 if shard.split_batches else shard.num_processes)
    )
