"""The callbacks of a run: the blend of teacher and self-teacher, the graceful and the early stop, the throughput."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import ASKDConfig
from .data import DrawnRows
from .errors import UserError
from .presets import PRESETS
from .schedule import UNKNOWN, BlendSchedule, BlendState, BlendWeights, LabelsJudged
from .self_teacher import SELF_TEACHERS, SelfTeacher

logger = logging.getLogger(__name__)

BLEND_STATE_FILE = "blend_state.json"
SELF_TEACHER_FILE = "self_teacher.safetensors"


def data_epoch(state: TrainerState) -> int:
    """The epoch of the data, from the step and not from an event: on_epoch_begin comes again when a run is resumed."""
    return math.floor((state.epoch or 0.0) + 1e-6)


class AdaptiveBlendCallback(TrainerCallback):
    """Drives the blend: the only owner of its weights, its saved state and the self-teacher.

    Attributes:
        weights: of the update under way; labels only before training.
        state: what the weights depend on besides the step.
        self_teacher: None while the weight on it is 0.
    """

    def __init__(
        self, config: ASKDConfig, judge_labels: Callable[[], LabelsJudged] | None = None, held_out_clips: int = 0
    ):
        self.config = config
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
        self, args: ASKDConfig, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ):
        self.schedule = self._schedule(state.max_steps)
        options = {"total_steps": state.max_steps} | {name: getattr(args, name) for name in PRESETS[args.preset]}
        options["hidden_weight"] = args.hidden_weight or None
        if args.teacher_schedule == "adaptive":
            options["held_out_clips"] = self._held_out_clips
        if state.global_step == 0:  # also when training starts over with a smaller batch (auto_find_batch_size)
            self.state, self.self_teacher = BlendState(options=options), None
            if self._held_out_clips:
                self.state.labels_upheld = UNKNOWN
        changed = [
            f"{name} {self.state.options.get(name)} -> {options[name]}"
            for name in options
            if self.state.options.get(name) != options[name]
        ]
        if changed:
            raise UserError(
                f"the checkpoint is of another run ({', '.join(changed)}): the blend would jump. Resume with the same "
                "options, data, batch size and number of epochs, or start a new run from the student (--student)"
            )
        self._begin_step(state, model)
        if state.is_world_process_zero:
            print(self.schedule.table(), flush=True)

    def on_step_begin(
        self, args: ASKDConfig, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ):
        self._follow_held_out(state.global_step)
        self._begin_step(state, model)

    def _follow_held_out(self, step: int) -> None:
        """Let an adaptive schedule look at held-out clips when it is time; after its phase do without the teacher."""
        if self.config.teacher_schedule != "adaptive":
            return
        if self._held_out_clips and self.schedule.is_measured(step, self.state):
            share = min(1.0, self.schedule.measured_every / self.config.adaptive_window)
            self.state.observe(self._judge_labels(), share)
        if step >= self.schedule.planned_end and self.state.labels_credit == 1.0:
            self.state.teacher_gone = True

    def _begin_step(self, state: TrainerState, model: nn.Module) -> None:
        self.weights = self.schedule.weights(state.global_step, self.state)
        if not self.weights.self:
            return
        epoch = data_epoch(state)
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
        (directory / BLEND_STATE_FILE).write_text(json.dumps(asdict(self.state), indent=2))
        if self.self_teacher is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self.self_teacher.parameters.items()}
            save_file(tensors, directory / SELF_TEACHER_FILE)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote. Raises `UserError` if the checkpoint isn't one of this trainer."""
        file = directory / BLEND_STATE_FILE
        if not file.is_file():
            raise UserError(f"{directory} has no {BLEND_STATE_FILE}: it isn't a checkpoint of a distillation run")
        try:
            self.state = BlendState(**json.loads(file.read_text()))
        except TypeError as error:
            raise UserError(f"{file} was written by another version of askd_hf ({error}): start a new run") from error
        self.self_teacher = None
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
        self._previous: dict[int, signal.Handlers] = {}

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this update, with a checkpoint (Ctrl-C again: at once)", flush=True)

    def on_train_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopped = self.requested = False
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

    def on_epoch_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.draws.epoch = data_epoch(state)


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
