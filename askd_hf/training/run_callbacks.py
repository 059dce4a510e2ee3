"""The callbacks of a run besides `AdaptiveBlendCallback`: stopping, the speed, the epoch of the training set."""

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from ..callbacks import data_epoch
from ..config import ASKDConfig
from ..data import SeededDataset
from ..evaluation.latency import synchronized_time
from ..hub.training_summary import has_lost_patience
from ..schedule import BlendState
from .smaller_batch import random_states, set_random_states

logger = logging.getLogger(__name__)

# On GPUs an exchange of the stop signal synchronizes the device, so it happens at most every MOST_UPDATES updates or
# about every MOST_SECONDS. Slurm kills a job 30 s after SIGTERM; the checkpoint must be written by then.
MOST_UPDATES, MOST_SECONDS = 8, 2.0
STOPPING = (signal.SIGINT, signal.SIGTERM)


def keep_workers(loader: Any) -> None:
    """Make the workers of a loader of accelerate ignore Ctrl-C and SIGTERM, and end with the loader.

    A terminal and torchrun signal all processes of a group, and torch's handler would end the workers: the run would
    fail before its checkpoint.
    """
    loader = loader.base_dataloader
    loader.worker_init_fn = partial(_begin_worker, loader.worker_init_fn)


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    if begin is not None:
        begin(worker)


def updates_between_exchanges(seconds: float) -> int:
    """Return the number of updates until the next exchange, for the seconds that an update takes."""
    return max(1, min(MOST_UPDATES, math.floor(MOST_SECONDS / seconds)))


class EvaluationAbandoned(Exception):
    """A signal was received during an evaluation."""


