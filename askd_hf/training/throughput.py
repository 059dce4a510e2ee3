"""The callback that measures the training speed."""

import contextlib
import time
from collections.abc import Iterator

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import ASKDConfig


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
