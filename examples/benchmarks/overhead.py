"""A whole run of the trainer, timed from inside: what goes on around its steps."""

import contextlib
import io
import time
from typing import Any

import torch
from steps import SELF_PHASE, Batch
from transformers import TrainerCallback, TrainerState, WhisperForConditionalGeneration

from askd_hf import ASKDConfig, ASKDTrainer
from askd_hf.projection import label_positions

COMPUTING = ("training_step", "clipping", "optimizer")


class Stopwatch:
    """Seconds by name. On a GPU it waits for the work asked for: nothing overlaps, and overhead is overstated."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, name: str, start: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def time_calls(self, owner: object, method: str, name: str) -> None:
        """From now on add the time of every call of `owner.method` to `name`."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.add(name, start)

        setattr(owner, method, timed)


class TimedEvents(TrainerCallback):
    """Times the optimizer, and the run from the step `first` to the step `last`."""

    def __init__(self, watch: Stopwatch, first: int, last: int):
        self.watch, self.first, self.last = watch, first, last
        self.result: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self.watch.seconds.clear()
            self.start = self.watch.now()
        elif state.global_step == self.last:
            self.watch.add("wall", self.start)
            self.result = dict(self.watch.seconds)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before_optimizer = self.watch.now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.watch.add("optimizer", self.before_optimizer)


def train_timed(
    student: WhisperForConditionalGeneration, batches: list[Batch], steps: int, options: dict[str, Any]
) -> dict[str, float]:
    """Seconds by part, and "wall" of all, of `steps` steps of a real run in the self phase with the average."""
    rows = [
        {"encoder_outputs": encoded.cpu(), "labels": labels[labels != -100].cpu()}
        for batch in batches
        for encoded, labels in zip(batch["encoder_outputs"], batch["labels"], strict=True)
    ]
    warm_up = 3
    args = ASKDConfig(
        preset="askd",
        self_teacher="ema",
        max_steps=warm_up + steps + 1,
        per_device_train_batch_size=len(batches[0]["labels"]),
        logging_steps=10,
        **SELF_PHASE,
        **options,
    )
    trainer = ASKDTrainer(model=student, args=args, train_dataset=rows, data_collator=_collate)
    watch = Stopwatch(args.device)
    watch.time_calls(trainer, "get_batch_samples", "reading batches")
    watch.time_calls(trainer, "training_step", "training_step")
    watch.time_calls(trainer, "_clip_grad_norm", "clipping")
    watch.time_calls(trainer.blend, "on_step_end", "self-teacher's average")
    watch.time_calls(trainer, "log", "logging")
    events = TimedEvents(watch, warm_up, warm_up + steps)
    trainer.add_callback(events)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return events.result


def _collate(rows: list[Batch]) -> Batch:
    labels = torch.nn.utils.rnn.pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100)
    encoded = torch.stack([r["encoder_outputs"] for r in rows])
    return {"encoder_outputs": encoded, "labels": labels, "label_positions": label_positions(labels)}
