"""What the course of a run depends on: saved in every checkpoint, so that no run goes on as another one.

The objective, the optimizer, the order of the clips and what they are, the models, the precision. Not compared is what
leaves the result as it is: logging, saving, evaluation, workers, paths, the Hub, and how much memory is used.
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import WhisperConfig
from transformers.trainer_utils import SaveStrategy, has_length

from ..callbacks import BLEND_STATE_FILE, read_blend_state
from ..config import ASKDConfig
from ..data import SpeechCollator, SpeechStream
from ..data.teacher_cache import SETTINGS, has_soft_labels
from ..errors import UserError
from ..hub.provenance import Provenance
from ..models.lora import lora_settings
from ..models.teacher_memory import full_weights

logger = logging.getLogger(__name__)

# fields of `ASKDConfig` that may be others in a run that is resumed, or that another setting stands for; by their
# beginnings, those of a group
HARMLESS_GROUPS: tuple[str, ...] = (
    "logging_",
    "log_",
    "eval_",
    "save_",
    "hub_",
    "trackio_",
    "ddp_",
    "generation_",
    "do_",
    "fsdp",
)
HARMLESS_GROUPS += ("gradient_checkpointing", "activation_checkpointing", "torch_compile", "liger_")
HARMLESS = {
    *("output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub"),
    *("per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
    *("bf16_full_eval", "fp16_full_eval", "predict_with_generate", "sortish_sampler", "include_num_input_tokens_seen"),
    *("load_best_model_at_end", "early_stopping_patience", "enable_jit_checkpoint"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("use_cpu", "use_cache", "torch_empty_cache_steps", "skip_memory_metrics", "debug", "local_rank", "deepspeed"),
    *("use_liger_kernel", "parallelism_config", "restore_callback_states_from_checkpoint"),
    "preset",  # its fields are compared
    *("num_train_epochs", "max_steps"),  # total_steps
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"),  # batch_size
    *("metric_for_best_model", "greater_is_better"),  # compared where a best checkpoint is chosen
}
# of the student's config: what is random in training, and the shape
RANDOM = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
SHAPE = ("d_model", "encoder_layers", "decoder_layers", "vocab_size")
# of a dataset's rows, where they have them: what labels are made of, and what stands for the audio
LABEL_COLUMNS = ("text", "language", "task", "segments", "prompt", "negative", "label_tokens", "labels")
ROWS_AT_ONCE = 1000
MEANINGS = {
    "batch_size": "batch_size (per_device_train_batch_size x gradient_accumulation_steps x processes)",
    "clips": "clips (their number)",
    "clips_digest": "clips_digest (which clips, in which order, with which transcripts)",
    "teacher": "teacher (its weights or --teacher_dtype)",
    "teacher_labels": "teacher_labels (--teacher_cache_dir)",
    "student": "student (the weights beside the adapter)",
}
CHOICE = ("metric_for_best_model", "greater_is_better")


def config_settings(config: ASKDConfig, train_batch_size: int | None = None) -> dict[str, Any]:
    """Of the options, as JSON would give them back.

    Args:
        train_batch_size: clips a process and micro-batch, where they are known. Default: those of the options, unless
            `auto_find_batch_size` decides.
    """
    values = {name: value for name, value in config.to_dict().items() if not is_harmless(name)}
    values["data_seed"] = config.order_seed
    values["hidden_weight"] = config.hidden_weight or None
    values["processes"] = config.world_size
    if config.max_steps > 0:
        values["total_steps"] = config.max_steps
    if train_batch_size is None and not config.auto_find_batch_size:
        train_batch_size = config.train_batch_size
    if train_batch_size is not None:
        a_process = train_batch_size * config.gradient_accumulation_steps
        values["batch_size"] = a_process * config.world_size
        if config.train_sampling_strategy in ("group_by_length", "batch_rebalance"):  # it groups those of a process
            values["clips_of_a_process"] = a_process
    return _as_json(values)


def is_harmless(name: str) -> bool:
    """Whether a field of `ASKDConfig` may be another one in a run that is resumed."""
    return name in HARMLESS or name.startswith(HARMLESS_GROUPS)


def chosen_by(config: ASKDConfig) -> dict[str, Any]:
    """How the best checkpoint is chosen; None where none is."""
    chooses = config.load_best_model_at_end or config.save_strategy == SaveStrategy.BEST
    return {name: getattr(config, name) if chooses else None for name in CHOICE}


def model_settings(
    config: WhisperConfig, adapter: PeftModel | None, teacher: str | None, train_dataset: Any, uses_teacher: bool
) -> dict[str, Any]:
    """Of the models.

    Args:
        config: of the student.
        teacher: `models_digest` of one that is run in training; None: it isn't.
    """
    values = {name: getattr(config, name) for name in SHAPE + RANDOM}
    values["apply_spec_augment"] = config.apply_spec_augment
    values |= {
        name: value if config.apply_spec_augment else None
        for name, value in config.to_dict().items()
        if name.startswith("mask_time_") or name.startswith("mask_feature_")
    }
    names = ("lora_r", "lora_alpha", "lora_dropout", "use_dora", "lora_target_modules", "student")
    values |= dict.fromkeys(names)
    if adapter is not None:
        modules = adapter.active_peft_config.target_modules
        values |= lora_settings(adapter)
        values["lora_target_modules"] = modules if isinstance(modules, str) else sorted(modules)
        # checkpoints have the adapter alone
        values["student"] = models_digest(adapter.get_base_model(), frozen=True)
    values["teacher"] = teacher
    values["teacher_labels"] = None
    if uses_teacher and has_soft_labels(train_dataset):
        labels = [json.loads(text) for text in sorted(train_dataset.unique(SETTINGS))]
        # the teacher's name may be a path
        values["teacher_labels"] = [{k: v for k, v in label.items() if k != "teacher"} for label in labels]
    return _as_json(values)


def models_digest(model: nn.Module, frozen: bool = False) -> str:
    """Hexadecimal digits for a model's weights, by the names, shapes and kinds of all and the first numbers of each.

    Reading all of large-v3 would take seconds, and this tells apart any two models that were trained.

    Args:
        frozen: only for those that aren't trained.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad} if frozen else set()
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(full_weights(model).items()):
        if name in trained:
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {type(weight).__name__} ".encode())
        if type(weight) in (torch.Tensor, nn.Parameter):  # and none of the 8-bit ones, which have no such view
            numbers = weight.detach().reshape(-1)[:16]
            digest.update(numbers.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def data_settings(train_dataset: Any, collator: Any, origin: Provenance) -> dict[str, Any]:
    """Of the clips, their order, and what is drawn for them.

    Of a stream nobody knows the rows: it is where they come from, and how they are mixed. Of another dataset than
    those of `datasets` it is the number of rows.
    """
    values: dict[str, Any] = dict.fromkeys(("clips", "clips_digest", "streaming", "filters"))
    if isinstance(train_dataset, SpeechStream):
        values["streaming"] = dict(
            datasets=[[speech.dataset, speech.config, speech.split] for speech in origin.speech],
            number=len(train_dataset.datasets),
            dataset_probabilities=train_dataset.weights,
            seed=train_dataset.seed,
            shuffle_buffer_size=train_dataset.buffer,
            no_speech_dataset=train_dataset.no_speech_dataset is not None,
            no_speech_probability=train_dataset.share,
        )
    elif has_length(train_dataset):
        values["clips"] = len(train_dataset)
        if isinstance(train_dataset, Dataset):
            values["clips_digest"] = clips_digest(train_dataset)
    if isinstance(collator, SpeechCollator):
        values["timestamp_probability"], values["condition_on_prev_probability"] = (
            collator.timestamps,
            collator.prompts,
        )
        values["augment"] = None
        if collator.augmenter is not None:
            options = asdict(collator.augmenter.options)
            values["augment"] = options | {"noise_folder": options["noise_folder"] is not None}
        if collator.limits is not None:
            values["filters"] = asdict(collator.limits)
    return _as_json(values)


def clips_digest(dataset: Dataset) -> str:
    """Hexadecimal digits for the rows in their order: audio (`audio_key`, or else the clips' names) and labels."""
    sound = "audio_key" if "audio_key" in dataset.column_names else "clip"
    columns = [name for name in (sound, *LABEL_COLUMNS) if name in dataset.column_names]
    digest = hashlib.blake2b(digest_size=16)
    if columns:
        for table in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
            for row in table.to_pylist():
                digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As they come back from a checkpoint; what is unlimited as None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if isinstance(value, int | float | str | None) else str(value)

    return plain(values)


def check_same_run(saved: dict[str, Any], present: dict[str, Any], checkpoint: str | Path) -> None:
    """Raise `UserError` if a run would go on as another one than `checkpoint` is of.

    Args:
        saved, present: settings by name. What only one of them has isn't compared.
    """
    changed = []
    for name in sorted(saved.keys() & present.keys()):
        old, new = saved[name], present[name]
        if old == new or name == "processes" or (name in CHOICE and None in (old, new)):
            continue
        changed.append(f"{MEANINGS.get(name, name)} {_shown(old)} -> {_shown(new)}")
    if changed:
        raise UserError(
            f"the checkpoint {checkpoint} is of another run ({', '.join(changed)}): resume with the options, data "
            f"and batch size that it had, or start a new run from its student: --student {checkpoint}, with another "
            "--output_dir"
        )


def check_options(config: ASKDConfig, checkpoint: str | Path) -> None:
    """`check_same_run` of what the options tell, before models and speech are loaded."""
    undecided = [name for name in ("freeze_encoder", "hidden_weight") if getattr(config, name) is None]
    present = {name: value for name, value in config_settings(config).items() if name not in undecided}
    check_same_run(read_blend_state(Path(checkpoint) / BLEND_STATE_FILE).options, present, checkpoint)


def warn_of_unknown(saved: dict[str, Any], present: dict[str, Any], checkpoint: str | Path) -> None:
    """Say what of a run that goes on can't be compared with `checkpoint`, or can't be as it was."""
    unknown = sorted(present.keys() - saved.keys())
    if unknown:
        logger.warning(
            "%s was saved by another version, which didn't note %s: see to it that they are as they were",
            *(checkpoint, ", ".join(unknown)),
        )
    elif saved["processes"] != present["processes"]:
        logger.warning(
            "%s was saved by %d processes, and now there are %d: the clips and their order stay the same, but not "
            "what dropout and SpecAugment draw",
            *(checkpoint, saved["processes"], present["processes"]),
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
