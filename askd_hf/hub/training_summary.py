"""What a run leaves for its model card: `training.json`, written while everything is still known.

It is published, so it holds no secret and no path of this machine: of the run's arguments only those in `ARGUMENTS`,
of models and datasets what `Provenance` tells.
"""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer_utils import has_length

from .. import __version__
from ..arguments.renamed import rename_saved
from ..callbacks import AdaptiveBlendCallback
from ..config import ASKDConfig
from ..data import SpeechStream
from ..data.soft_labels import SETTINGS_COLUMN, has_soft_labels
from ..errors import UserError
from ..models.generation_config import MULTILINGUAL_VOCABULARY, existing_heads
from ..models.lora import ADAPTER_CONFIG, lora_settings
from .provenance import BaseModelInfo, Provenance, TrainingData, cached_teacher

SUMMARY_FILE = "training.json"
FRAMES_PER_SECOND = 100
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate")

# What a run's result depends on. Nothing else is published: neither tokens nor paths are among them.
ARGUMENTS = (
    "preset",
    "teacher_weight",
    "teacher_weight_end",
    "teacher_phase_ratio",
    "teacher_schedule",
    "adaptive_window",
    "self_weight",
    "self_schedule",
    "self_teacher",
    "self_ema_decay",
    "snapshot_strategy",
    "temperature",
    "divergence",
    "divergence_beta",
    "weight_teacher_by_label_prob",
    "freeze_encoder",
    "hidden_weight",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "tf32",
    "load_best_model_at_end",
    "early_stopping_patience",
    "metric_for_best_model",
    "save_dtype",
)


@dataclass
class ModelInfo:
    """What the published files themselves say; of an adapter those of its base as well.

    Attributes:
        parameters: stored weights, the tied ones once; of an adapter those of its base.
        dtype: of the weights, as in float32.
        multilingual: whether it takes a language.
        timestamps, word_timestamps: whether `pipeline` can give them.
        window: seconds of audio that it hears at once.
        adapter_parameters: of an adapter that is kept; None: it isn't one.
        vocabulary, mel_bins: how many tokens, and how many frequencies of the audio.
    """

    parameters: int
    dtype: str
    encoder_layers: int
    decoder_layers: int
    multilingual: bool
    timestamps: bool
    word_timestamps: bool
    window: float
    adapter_parameters: int | None = None
    vocabulary: int | None = None
    mel_bins: int | None = None

    @classmethod
    def of(cls, directory: Path) -> "ModelInfo":
        """Of a directory with a whole model."""
        parameters = 0
        for file in sorted(directory.glob("model*.safetensors")):
            with safe_open(file, "pt") as weights:
                parameters += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
        return cls._of(directory, json.loads((directory / "config.json").read_text()), parameters)

    @classmethod
    def of_adapter(cls, directory: Path, adapter: PeftModel) -> "ModelInfo":
        """Of a directory with an adapter, which is in memory too."""
        of_adapter, both = adapter.get_nb_trainable_parameters()
        student = cls._of(directory, adapter.get_base_model().config.to_dict(), both - of_adapter)
        student.adapter_parameters = of_adapter
        return student

    @classmethod
    def _of(cls, directory: Path, config: dict[str, Any], parameters: int) -> "ModelInfo":
        generation = json.loads((directory / "generation_config.json").read_text())
        # the timestamp tokens come after <|notimestamps|>, if there are any
        last_text_token = generation.get("no_timestamps_token_id", config["vocab_size"])
        timestamps = config["vocab_size"] > last_text_token + 1
        heads = generation.get("alignment_heads")
        shape = config["decoder_layers"], config["decoder_attention_heads"]
        return cls(
            parameters=parameters,
            dtype=str(config["dtype"]).removeprefix("torch."),
            encoder_layers=config["encoder_layers"],
            decoder_layers=config["decoder_layers"],
            multilingual=generation.get("is_multilingual", config["vocab_size"] >= MULTILINGUAL_VOCABULARY),
            timestamps=timestamps,
            word_timestamps=timestamps and existing_heads(heads, *shape) is not None,
            window=2 * config["max_source_positions"] / FRAMES_PER_SECOND,
            vocabulary=config["vocab_size"],
            mel_bins=config["num_mel_bins"],
        )


