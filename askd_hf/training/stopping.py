"""Callbacks that end a run before its last step, with a checkpoint."""

import logging
import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import ASKDConfig
from ..hub.training_summary import evaluations_since_best

logger = logging.getLogger(__name__)


class StopGracefullyCallback(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the update under way, with a checkpoint; a second Ctrl-C at once.

    Attributes:
        stopped: whether training ended so, before its last step.
        requested: whether it was asked to.
    """

    def __init__(self):
        self.stopped = False
        self.requested = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader worker has inherited the handler, and ends when its loader does
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this update, with a checkpoint (Ctrl-C again: at once)", flush=True)

    def on_train_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopped = self.requested = False
        self._process = os.getpid()
        try:
            self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's
            self._previous = {}

    def on_step_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        requested = self.requested
        if args.world_size > 1:  # all processes must stop at the same update
            flag = torch.tensor(int(requested), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            requested = bool(flag.item())
        if requested and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.stopped:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Give the signals back; also after an exception in training."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}


class StopEarlyCallback(TrainerCallback):
    """Ends a run whose `metric_for_best_model` hasn't got better in the last `patience` evaluations.

    transformers' own counts evaluations in memory, and begins anew in a run that is resumed; this counts those in the
    saved history.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        values = [row[name] for row in state.log_history if name in row]
        if values and evaluations_since_best(values, args.greater_is_better) >= self.patience:
            logger.warning("step %d: %s was best %d evaluations ago", state.global_step, name, self.patience)
            control.should_training_stop = True
