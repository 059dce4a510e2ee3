"""The callback that sets the epoch of the training set."""

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..callbacks import data_epoch
from ..config import ASKDConfig
from ..data import SeededDataset


class SetEpochCallback(TrainerCallback):
    """Set the dataset's epoch before the workers start.

    Not by `dataset.set_epoch`: under DDP accelerate calls that of the sampler only.
    """

    def __init__(self, dataset: SeededDataset):
        self.dataset = dataset

    def on_epoch_begin(
        self,
        args: ASKDConfig,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader,
        **kwargs,
    ):
        self.dataset.epoch = data_epoch(args, state, train_dataloader)
