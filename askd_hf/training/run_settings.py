"""The settings that the result of a run depends on. They are saved in every checkpoint and compared on resuming.

They cover the objective, the optimizer, the clips and their order, the models and the precision. Settings that don't
change the result aren't compared: logging, saving, evaluation, workers, paths, the Hub and the use of memory.
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
from transformers import WhisperConfig, WhisperTokenizer
from transformers.trainer_utils import SaveStrategy, has_length

from ..callbacks import BLEND_STATE_FILE, read_blend_state
from ..config import ASKDConfig
from ..data import SpeechCollator, SpeechStream
from ..data.encoder_store import INT8
from ..data.soft_labels import SETTINGS_COLUMN, has_soft_labels
from ..errors import UserError
from ..hub.provenance import Provenance
from ..models.lora import lora_settings
from ..models.teacher_memory import full_weights

logger = logging.getLogger(__name__)

# Fields of `ASKDConfig` that may change when a run is resumed, or that another setting covers: prefixes, then names
HARMLESS_PREFIXES: tuple[str, ...] = (
    *("logging_", "log_", "eval_", "save_", "hub_", "trackio_", "ddp_", "generation_", "do_", "fsdp"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "liger_"),
)
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
    *("metric_for_best_model", "greater_is_better"),  # compared if a best checkpoint is chosen
}
# fields of the student's config: random in training, and the shape
RANDOM = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
SHAPE = ("d_model", "encoder_layers", "decoder_layers", "vocab_size", "max_source_positions")
# columns that labels are made of
LABEL_COLUMNS = ("text", "language", "task", "segments", "prompt", "no_speech", "label_tokens", "labels")
DIGEST_NAMES = {"no_speech": "negative"}  # columns under their former names, so that digests in old checkpoints match
BATCH_SIZE = 1000  # rows, for the digest
DESCRIPTIONS = {
    "batch_size": "batch_size (per_device_train_batch_size x gradient_accumulation_steps x processes)",
    "clips": "clips (number of clips)",
    "clips_digest": "clips_digest (the clips, their order and their transcripts)",
    "teacher": "teacher (weights or --teacher_dtype)",
    "teacher_labels": "teacher_labels (--teacher_cache_dir)",
    "student": "student (weights below the adapter)",
    "tokens": "tokens (--vocabulary)",
}
BEST_MODEL = ("metric_for_best_model", "greater_is_better")


def config_settings(config: ASKDConfig, train_batch_size: int | None = None) -> dict[str, Any]:
    """Return the settings of the options, as JSON values.

    Args:
        train_batch_size: the batch size per process, if it is known. Default: that of the options, or none with
            `auto_find_batch_size`.
    """
    values = {name: value for name, value in config.to_dict().items() if not is_harmless(name)}
    values["data_seed"] = config.order_seed
    if values["accelerator_config"]:  # of pinned memory, which the machine that resumes the run may not have
        values["accelerator_config"]["non_blocking"] = False
    values["hidden_weight"] = config.hidden_weight or None
    values["processes"] = config.world_size
    if config.max_steps > 0:
        values["total_steps"] = config.max_steps
    if train_batch_size is None and not config.auto_find_batch_size:
        train_batch_size = config.train_batch_size
    if train_batch_size is not None:
        per_process = train_batch_size * config.gradient_accumulation_steps
        values["batch_size"] = per_process * config.world_size
        if config.train_sampling_strategy == "group_by_length":  # it groups per process
            values["clips_of_a_process"] = per_process
    return _as_json(values)


def is_harmless(name: str) -> bool:
    """Return whether a field of `ASKDConfig` may change when a run is resumed."""
    return name in HARMLESS or name.startswith(HARMLESS_PREFIXES)


def best_model_settings(config: ASKDConfig) -> dict[str, Any]:
    """Return the settings that choose the best checkpoint; their values are None if none is chosen."""
    chooses = config.load_best_model_at_end or config.save_strategy == SaveStrategy.BEST
    return {name: getattr(config, name) if chooses else None for name in BEST_MODEL}


def model_settings(
    config: WhisperConfig, adapter: PeftModel | None, teacher: str | None, train_dataset: Any, uses_teacher: bool
) -> dict[str, Any]:
    """Return the settings of the models, as JSON values.

    Args:
        teacher: `models_digest` of the teacher, None if training doesn't run it.
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
        # checkpoints contain the adapter only
        values["student"] = models_digest(adapter.get_base_model(), frozen=True)
    values["teacher"] = teacher
    values["teacher_labels"] = None
    if uses_teacher and has_soft_labels(train_dataset):
        labels = [json.loads(text) for text in sorted(train_dataset.unique(SETTINGS_COLUMN))]
        # without the teacher's name, which may be a path
        values["teacher_labels"] = [{k: v for k, v in label.items() if k != "teacher"} for label in labels]
    return _as_json(values)


