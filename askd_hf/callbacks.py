"""The callbacks of a run: the blend of teacher and self-teacher, the graceful and the early stop, the throughput."""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import ASKDConfig
from .data import DrawnRows
from .schedule import UNKNOWN, BlendSchedule, BlendState, BlendWeights, LabelsJudged
from .self_teacher import SELF_TEACHERS, SelfTeacher

logger = logging.getLogger(__name__)

BLEND_STATE_FILE = "blend_state.json"
SELF_TEACHER_FILE = "self_teacher.safetensors"


def data_epoch(args: ASKDConfig, state: TrainerState, train_dataloader: DataLoader) -> int:
    """The epoch of the data, from the step and not from an event: on_epoch_begin comes again when a run is resumed.

    From whole numbers: `state.epoch` is a fraction of batches, and not exact.
    """
    steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    return state.global_step // max(steps, 1)


def read_blend_state(file: Path) -> BlendState:
    """What `AdaptiveBlendCallback.save` wrote. Raises ValueError or TypeError for anything else."""
    state = BlendState(**json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(state.options, dict):
        raise TypeError(f"{file}: options")
    return state


class AdaptiveBlendCallback(TrainerCallback):
    """Drives the blend: the only owner of its weights, its saved state and the self-teacher.

    Attributes:
        weights: of the update under way; labels only before training.
        options: what the run is (`askd_hf.run_settings`), which its checkpoints note. The trainer sets them.
        state: what the weights depend on besides the step.
        self_teacher: None while the weight on it is 0.
    """

    def __init__(
        self, config: ASKDConfig, judge_labels: Callable[[], LabelsJudged] | None = None, held_out_clips: int = 0
    ):
        self.config = config
        self.options: dict[str, Any] = {}
        self._judge_labels = judge_labels
        self._held_out_clips = held_out_clips
        self.schedule = self._schedule(total_steps=0)
        self.state = BlendState()
        self.weights = BlendWeights()
        self.self_teacher: SelfTeacher | None = None
        self._loaded_self_teacher: dict[str, Tensor] | None = None

    def _schedule(self, total_steps: int) -> BlendSchedule:
        names = BlendSchedule.__dataclass_fields__.keys() - {"total_steps"}
        return BlendSchedule(total_steps=total_steps, **{name: getattr(self.config, name) for name in names})

    def needs_teacher(self, step: int) -> bool:
        """Whether the teacher has, or may have, any weight at `step` or later."""
        return step < self.schedule.teacher_end(self.state)

    # ---- the training loop's events ----

    def on_train_begin(
        self,
        args: ASKDConfig,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: DataLoader,
        **kwargs,
    ):
        self.schedule = self._schedule(state.max_steps)
        if state.global_step == 0:  # also when training starts over with a smaller batch (auto_find_batch_size)
            self.state, self.self_teacher = BlendState(), None
            if self._held_out_clips:
                self.state.labels_upheld = UNKNOWN
        self.state.options = self.options
        self._begin_step(args, state, model, train_dataloader)
        if state.is_world_process_zero:
            print(self.schedule.table(), flush=True)

    def on_step_begin(
        self,
        args: ASKDConfig,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: DataLoader,
        **kwargs,
    ):
        self._follow_held_out(state.global_step)
        self._begin_step(args, state, model, train_dataloader)

    def _follow_held_out(self, step: int) -> None:
        """Let an adaptive schedule look at held-out clips when it is time; after its phase do without the teacher."""
        if self.config.teacher_schedule != "adaptive":
            return
        if self._held_out_clips and self.schedule.is_measured(step, self.state):
            share = min(1.0, self.schedule.measured_every / self.config.adaptive_window)
            self.state.observe(self._judge_labels(), share)
        if step >= self.schedule.planned_end and self.state.labels_credit == 1.0:
            self.state.teacher_gone = True

    def _begin_step(
        self, args: ASKDConfig, state: TrainerState, model: nn.Module, train_dataloader: DataLoader
    ) -> None:
        self.weights = self.schedule.weights(state.global_step, self.state)
        if not self.weights.self:
            return
        epoch = data_epoch(args, state, train_dataloader)
        if self.self_teacher is None:
            self.self_teacher = SELF_TEACHERS[self.config.self_teacher](model, self.config.self_ema_decay)
            if self._loaded_self_teacher is not None:
                self.self_teacher.load(self._loaded_self_teacher)
                self._loaded_self_teacher = None
            else:
                self.state.snapshot_epoch = epoch
        if self.config.self_refresh == "epoch" and epoch > self.state.snapshot_epoch:
            self.self_teacher.at_new_epoch(model)
            self.state.snapshot_epoch = epoch

    def on_step_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs):
        if self.self_teacher is not None:
            self.self_teacher.after_update(model)

    # ---- checkpoints ----

    def save(self, directory: Path) -> None:
        """Write the state and the self-teacher into a checkpoint's directory."""
        text = json.dumps(asdict(self.state), indent=2, ensure_ascii=False)
        (directory / BLEND_STATE_FILE).write_text(text + "\n", encoding="utf-8")
        if self.self_teacher is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self.self_teacher.parameters.items()}
            save_file(tensors, directory / SELF_TEACHER_FILE)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, in a checkpoint that is whole (`askd_hf.checkpoint`)."""
        self.state = read_blend_state(directory / BLEND_STATE_FILE)
        self.self_teacher = self._loaded_self_teacher = None
        if (directory / SELF_TEACHER_FILE).is_file():
            self._loaded_self_teacher = load_file(directory / SELF_TEACHER_FILE)


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

    def note(self, start: float) -> None:
        """The batches of an update, asked for at `start` (of `time.perf_counter`), are here."""
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


class DrawsCallback(TrainerCallback):
    """Tells the rows which epoch begins, or goes on; before its loader starts its workers."""

    def __init__(self, draws: DrawnRows):
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


def evaluations_since_best(values: list[float], greater_is_better: bool) -> int:
    """How many values came after the best; of equal ones the first is the best."""
    best = max(values) if greater_is_better else min(values)
    return len(values) - 1 - values.index(best)
