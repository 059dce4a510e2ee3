"""The callback that tells the training rows the epoch."""

import logging

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..callbacks import data_epoch
from ..config import ASKDConfig
from ..data import SeededDataset

logger = logging.getLogger(__name__)


class SetEpochCallback(TrainerCallback):
    """Tells the rows which epoch begins, or goes on; before its loader starts its workers."""

    def __init__(self, draws: SeededDataset):
        self.draws = draws

    def on_epoch_begin(
        self,
        args: ASKDConfig,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader,
        **kwargs,
    ):
        self.draws.epoch = data_epoch(args, state, train_dataloader)