def models_digest(model: nn.Module, frozen: bool = False) -> str:
    """Return a hexadecimal digest of the names, shapes, dtypes and first values of all weights.

    It differs for any two models that were trained differently. To hash all values of large-v3 would take seconds.

    Args:
        frozen: True to leave out the weights that are trained, and adapters, also those on frozen modules.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad} if frozen else set()
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(full_weights(model).items()):
        if name in trained or (frozen and ".lora_" in name):
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {type(weight).__name__} ".encode())
        if type(weight) in (torch.Tensor, nn.Parameter):  # 8-bit weights have no such view
            numbers = weight.detach().reshape(-1)[:16]
            digest.update(numbers.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def data_settings(train_dataset: Any, collator: Any, origin: Provenance) -> dict[str, Any]:
    """Return the settings of the clips, their order and their random changes, as JSON values.

    The rows of a stream are unknown: its sources and the options of the mix are compared instead. For a dataset that
    isn't a `datasets.Dataset` it is the number of rows.
    """
    names = ("clips", "clips_digest", "streaming", "row_options", "filters", "encoder_outputs")
    values: dict[str, Any] = dict.fromkeys(names)
    if isinstance(train_dataset, SpeechStream):
        values["row_options"] = train_dataset.options
        values["streaming"] = dict(
            datasets=[[speech.dataset, speech.config, speech.split] for speech in origin.speech],
            number=len(train_dataset.datasets),
            dataset_probabilities=train_dataset.probabilities,
            seed=train_dataset.seed,
            shuffle_buffer_size=train_dataset.buffer_size,
            no_speech_dataset=train_dataset.no_speech_dataset is not None,
            no_speech_probability=train_dataset.no_speech_probability,
            concatenate_probability=0.0 if train_dataset.packing is None else train_dataset.packing.probability,
            processes=train_dataset.processes,  # each reads its share of the shards
        )
    elif has_length(train_dataset):
        values["clips"] = len(train_dataset)
        if isinstance(train_dataset, Dataset):
            values["clips_digest"] = clips_digest(train_dataset)
    if isinstance(collator, SpeechCollator):
        values["timestamp_probability"], values["condition_on_prev_probability"] = (
            collator.timestamp_probability,
            collator.condition_on_prev_probability,
        )
        values["shortest_context"] = collator.shortest_context
        values["tokens"] = tokens_digest(collator.processor.tokenizer)
        values |= dict.fromkeys(("augmentations", "snr_db", "augment_teacher"))
        if collator.augmenter is not None:
            options = asdict(collator.augmenter.options)
            values |= {name: options.pop(name) for name in ("snr_db", "augment_teacher")}
            values["augmentations"] = options | {"noise_dir": options["noise_dir"] is not None}
        if collator.encoder_cache is not None and collator.encoder_cache.stored == INT8:
            values["encoder_outputs"] = INT8  # float16 is close to no cache, which may be used instead
        if collator.limits is not None:
            values["filters"] = asdict(collator.limits)
    return _as_json(values)


def tokens_digest(tokenizer: WhisperTokenizer) -> str:
    """Return a hexadecimal digest of all tokens and their ids: `--vocabulary` may give others of the same number."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def clips_digest(dataset: Dataset) -> str:
    """Return a hexadecimal digest of the rows in their order: audio (`audio_key`, else the clip's name) and labels."""
    audio = "audio_key" if "audio_key" in dataset.column_names else "clip"
    columns = [name for name in (audio, *LABEL_COLUMNS) if name in dataset.column_names]
    digest = hashlib.blake2b(digest_size=16)
    if columns:
        for table in dataset.select_columns(columns).with_format("arrow").iter(BATCH_SIZE):
            for row in table.to_pylist():
                named = {DIGEST_NAMES.get(name, name): value for name, value in row.items()}
                digest.update(json.dumps(named, sort_keys=True).encode())
    return digest.hexdigest()


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as JSON would return them, infinity as None."""

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
    """Raise `UserError` if settings of the resumed run differ from those of its checkpoint.

    Args:
        saved, present: {name: value}. Names that only one of them has aren't compared.
    """
    changed = []
    for name in sorted(saved.keys() & present.keys()):
        old, new = saved[name], present[name]
        if old == new or name == "processes" or (name in BEST_MODEL and None in (old, new)):
            continue
        changed += _differences(DESCRIPTIONS.get(name, name), old, new)
    if changed:
        raise UserError(
            f"the settings of the checkpoint {checkpoint} differ ({', '.join(changed)}): resume with its options, "
            f"data and batch size, or start a new run from its student with --student {checkpoint} and another "
            "--output_dir"
        )


def check_options(config: ASKDConfig, checkpoint: str | Path) -> None:
    """Call `check_same_run` for the options alone, before models and data are loaded."""
    undecided = [name for name in ("freeze_encoder", "hidden_weight") if getattr(config, name) is None]
    present = {name: value for name, value in config_settings(config).items() if name not in undecided}
    check_same_run(read_blend_state(Path(checkpoint) / BLEND_STATE_FILE).options, present, checkpoint)


def warn_of_unknown(saved: dict[str, Any], present: dict[str, Any], checkpoint: str | Path) -> None:
    """Warn of settings that can't be compared with the checkpoint, and of another number of processes."""
    unknown = sorted(present.keys() - saved.keys())
    if unknown:
        logger.warning(
            "%s was saved by another version, without %s: make sure that these have not changed",
            *(checkpoint, ", ".join(unknown)),
        )
    elif saved["processes"] != present["processes"]:
        logger.warning(
            "%s was saved by %d processes, and now there are %d: the clips and their order are the same, but the "
            "random numbers of dropout and SpecAugment are not",
            *(checkpoint, saved["processes"], present["processes"]),
        )


def _differences(name: str, old: Any, new: Any) -> list[str]:
    """Return "NAME OLD -> NEW"; of two dictionaries that of each value that differs, as NAME.KEY."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [f"{name} {_shown(old)} -> {_shown(new)}"]
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return [change for key in keys for change in _differences(f"{name}.{key}", old.get(key), new.get(key))]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
