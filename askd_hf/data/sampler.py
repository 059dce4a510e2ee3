"""The order of the clips, and what is drawn for each of them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from .mix import SpeechStream


class ResumableLengthGroupedSampler(Sampler[int]):
    """Trainer's sampler for `--train_sampling_strategy group_by_length`, in an order that the epoch alone decides.

    Trainer's draws from the global random state, and before that is restored from a checkpoint: a run resumed in the
    middle of an epoch would see some clips twice and others never.

    Args:
        epoch: gives the epoch that begins, or goes on. Not `set_epoch`, which accelerate's batch sampler of several
            processes doesn't pass on.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]):
        self.batch_size, self.seed, self.epoch = sampler.batch_size, seed, epoch
        self.lengths = list(sampler.lengths)  # a column of `datasets` takes 50 us an element

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator))


class StreamSampler(Sampler[Mapping[str, Any]]):
    """The first `number` rows of a stream, drawn in the main process; its workers decode them.

    So their order doesn't depend on the workers, and batches of a resumed run are passed over before they are made.
    """

    def __init__(self, stream: SpeechStream, number: int):
        self.stream, self.number = stream, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return itertools.islice(self.stream.rows(), self.number)


def stream_sampler(stream: SpeechStream, args: TrainingArguments, train_batch_size: int) -> StreamSampler:
    """The rows of a whole run.

    Args:
        train_batch_size: clips per process and micro-batch.
    """
    rows_per_step = train_batch_size * args.gradient_accumulation_steps * args.world_size
    return StreamSampler(stream, args.max_steps * rows_per_step)


class SeededDataset(Dataset):
    """The rows of `dataset`, each with what its random choices are drawn from: the seed, the epoch, its number.

    `epoch` is to be set before the loader of an epoch starts its workers.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.dataset[row], "draw": (self.seed, self.epoch, row)}
