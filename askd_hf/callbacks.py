"""The callbacks of a run: the blend of teacher and self-teacher, the graceful and the early stop, the throughput."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

from .arguments.renamed import rename_saved
from .config import ASKDConfig
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
    state.options = rename_saved(state.options)
    return state


class AdaptiveBlendCallback(TrainerCallback):
    """Drives the blend: the only owner of its weights, its saved state and the self-teacher.

    Attributes:
        weights: of the update under way; labels only before training.
        options: what the run is (`askd_hf.training.run_settings`), which its checkpoints note. The trainer sets them.
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
        if self.config.snapshot_strategy == "epoch" and epoch > self.state.snapshot_epoch:
            self.self_teacher.at_new_epoch(model)
            self.state.snapshot_epoch = epoch

    def on_step_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs):
        if self.self_teacher is not None:
            self.self_teacher.after_update(model)

    def logs(self) -> dict[str, float]:
        """The weights of the last update, and what an adaptive schedule measured on held-out clips."""
        values = {"teacher_weight": self.weights.teacher, "self_weight": self.weights.self}
        if self.config.teacher_schedule == "adaptive":
            values["teacher_advantage"] = 1.0 - self.state.labels_upheld
            if self.state.disputed is not None:
                values["disputed_labels"] = self.state.disputed
        return values

    # ---- checkpoints ----

    def save(self, directory: Path) -> None:
        """Write the state and the self-teacher into a checkpoint's directory."""
        text = json.dumps(asdict(self.state), indent=2, ensure_ascii=False)
        (directory / BLEND_STATE_FILE).write_text(text + "\n", encoding="utf-8")
        if self.self_teacher is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self.self_teacher.parameters.items()}
            save_file(tensors, directory / SELF_TEACHER_FILE)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, in a checkpoint that is whole (`askd_hf.training.checkpoints`)."""
        self.state = read_blend_state(directory / BLEND_STATE_FILE)
        self.self_teacher = self._loaded_self_teacher = None
        if (directory / SELF_TEACHER_FILE).is_file():
            self._loaded_self_teacher = load_file(directory / SELF_TEACHER_FILE)
