"""A few optimizer steps of a run, by its own trainer, which are measured.

The student that they have trained isn't kept.
"""

import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..config import ASKDConfig
from ..data import SpeechStream
from ..evaluation.latency import synchronized_time
from ..evaluation.memory import process_peak_bytes
from ..hub.upload import Repository
from ..trainer import ASKDTrainer
from ..training.run_callbacks import StepClock

STEPS = 3  # measured in each phase


def measuring_config(config: ASKDConfig, phases: Sequence[str]) -> ASKDConfig:
    """Return a config for `STEPS` steps in each phase of a run, without evaluation, checkpoints and logs.

    Args:
        config: its `output_dir` is temporary.
        phases: names of `BlendSchedule.phases`.
    """
    short = copy.copy(config)
    short.max_steps = STEPS * len(phases)
    if phases[0] == "teacher":
        short.teacher_phase_ratio = 1.0 / len(phases)
    if short.teacher_schedule == "adaptive":  # it would measure the held-out clips before every step
        short.teacher_schedule = "linear"
    short.eval_strategy, short.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    short.logging_strategy = IntervalStrategy.NO
    short.logging_first_step = short.eval_on_start = short.load_best_model_at_end = False
    short.early_stopping_patience = None
    short.report_to, short.disable_tqdm = [], True
    return short


class Measured(NamedTuple):
    """What was measured in the steps.

    Attributes:
        step_seconds: median seconds of a step, by phase.
        evaluation_seconds: of a batch; None if nothing is evaluated.
        batch_size: the one that fits, with `auto_find_batch_size`.
        trained_parameters: number of weights that are trained.
        checkpoint_bytes: size of a checkpoint.
        peak_bytes: peak memory of the process; None if unknown.
    """

    step_seconds: dict[str, float]
    evaluation_seconds: float | None
    batch_size: int
    trained_parameters: int
    checkpoint_bytes: int
    peak_bytes: int | None


class MeasuringTrainer(ASKDTrainer):
    """An `ASKDTrainer` with the config of `measuring_config`. It saves and pushes nothing.

    Attributes:
        repository: that the run would publish to; None without `--push_to_hub`.
        clock: measures the steps.
    """

    repository: Repository | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock = StepClock()
        self.add_callback(self.clock)
        self.remove_callback(self.stop)  # Ctrl-C stops at once, as there is nothing to save

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Look up the repository. Raise `UserError` if the run couldn't create it or push to it."""
        self.repository = self.publisher.find_repository()
        self.hub_model_id = self.repository.repo_id

    def measure(self, phases: Sequence[str], clips: Dataset | None) -> Measured:
        """Train `STEPS` steps in each phase, and measure.

        Args:
            clips: a batch of evaluation clips.
        """
        logging.disable(logging.WARNING)  # such as that the teacher phase is over
        try:
            step_seconds = self._step_seconds(phases)
            evaluation_seconds = None if clips is None else self._evaluation_seconds(clips)
        finally:
            logging.disable(logging.NOTSET)
        return Measured(
            step_seconds,
            evaluation_seconds,
            self._train_batch_size,
            sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            self._checkpoint_bytes(),
            process_peak_bytes(self.args.device),
        )

    def _step_seconds(self, phases: Sequence[str]) -> dict[str, float]:
        """Train, and return the median seconds of a step by phase.

        With workers that prepare the batches a step takes at least as long as they do: in three steps, batches are
        there already that were prepared before.
        """
        self.train()
        waiting = self._loading_seconds() * self.args.gradient_accumulation_steps
        chunks = [self.clock.seconds[i * STEPS : (i + 1) * STEPS] for i in range(len(phases))]
        return {name: max(median(chunk), waiting) for name, chunk in zip(phases, chunks, strict=True)}

    def _loading_seconds(self) -> float:
        """Return the seconds in which the workers together prepare a batch; 0 without workers or for a stream."""
        if not self.args.dataloader_num_workers or isinstance(self.train_dataset, SpeechStream):
            return 0.0
        dataset = self._seeded_dataset or self.train_dataset
        self.data_collator([dataset[0]])  # the first call is slower
        start = time.perf_counter()
        self.data_collator([dataset[i] for i in range(min(len(dataset), self._train_batch_size))])
        return (time.perf_counter() - start) / self.args.dataloader_num_workers

    def _evaluation_seconds(self, clips: Dataset) -> float:
        """Return the seconds in which a batch is evaluated, if the transcripts generated are as long as the labels.

        Until the student is trained it may generate up to the limit.
        """
        self.model.eval()
        start = synchronized_time(self.args.device)
        batch = self.collator_of_evaluation()(list(clips))
        longest = batch["labels"].shape[1] + 1
        self.prediction_step(self.model, batch, not self.args.predict_with_generate, max_length=longest)
        return synchronized_time(self.args.device) - start

    def _checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint after the steps: weights, optimizer, self-teacher and processor."""
        parameters = self.model.parameters()
        weights = [p for p in parameters if p.requires_grad or self.adapter is None]
        optimizer: Any = self.optimizer
        moments = [value for state in optimizer.state.values() for value in state.values()]
        if self.args.save_only_model:
            moments = []
        averages = [] if self.blend.self_teacher is None else self.blend.self_teacher.parameters.values()
        tensors = [value for value in (*weights, *moments, *averages) if isinstance(value, Tensor)]
        files = Path(self.args.output_dir) / "processor"
        self.processing_class.save_pretrained(files)
        return sum(tensor.nbytes for tensor in tensors) + sum(file.stat().st_size for file in files.iterdir())
