"""The callback that measures how fast training is."""

import contextlib
import logging
import time
from collections.abc import Iterator

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import ASKDConfig

logger = logging.getLogger(__name__)


class ThroughputCallback(TrainerCallback):
    """How fast the steps are, and how much of them is waiting for batches, and for other processes to have theirs.

    Evaluation, logging and saving aren't counted.
    """

    def __init__(self):
        self._step_start: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._waited = self._stepped = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of an update's batches, with which its step begins."""
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
        """Of the steps since the last call: `data_wait`, the share spent waiting, 0 to 1; `clips_per_second`, over all
        processes; `hours_left` to the last step at this pace.
        """
        if not self._stepped:
            return {}
        clips = self._steps * state.train_batch_size * args.gradient_accumulation_steps * args.world_size
        left = (state.max_steps - state.global_step) * self._stepped / self._steps
        values = dict(
            data_wait=self._waited / self._stepped, clips_per_second=clips / self._stepped, hours_left=left / 3600
        )
        self.reset()
        return values
