"""The order of the clips in an epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class ResumableLengthGroupedSampler(Sampler[int]):
    """Trainer's sampler for `--train_sampling_strategy group_by_length`, in an order that the epoch alone decides.

    Trainer's draws from the global random state, and before that is restored from a checkpoint: a run resumed in the
    middle of an epoch would see some clips twice and others never.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)
