"""`AdaptiveBlendCallback`: the loss weights of a run and its self-teacher."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from .arguments.renamed import rename_saved
from .config import ASKDConfig
from .data import SpeechStream
from .data.json_files import read_json, write_json
from .data.stream import steps_per_part
from .progress import write
from .schedule import UNKNOWN, BlendSchedule, BlendState, BlendWeights, LabelsJudged
from .self_teacher import SELF_TEACHERS, SelfTeacher

BLEND_STATE_FILE = "blend_state.json"
SELF_TEACHER_FILE = "self_teacher.safetensors"
ADAPTIVE_NOTE = "adaptive: with unreliable labels the teacher keeps more weight, also in the second phase"


def data_epoch(args: ASKDConfig, state: TrainerState, train_dataloader: DataLoader) -> int:
    """Return the epoch of the current step, counted from 0. Without a known length there are ten per run.

    `on_epoch_begin` can't count it, as it is called again when a run is resumed. `state.epoch` is a float, which isn't
    exact.
    """
    if isinstance(train_dataloader.dataset, SpeechStream) or not has_length(train_dataloader):
        return state.global_step // steps_per_part(args.max_steps)
    steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    return state.global_step // max(steps, 1)


def read_blend_state(file: Path) -> BlendState:
    """Read what `AdaptiveBlendCallback.save` wrote. Raises ValueError or TypeError for other contents."""
    state = BlendState(**read_json(file))
    if not isinstance(state.options, dict):
        raise TypeError(f"{file}: options")
    state.options = rename_saved(state.options)
    return state


def blend_schedule(config: ASKDConfig, total_steps: int) -> BlendSchedule:
    """Return the schedule of a run of `total_steps` updates."""
    names = BlendSchedule.__dataclass_fields__.keys() - {"total_steps"}
    return BlendSchedule(total_steps=total_steps, **{name: getattr(config, name) for name in names})


class AdaptiveBlendCallback(TrainerCallback):
    """Set the loss weights at each step; create, update and save the self-teacher.

    Args:
        judge_labels: measures the labels of held-out clips, for an adaptive schedule.

    Attributes:
        weights: of the current update. Before training all weight is on the labels.
        options: the settings of the run (`askd_hf.training.run_settings`), saved in checkpoints. Set by the trainer.
        self_teacher: None while its weight is 0.
    """

    def __init__(
        self, config: ASKDConfig, judge_labels: Callable[[], LabelsJudged] | None = None, held_out_clips: int = 0
    ):
        self.config = config
        self.options: dict[str, Any] = {}
        self._judge_labels = judge_labels
        self._held_out_clips = held_out_clips
        self.schedule = blend_schedule(config, total_steps=0)
        self.state = BlendState()
        self.weights = BlendWeights()
        self.self_teacher: SelfTeacher | None = None
        self._loaded_self_teacher: dict[str, Tensor] | None = None

    @property
    def teacher_schedule(self) -> str:
        """The schedule in use: without held-out clips `linear` in place of `adaptive`."""
        wanted = self.config.teacher_schedule
        return "linear" if wanted == "adaptive" and not self._held_out_clips else wanted

    def needs_teacher(self, step: int) -> bool:
        """Return whether the teacher weight may be above 0 at `step` or later."""
        return step < self.schedule.teacher_end(self.state)

    # ---- the training loop's events ----

    def on_train_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.schedule = blend_schedule(self.config, state.max_steps)
        if state.global_step == 0:  # also after a restart with a smaller batch (auto_find_batch_size)
            self.state, self.self_teacher = BlendState(), None
            if self._held_out_clips:
                self.state.labels_upheld = UNKNOWN
        self.state.options = self.options
        # an evaluation that is still due has the weights and the self-teacher of the step before it
        step = copy.copy(state)
        step.global_step -= self.state.evaluation_due
        self._begin_step(args, step, kwargs["model"], kwargs["train_dataloader"])
        if state.is_world_process_zero:
            write(self.schedule.table())
            if self._held_out_clips:
                write(ADAPTIVE_NOTE)

    def on_step_begin(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self._measure_labels(state.global_step)
        self._begin_step(args, state, kwargs["model"], kwargs["train_dataloader"])

    def _measure_labels(self, step: int) -> None:
        """Measure the held-out labels if due. After its phase, drop the teacher if the labels have full credit."""
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

    def on_train_end(self, args: ASKDConfig, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs):
        # not after an interruption: the run resumes with the unaveraged weights
        if self.config.average and self.self_teacher is not None and state.global_step >= state.max_steps:
            self.self_teacher.copy_to(model)

    def logs(self) -> dict[str, float]:
        """Return the weights of the last update and the measurements of an adaptive schedule.

        `teacher_advantage` is the share of disputed held-out labels that the student does not uphold,
        `disputed_labels` the share of held-out labels that are disputed (see `LabelsJudged`).
        """
        values = {"teacher_weight": self.weights.teacher, "self_weight": self.weights.self}
        if self.config.teacher_schedule == "adaptive":
            values["teacher_advantage"] = 1.0 - self.state.labels_upheld
            if self.state.disputed is not None:
                values["disputed_labels"] = self.state.disputed
        return values

    # ---- checkpoints ----

    def save(self, directory: Path) -> None:
        """Write the state and the self-teacher into a checkpoint."""
        write_json(directory / BLEND_STATE_FILE, self.state)
        if self.self_teacher is None:
            (directory / SELF_TEACHER_FILE).unlink(missing_ok=True)  # of an earlier run
        else:
            tensors = {name: tensor.contiguous() for name, tensor in self.self_teacher.parameters.items()}
            save_file(tensors, directory / SELF_TEACHER_FILE)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote. `askd_hf.training.checkpoint_lookup` has checked that the files are complete."""
        self.state = read_blend_state(directory / BLEND_STATE_FILE)
        self.self_teacher = self._loaded_self_teacher = None
        if self.state.snapshot_epoch is not None:  # else the file is of an earlier run
            self._loaded_self_teacher = load_file(directory / SELF_TEACHER_FILE)
