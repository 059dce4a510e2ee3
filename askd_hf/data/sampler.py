"""The order of the clips in an epoch."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


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