class StopGracefullyCallback(TrainerCallback):
    """On Ctrl-C or SIGTERM, finish the current update, save a checkpoint and stop. A second Ctrl-C stops immediately.

    Nothing is evaluated, as that may take longer than a job has left: an evaluation ends after the current batch. A
    resumed run makes the evaluation first.

    Attributes:
        stopped: whether training was stopped before its last step.
        evaluation_due: whether the run would have been evaluated after the step at which it was stopped.
        requested: whether a signal was received.
    """

    def __init__(self):
        self.stopped = False
        self.evaluation_due = False
        self.requested = False
        self._evaluating = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._next_exchange = 0  # update after which the processes tell each other of a signal
        self._last_exchange: tuple[int, float] | None = None  # update, time

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked process inherits the handler
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        when = "in the evaluation" if self._evaluating else "after this update"
        print(f"\nstopping {when}, with a checkpoint (press Ctrl-C again to stop immediately)", flush=True)

    def on_train_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopped = self.evaluation_due = self.requested = False
        self._next_exchange, self._last_exchange = 0, None
        self._process = os.getpid()
        self.restore()  # after a start with a larger batch (auto_find_batch_size), which didn't end
        try:
            self._previous = {s: signal.signal(s, self._request) for s in STOPPING}
        except ValueError:  # only the main thread can set handlers
            self._previous = {}

    def on_step_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        requested = self.requested
        if args.world_size > 1:  # all processes must stop at the same update
            if state.global_step < self._next_exchange:
                return
            requested = self._exchange(args, state.global_step)
        if requested and state.global_step < state.max_steps:
            self.stopped = True
            ends_epoch = args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch).is_integer()
            self.evaluation_due = control.should_evaluate or (ends_epoch and args.eval_delay <= state.epoch)
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def is_due(self, saved: BlendState, args: ASKDConfig) -> bool:
        """Return whether the evaluation must be made that was due when the resumed run was stopped."""
        return saved.evaluation_due and args.eval_strategy != IntervalStrategy.NO and not self.stopped

    @contextlib.contextmanager
    def evaluating(self, state: TrainerState, control: TrainerControl) -> Iterator[None]:
        """Abandon the evaluation inside when a signal is received, forget its metrics, and stop with a checkpoint.

        Not before the first step, when there is nothing to save.
        """
        logged, random = len(state.log_history), random_states()
        self._evaluating = state.global_step > 0
        try:
            yield
        except EvaluationAbandoned:
            del state.log_history[logged:]
            set_random_states(random)  # the resumed run begins the evaluation anew
            self.stopped = self.evaluation_due = True
            control.should_save = control.should_training_stop = True
        finally:
            self._evaluating = False

    def check_evaluation(self, args: ASKDConfig) -> None:
        """Raise `EvaluationAbandoned` in all processes if any has received a signal. All must call it."""
        if not self._evaluating:
            return
        requested = self.requested
        if args.world_size > 1:
            flag = torch.tensor(float(requested), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            requested = bool(flag.item())
        if requested:
            raise EvaluationAbandoned

    def _exchange(self, args: ASKDConfig, step: int) -> bool:
        """Return whether any process has received a signal, and set the update of the next exchange, as in all."""
        now = time.monotonic()
        last_step, last_time = self._last_exchange or (step, now)
        seconds = (now - last_time) / max(step - last_step, 1) or math.inf
        self._last_exchange = step, now
        values = torch.tensor([float(self.requested), seconds], device=args.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        requested, seconds = values.tolist()
        seldom = args.device.type != "cpu"
        self._next_exchange = step + (updates_between_exchanges(seconds) if seldom else 1)
        return bool(requested)

    def on_epoch_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.stopped:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}


class LogLastStepCallback(TrainerCallback):
    """Log the last step too, if the number of steps isn't a multiple of `logging_steps`."""

    def on_step_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_log = True


class StopEarlyCallback(TrainerCallback):
    """Stop if `metric_for_best_model` has not improved in the last `early_stopping_patience` evaluations.

    The evaluations are counted in the saved log history. The counter of transformers' `EarlyStoppingCallback` isn't
    exact when a run is resumed, even with `restore_callback_states_from_checkpoint`: it restores the patience of the
    checkpoint and ignores the option, starts at 0 for checkpoints without a counter, and isn't reset when
    `auto_find_batch_size` restarts training. It also logs a warning at every evaluation split but one.
    """

    def on_train_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step < state.max_steps and has_lost_patience(args, state):
            logger.warning(
                "this run was stopped early at step %d: to train it further, raise --early_stopping_patience above %d",
                *(state.global_step, args.early_stopping_patience),
            )
            control.should_training_stop = True

    def on_evaluate(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        # several splits are several calls; a run that ends here anyway isn't stopped
        if not control.should_training_stop and has_lost_patience(args, state):
            logger.warning(
                "step %d: stopping, as %s has not improved in %d evaluations",
                *(state.global_step, args.metric_for_best_model, args.early_stopping_patience),
            )
            control.should_training_stop = True


class ThroughputCallback(TrainerCallback):
    """Measure the time of the steps, and the part of it that is spent waiting for batches.

    Under DDP that includes waiting for the batches of other processes. Evaluation, logging and saving aren't counted.
    """

    def __init__(self):
        self._step_start: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all measurements."""
        self._waited = self._stepped = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time of fetching an update's batches, which starts its step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start
            self._step_start = start

    def on_step_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self._stepped += time.perf_counter() - self._step_start
        self._steps += 1

    def measured(self, args: ASKDConfig, state: TrainerState) -> dict[str, float]:
        """Return the measurements since the last call, and forget them; empty without a step.

        `data_time_ratio` is the share of the time spent waiting for batches, 0 to 1. `samples_per_second` counts the
        clips of all processes.
        """
        if not self._stepped:
            return {}
        clips = self._steps * state.train_batch_size * args.gradient_accumulation_steps * args.world_size
        values = dict(data_time_ratio=self._waited / self._stepped, samples_per_second=clips / self._stepped)
        self.reset()
        return values


class StepClock(TrainerCallback):
    """Measure the seconds of each step, with the wait for its batches.

    Attributes:
        seconds: of the steps since training began.
    """

    def __init__(self):
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.seconds = []  # also after a restart with a smaller batch (auto_find_batch_size)
        self._last = synchronized_time(args.device)

    def on_step_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        now = synchronized_time(args.device)
        self.seconds.append(now - self._last)
        self._last = now


class SetEpochCallback(TrainerCallback):
    """Set the dataset's epoch before the workers start.

    Not by `dataset.set_epoch`: under DDP accelerate calls that of the sampler only.
    """

    def __init__(self, dataset: SeededDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.dataset.epoch = data_epoch(args, state, kwargs["train_dataloader"])
