"""Summary of a training run for its model card, saved as `training.json` beside the student.

The file is published, so it contains no secrets and no local paths: only the arguments in `ARGUMENTS`, and for models
and datasets only what `Provenance` holds.
"""

import dataclasses
import functools
import json
from dataclasses import dataclass
from importlib.metadata import version as installed_version
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
from ..config import ASKDConfig
from ..data import SpeechCollator, SpeechStream
from ..data.json_files import from_json, read_json, write_json
from ..data.soft_labels import SETTINGS_COLUMN, has_soft_labels
from ..errors import UserError
from ..models.generation_config import MULTILINGUAL_VOCABULARY, existing_heads
from ..models.lora import ADAPTER_CONFIG, lora_settings
from .provenance import Provenance, cached_teacher

SUMMARY_FILE = "training.json"
FRAMES_PER_SECOND = 100
version = functools.cache(installed_version)  # reading the metadata takes 5 ms per package
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate")

# Arguments that change the result of a run. Only these are published; none of them is a token or a path.
ARGUMENTS = (
    *("preset", "teacher_weight", "teacher_weight_end", "teacher_phase_ratio", "teacher_schedule", "adaptive_window"),
    *("self_weight", "self_schedule", "self_teacher", "self_ema_decay", "average", "snapshot_strategy"),
    *("temperature", "divergence", "divergence_beta", "weight_teacher_by_label_prob"),
    *("freeze_encoder", "hidden_weight", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("train_sampling_strategy", "seed", "data_seed", "bf16", "fp16", "tf32"),
    *("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model", "save_dtype"),
)


@dataclass
class ModelInfo:
    """The published model, as read from its files; for an adapter also from its base model."""

    parameters: int  # number of stored weights, tied ones counted once; for an adapter those of its base model
    dtype: str
    encoder_layers: int
    decoder_layers: int
    multilingual: bool  # whether it supports several languages
    # timestamps, word_timestamps: whether `pipeline` can return them
    timestamps: bool
    word_timestamps: bool
    window: float  # seconds of audio per window
    adapter_parameters: int | None = None  # number of weights of the adapter; None for a whole model
    # vocabulary, mel_bins: number of tokens and of mel bins; None in files of earlier versions
    vocabulary: int | None = None
    mel_bins: int | None = None

    @property
    def is_small_multilingual(self) -> bool:
        """Whether it supports several languages with a smaller vocabulary than Whisper's."""
        return self.multilingual and (self.vocabulary or MULTILINGUAL_VOCABULARY) < MULTILINGUAL_VOCABULARY

    @classmethod
    def of(cls, directory: Path) -> "ModelInfo":
        """Read a directory with a whole model."""
        parameters = 0
        for file in sorted(directory.glob("model*.safetensors")):
            with safe_open(file, "pt") as weights:
                parameters += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
        return cls._of(directory, read_json(directory / "config.json"), parameters)

    @classmethod
    def of_adapter(cls, directory: Path, adapter: PeftModel) -> "ModelInfo":
        """Read a directory with an adapter, which is also in memory."""
        adapter_parameters, total = adapter.get_nb_trainable_parameters()
        student = cls._of(directory, adapter.get_base_model().config.to_dict(), total - adapter_parameters)
        student.adapter_parameters = adapter_parameters
        return student

    @classmethod
    def _of(cls, directory: Path, config: dict[str, Any], parameters: int) -> "ModelInfo":
        generation = read_json(directory / "generation_config.json")
        # timestamp tokens, if any, follow <|notimestamps|>
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
    """A training run, as described by the model card."""

    provenance: Provenance
    student: ModelInfo
    # clips, hours: number and total duration of the training clips with speech, each counted once even if it is
    # repeated within an epoch; None if unknown (streaming)
    clips: int | None
    hours: float | None
    # step, total_steps, epochs: progress of training. Step 0: not trained; `step < total_steps`: not finished.
    step: int
    total_steps: int
    epochs: float
    batch_size: int  # clips per update, over all processes and accumulation steps
    # one dictionary per phase of the schedule: `phase`, `first_step`, `last_step`, and `teacher_weight` and
    # `self_weight` at its first and last step. With an adaptive schedule, `teacher_weight` is the minimum.
    phases: list[dict[str, Any]]
    weights: dict[str, float]  # weights of `labels`, `teacher` and `self` in the last update
    arguments: dict[str, Any]  # the arguments in `ARGUMENTS`, by their current names
    versions: dict[str, str]  # versions of `askd-hf` and `PACKAGES`
    hardware: dict[str, Any]  # `device` and the number of `processes`
    # step of the saved weights if they were selected by evaluation (`load_best_model_at_end`)
    best_step: int | None = None
    # number of cached teacher probabilities per token (`teacher_cache`); None if all were used
    top_k: int | None = None
    # number of training clips without speech; None if the number is unknown (streaming)
    no_speech_clips: int | None = 0
    concatenated_clips: int = 0  # rows of two or three joined clips, which don't count as clips
    ended_early: bool = False  # whether `early_stopping_patience` ended the run
    timestamp_probability: float = 0.0  # share of the labels with timestamps

    @property
    def gives_timestamps(self) -> bool:
        """Whether `return_timestamps=True` works: the model has timestamps, and training didn't unlearn them."""
        return self.student.timestamps and (self.timestamp_probability > 0.0 or self.step == 0)

    def save(self, directory: Path) -> None:
        write_json(directory / SUMMARY_FILE, self)

    @classmethod
    def load(cls, directory: Path) -> "TrainingSummary":
        """Read `training.json`, but `student` from the files of a whole model, which may have changed since.

        Raises `UserError` if the file doesn't exist.
        """
        file = directory / SUMMARY_FILE
        if not file.is_file():
            raise UserError(
                f"{directory} has no {SUMMARY_FILE}. Use the output directory of askd-hf distill, or a checkpoint "
                "in it"
            )
        summary = cls.from_dict(read_json(file))
        if not (directory / ADAPTER_CONFIG).is_file():
            summary.student = ModelInfo.of(directory)
        return summary

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TrainingSummary":
        """Return the summary that this or an earlier version saved."""
        summary = from_json(cls, data)
        summary.arguments = rename_saved(summary.arguments)
        return summary


def save_training_summary(
    directory: Path, trainer: Any, adapter: PeftModel | None = None, keeps_adapter: bool = False
) -> None:
    """Write `training.json` beside a saved student.

    Keeps the file of an earlier run if the model is saved before the first step.

    Args:
        trainer: an `ASKDTrainer`.
        keeps_adapter: whether the adapter was saved, not the merged model.
    """
    if trainer.state.global_step == 0 and (directory / SUMMARY_FILE).is_file():
        return
    kept = adapter is not None and keeps_adapter
    summary = _summary(ModelInfo.of_adapter(directory, adapter) if kept else ModelInfo.of(directory), trainer)
    if adapter is not None:
        summary.arguments |= lora_settings(adapter)
    summary.save(directory)


def _summary(student: ModelInfo, trainer: Any) -> TrainingSummary:
    """Return the summary of the run whose student was just saved."""
    config, state, train_dataset, provenance = trainer.args, trainer.state, trainer.train_dataset, trainer.origin
    collator = trainer.data_collator
    weights = trainer.blend.weights  # of the last update
    phases = [
        dict(
            phase=phase.name,
            first_step=phase.start,
            last_step=phase.end - 1,
            teacher_weight=[phase.first.teacher, phase.last.teacher],
            self_weight=[phase.first.self, phase.last.self],
        )
        for phase in trainer.blend.schedule.phases()
    ]
    device = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else config.device.type
    top_k = None
    clips, hours, no_speech_clips = count_clips(train_dataset)
    if isinstance(train_dataset, Dataset):
        if "language" in train_dataset.column_names and not provenance.languages:
            provenance = dataclasses.replace(
                provenance, languages=sorted(filter(None, train_dataset.unique("language")))
            )
        if "task" in train_dataset.column_names and (tasks := sorted(filter(None, train_dataset.unique("task")))):
            provenance = dataclasses.replace(provenance, tasks=tasks)
        if has_soft_labels(train_dataset) and config.uses_teacher:
            top_k = json.loads(train_dataset[SETTINGS_COLUMN][0])["top_k"]
            provenance = dataclasses.replace(provenance, teacher=provenance.teacher or cached_teacher(train_dataset))
    # Trainer loads the best checkpoint at the end of training
    chosen = config.load_best_model_at_end and not trainer.is_in_train and state.best_model_checkpoint is not None
    arguments = config.to_dict()
    if state.train_batch_size:  # found by auto_find_batch_size
        arguments["per_device_train_batch_size"] = state.train_batch_size
    arguments["teacher_schedule"] = trainer.blend.teacher_schedule
    return TrainingSummary(
        provenance=provenance,
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
        concatenated_clips=count_concatenated(train_dataset),
        ended_early=0 < state.global_step < state.max_steps and has_lost_patience(config, state),
        timestamp_probability=collator.timestamp_probability if isinstance(collator, SpeechCollator) else 0.0,
    )


def count_clips(train_dataset: Any) -> tuple[int | None, float | None, int | None]:
    """Return `clips`, `hours` and `no_speech_clips` of `TrainingSummary`. Repeated clips of a mix count once."""
    if isinstance(train_dataset, SpeechStream):
        return None, None, 0 if train_dataset.no_speech_dataset is None else None
    if not isinstance(train_dataset, Dataset):
        return len(train_dataset) if has_length(train_dataset) else None, None, 0

    def column(name: str, default: list[Any]) -> list[Any]:
        return train_dataset[name][:] if name in train_dataset.column_names else default

    rows = len(train_dataset)
    keys, no_speech = column("audio_key", list(range(rows))), column("no_speech", [False] * rows)
    facts = zip(keys, column("duration", [0.0] * rows), column("joined_keys", [None] * rows), strict=True)
    durations = {key: seconds for key, seconds, joined in facts if joined is None}
    no_speech_clips = {key for key, is_no_speech in zip(keys, no_speech, strict=True) if is_no_speech}
    speech = durations.keys() - no_speech_clips
    known = "duration" in train_dataset.column_names
    return len(speech), sum(durations[key] for key in speech) / 3600 if known else None, len(no_speech_clips)


def count_concatenated(train_dataset: Any) -> int:
    """Return the number of rows of `with_concatenated`."""
    if not isinstance(train_dataset, Dataset) or "joined_keys" not in train_dataset.column_names:
        return 0
    return sum(keys is not None for keys in train_dataset["joined_keys"][:])


def has_lost_patience(config: ASKDConfig, state: TrainerState) -> bool:
    """Return whether the metric has not improved in the last `early_stopping_patience` evaluations."""
    if config.early_stopping_patience is None:
        return False
    name = f"eval_{config.metric_for_best_model.removeprefix('eval_')}"
    # without that of --eval_on_start, which Trainer doesn't choose; a resumed run has another at its first step
    values = list({row["step"]: row[name] for row in state.log_history if name in row and row["step"] > 0}.values())
    return bool(values) and evaluations_since_best(values, config.greater_is_better) >= config.early_stopping_patience


def evaluations_since_best(values: list[float], greater_is_better: bool) -> int:
    """Return the number of values after the best one; the first of equal values is the best."""
    best = max(values) if greater_is_better else min(values)
    return len(values) - 1 - values.index(best)