@dataclass
class TrainingSummary:
    """A run as its card tells it.

    Attributes:
        clips, hours: of speech in the training set, each clip once however often it comes in an epoch; None if that
            isn't known.
        negatives: clips in which nobody speaks, likewise; None: there are some, it isn't known how many.
        step, total_steps, epochs: how far training was; unfinished where `step` is less. Step 0: nothing was trained.
        ended_early: whether `early_stopping_patience` ended it.
        batch_size: clips an update, over all processes and accumulation steps.
        phases: of the schedule, one each: `phase`, `first_step`, `last_step`, `teacher_weight` and `self_weight`, both
            at the first and the last step. Under an adaptive schedule the teacher's are the least that it may have.
        weights: on `labels`, `teacher` and `self` in the last update.
        arguments: those in `ARGUMENTS`.
        versions: of `askd-hf` and `PACKAGES`.
        hardware: `device`, `processes`.
        best_step: whose weights these are, if they were chosen by evaluation (`load_best_model_at_end`).
        top_k: the teacher's tokens that were known one by one, from `teacher_cache`; None: all.
    """

    origin: Provenance
    student: ModelInfo
    clips: int | None
    hours: float | None
    step: int
    total_steps: int
    epochs: float
    batch_size: int
    phases: list[dict[str, Any]]
    weights: dict[str, float]
    arguments: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    best_step: int | None = None
    top_k: int | None = None
    no_speech_clips: int | None = 0
    ended_early: bool = False

    def save(self, directory: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (directory / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "TrainingSummary":
        """Read what `save` wrote; what a whole model's files say is read from them, as they may have changed since.

        Raises `UserError` if there is none.
        """
        file = directory / SUMMARY_FILE
        if not file.is_file():
            raise UserError(f"{directory} has no {SUMMARY_FILE}: it isn't the directory of a run of askd-hf distill")
        facts = cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        if not (directory / ADAPTER_CONFIG).is_file():
            facts.student = ModelInfo.of(directory)
        return facts

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TrainingSummary":
        origin = dict(data["origin"])
        for name in ("teacher", "student"):
            origin[name] = origin[name] and BaseModelInfo(**origin[name])
        origin["speech"] = [TrainingData.from_dict(speech) for speech in origin["speech"]]
        data = {"no_speech_clips" if name == "negatives" else name: value for name, value in data.items()}
        data["arguments"] = rename_saved(data["arguments"])
        return cls(**{**data, "origin": Provenance(**origin), "student": ModelInfo(**data["student"])})


def save_training_summary(
    directory: Path,
    origin: Provenance,
    config: ASKDConfig,
    state: TrainerState,
    blend: AdaptiveBlendCallback,
    train_dataset: Any,
    in_training: bool,
    adapter: PeftModel | None = None,
    keeps_adapter: bool = False,
) -> None:
    """Write `training.json` beside a student that was just saved. See `build_training_summary` for the arguments.

    A model saved before any step doesn't overwrite the one of an earlier run.
    """
    if state.global_step == 0 and (directory / SUMMARY_FILE).is_file():
        return
    kept = adapter is not None and keeps_adapter
    student = ModelInfo.of_adapter(directory, adapter) if kept else ModelInfo.of(directory)
    facts = build_training_summary(student, origin, config, state, blend, train_dataset, in_training)
    if adapter is not None:
        facts.arguments |= lora_settings(adapter)
    facts.save(directory)


def build_training_summary(
    student: ModelInfo,
    origin: Provenance,
    config: ASKDConfig,
    state: TrainerState,
    blend: AdaptiveBlendCallback,
    train_dataset: Any,
    in_training: bool,
) -> TrainingSummary:
    """Of the run whose student was just saved."""
    planned = blend.schedule.phases()
    weights = blend.weights  # of the last update
    phases = [
        dict(
            phase=phase.name,
            first_step=phase.start,
            last_step=phase.end - 1,
            teacher_weight=[phase.first.teacher, phase.last.teacher],
            self_weight=[phase.first.self, phase.last.self],
        )
        for phase in planned
    ]
    device = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else config.device.type
    top_k = None
    clips, hours, no_speech_clips = count_clips(train_dataset)
    if isinstance(train_dataset, Dataset):
        if "language" in train_dataset.column_names and not origin.languages:
            origin = dataclasses.replace(origin, languages=sorted(filter(None, train_dataset.unique("language"))))
        if has_soft_labels(train_dataset) and config.uses_teacher:
            top_k = json.loads(train_dataset[SETTINGS_COLUMN][0])["top_k"]
            origin = dataclasses.replace(origin, teacher=origin.teacher or cached_teacher(train_dataset))
    # Trainer loads it when training ends
    chosen = config.load_best_model_at_end and not in_training and state.best_model_checkpoint is not None
    arguments = config.to_dict()
    if state.train_batch_size:  # what auto_find_batch_size has found
        arguments["per_device_train_batch_size"] = state.train_batch_size
    return TrainingSummary(
        origin=origin,
        student=student,
        clips=clips,
        hours=hours,
        step=state.global_step,
        total_steps=state.max_steps,
        epochs=state.epoch or 0.0,
        batch_size=arguments["per_device_train_batch_size"] * config.gradient_accumulation_steps * config.world_size,
        phases=phases,
        weights=dict(labels=1.0 - weights.teacher - weights.self, teacher=weights.teacher, self=weights.self),
        arguments={name: arguments[name] for name in ARGUMENTS},
        versions={"askd-hf": __version__} | {name: version(name) for name in PACKAGES},
        hardware=dict(device=device, processes=config.world_size),
        best_step=state.best_global_step if chosen else None,
        top_k=top_k,
        no_speech_clips=no_speech_clips,
        ended_early=ended_early(config, state),
    )


def count_clips(train_dataset: Any) -> tuple[int | None, float | None, int | None]:
    """Clips and hours of speech, and clips without speech, as in `TrainingSummary`.

    A clip counts once, however often a mix by weights has it.
    """
    if isinstance(train_dataset, SpeechStream):
        return None, None, 0 if train_dataset.no_speech_dataset is None else None
    if not isinstance(train_dataset, Dataset):
        return len(train_dataset) if has_length(train_dataset) else None, None, 0

    def column(name: str, default: list[Any]) -> list[Any]:
        return train_dataset[name][:] if name in train_dataset.column_names else default

    rows = len(train_dataset)
    keys, silent = column("audio_key", list(range(rows))), column("no_speech", [False] * rows)
    seconds = dict(zip(keys, column("duration", [0.0] * rows), strict=True))
    no_speech_clips = {key for key, nobody in zip(keys, silent, strict=True) if nobody}
    speech = seconds.keys() - no_speech_clips
    known = "duration" in train_dataset.column_names
    return len(speech), sum(seconds[key] for key in speech) / 3600 if known else None, len(no_speech_clips)


def ended_early(config: ASKDConfig, state: TrainerState) -> bool:
    """Whether `StopEarlyCallback` ended the run."""
    if config.early_stopping_patience is None or not 0 < state.global_step < state.max_steps:
        return False
    name = f"eval_{config.metric_for_best_model.removeprefix('eval_')}"
    values = [row[name] for row in state.log_history if name in row]
    return bool(values) and evaluations_since_best(values, config.greater_is_better) >= config.early_stopping_patience


def evaluations_since_best(values: list[float], greater_is_better: bool) -> int:
    """How many values came after the best; of equal ones the first is the best."""
    best = max(values) if greater_is_better else min(values)
    return len(values) - 1 - values.index(best)
