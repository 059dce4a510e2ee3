"""Encoder cache, teacher cache and memory of the teacher, as the options say."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import CacheArguments, MixArguments, ModelArguments
from ..config import ASKDConfig, resolve_dtype
from ..data import SpeechCollator, SpeechStream, cache_encoder
from ..data.augment import AugmentArguments
from ..data.encoder_cache import find_encoder_cache
from ..data.shared_disk import others_wait, processes_sharing
from ..data.soft_labels import (
    SOFT_LABEL_COLUMNS,
    check_soft_labels,
    has_soft_labels,
    teacher_settings,
    without_soft_labels,
)
from ..data.teacher_cache import cache_teacher, check_teacher_cache
from ..errors import UserError
from ..models.student import encoder_is_deterministic
from ..models.teacher_memory import offload, place_teacher, quantize_decoder

logger = logging.getLogger(__name__)

MAX_VOCABULARY = 2**16  # the cache stores token ids as uint16


def check_caches(
    caches: CacheArguments,
    models: ModelArguments,
    config: ASKDConfig,
    vocabulary: int,
    mix_args: MixArguments | None = None,
    augment: AugmentArguments | None = None,
) -> None:
    """Raise `UserError` for options of the caches that don't fit the other options."""
    if augment is not None and augment.augmentations and caches.encoder_cache_dir:
        raise UserError(
            "--augmentations is not supported with --encoder_cache_dir: the student's encoder takes other audio in "
            "every epoch. Leave out --encoder_cache_dir; --teacher_cache_dir still caches the teacher's labels"
        )
    if augment is not None and augment.augment_teacher and caches.teacher_cache_dir:
        raise UserError(
            "--augment_teacher True is not supported with --teacher_cache_dir, whose labels are of the clean clips: "
            "leave out one of them"
        )
    if config.spec_augment and caches.encoder_cache_dir:
        raise UserError(
            "--spec_augment True is not supported with --encoder_cache_dir: it changes the outputs of the encoder in "
            "every epoch. Leave out --encoder_cache_dir; --teacher_cache_dir still caches the teacher's labels"
        )
    if mix_args is not None and mix_args.streaming and (caches.encoder_cache_dir or caches.teacher_cache_dir):
        raise UserError(
            "--encoder_cache_dir and --teacher_cache_dir are not supported with --streaming, as they require all clips"
        )
    changing = mix_args is not None and (mix_args.timestamp_probability or mix_args.condition_on_prev_probability)
    if changing and caches.teacher_cache_dir:
        raise UserError(
            "--teacher_cache_dir is not supported with --timestamp_probability and --condition_on_prev_probability: "
            "they change the labels in every epoch"
        )
    if caches.teacher_cache_dir and not models.teacher:
        raise UserError(
            "--teacher_cache_dir requires --teacher. To train on labels that are already cached, give --dataset "
            f"{caches.teacher_cache_dir}"
        )
    if caches.teacher_cache_dir and not config.uses_teacher:
        raise UserError(f"--teacher_cache_dir has no effect: --preset {config.preset} has no teacher phase")
    if caches.teacher_cache_dir and not 1 <= caches.teacher_top_k < vocabulary:
        raise UserError(
            f"--teacher_top_k must be between 1 and {vocabulary - 1}, less than the vocabulary, got "
            f"{caches.teacher_top_k}"
        )
    if caches.teacher_cache_dir and vocabulary > MAX_VOCABULARY:
        raise UserError(f"--teacher_cache_dir requires a vocabulary of at most {MAX_VOCABULARY}, got {vocabulary}")
    if caches.teacher_cache_dir and config.hidden_weight:
        raise UserError(
            f"--hidden_weight {config.hidden_weight:g} is not supported with --teacher_cache_dir, which doesn't "
            "contain the teacher's hidden states"
        )
    if caches.encoder_cache_dir and config.freeze_encoder is False:
        raise UserError(
            "--encoder_cache_dir requires a frozen encoder: leave it out, or leave out --freeze_encoder False and "
            "--encoder_recovery_epochs 0"
        )


def with_encoder_cache(
    collator: SpeechCollator,
    model: WhisperForConditionalGeneration,
    datasets: list[Dataset],
    caches: CacheArguments,
    config: ASKDConfig,
) -> SpeechCollator:
    """Return the collator with the encoder cache of `--encoder_cache_dir`. Missing outputs are computed first."""
    if caches.encoder_cache_dir is None:
        return collator
    if not encoder_is_deterministic(model.config):
        raise UserError(
            "--encoder_cache_dir requires a model without SpecAugment, layerdrop and dropout, which change the "
            "outputs of the encoder in every epoch: set them to 0 in its config.json, or train without the cache"
        )
    sharing = processes_sharing(Path(caches.encoder_cache_dir))  # without a shared disk each node computes all clips
    with others_wait():
        cache = cache_encoder(
            model,
            collator.processor,
            datasets,
            caches.encoder_cache_dir,
            batch_size=config.per_device_eval_batch_size,
            device=config.device,
            dtype=resolve_dtype("auto", config),
            process_index=sharing.index(config.process_index),
            num_processes=len(sharing),
            num_workers=config.dataloader_num_workers,
            stored=caches.encoder_cache_dtype,
            compile_options=config.compile_options,
        )
    cache.reload()
    return replace(collator, encoder_cache=cache)


def with_soft_labels(
    dataset: Dataset | SpeechStream,
    teacher: WhisperForConditionalGeneration | None,
    collator: SpeechCollator,
    models: ModelArguments,
    caches: CacheArguments,
    config: ASKDConfig,
    teacher_extractor: WhisperFeatureExtractor | None = None,
    settings: str | None = None,
) -> Dataset | SpeechStream:
    """Return the dataset with the columns of the teacher's soft labels: its own, or those of `--teacher_cache_dir`.

    The columns are removed if the objective doesn't use them.

    Args:
        teacher: with unquantized weights. It is cast and moved to the device of the run to compute soft labels.
        teacher_extractor: the teacher's feature extractor, if it differs from the student's in `collator`.
        settings: the result of `check_labels_of_cache`, if it was called.
    """
    if isinstance(dataset, SpeechStream):
        return dataset
    if not config.uses_teacher:
        return without_soft_labels(dataset)
    if not (has_soft_labels(dataset) or caches.teacher_cache_dir):
        alike = [name for name in SOFT_LABEL_COLUMNS if name in dataset.column_names]
        if alike:
            logger.warning("removed the columns %s, which aren't the soft labels of a teacher", ", ".join(alike))
        return without_soft_labels(dataset)
    if teacher is not None and settings is None:
        settings = soft_label_settings(teacher, collator, models, caches, config, teacher_extractor)
    if not caches.teacher_cache_dir:
        check_soft_labels(dataset, collator, config.temperature, settings)
        return dataset
    return cache_teacher(
        lambda: _for_soft_labels(teacher, models, config),
        settings,
        dataset,
        collator_of_teacher(collator, teacher, teacher_extractor, dataset, caches, config),
        caches.teacher_cache_dir,
        batch_size=config.per_device_eval_batch_size,
        autocast=autocast_dtype(config),
        num_workers=config.dataloader_num_workers,
    )


def check_labels_of_cache(
    teacher: WhisperForConditionalGeneration | None,
    collator: SpeechCollator,
    models: ModelArguments,
    caches: CacheArguments,
    config: ASKDConfig,
    teacher_extractor: WhisperFeatureExtractor | None = None,
) -> str | None:
    """Raise `UserError` if `--teacher_cache_dir` has soft labels of another teacher or run.

    It is called before the encoder cache is filled, which may take long. The arguments are those of
    `with_soft_labels`.

    Returns:
        The `teacher_settings` of the run; None without `--teacher_cache_dir`.
    """
    if teacher is None or caches.teacher_cache_dir is None:
        return None
    settings = soft_label_settings(teacher, collator, models, caches, config, teacher_extractor)
    check_teacher_cache(caches.teacher_cache_dir, settings)
    return settings


def _for_soft_labels(
    teacher: WhisperForConditionalGeneration, models: ModelArguments, config: ASKDConfig
) -> WhisperForConditionalGeneration:
    teacher = place_teacher(compress_teacher(teacher, models, config), config.device).eval()
    if config.compile_options is not None:
        teacher.compile(**config.compile_options)
    return teacher


def soft_label_settings(
    teacher: WhisperForConditionalGeneration,
    collator: SpeechCollator,
    models: ModelArguments,
    caches: CacheArguments,
    config: ASKDConfig,
    teacher_extractor: WhisperFeatureExtractor | None,
) -> str:
    """Return the `teacher_settings` of a run. The arguments are those of `with_soft_labels`."""
    dtype = autocast_dtype(config) or resolve_dtype(models.teacher_dtype, config)
    extractor = teacher_extractor or collator.processor.feature_extractor
    int8 = models.teacher_dtype == "int8"
    return teacher_settings(teacher, models.teacher, caches.teacher_top_k, config.temperature, dtype, int8, extractor)


def autocast_dtype(config: ASKDConfig) -> torch.dtype | None:
    """Return the compute dtype of mixed precision, None without it."""
    dtype = resolve_dtype("auto", config)
    return None if dtype == torch.float32 else dtype


def collator_of_teacher(
    collator: SpeechCollator,
    teacher: WhisperForConditionalGeneration,
    teacher_extractor: WhisperFeatureExtractor | None,
    dataset: Dataset,
    caches: CacheArguments,
    config: ASKDConfig,
) -> SpeechCollator:
    """Return the collator of the batches that the teacher computes soft labels of.

    It reads the outputs of the teacher's encoder from `--encoder_cache_dir` if those of all clips are there.

    Args:
        collator: of the student, with or without its encoder cache.
        teacher: with unquantized weights.
        teacher_extractor: None if the teacher takes the student's features.
    """
    if teacher_extractor is not None:
        collator = replace(collator, processor=WhisperProcessor(teacher_extractor, collator.processor.tokenizer))
    if caches.encoder_cache_dir is None:
        return collator
    # the student's, if it has the teacher's encoder and window, or that of an earlier run with the whole window
    dtype_of_cache = resolve_dtype("auto", config)
    directory, stored = caches.encoder_cache_dir, caches.encoder_cache_dtype
    found = find_encoder_cache(teacher, collator.processor, [dataset], directory, dtype_of_cache, stored)
    return replace(collator, encoder_cache=found)


def compress_teacher(
    teacher: WhisperForConditionalGeneration, models: ModelArguments, config: ASKDConfig
) -> WhisperForConditionalGeneration:
    """Cast the teacher to `teacher_dtype`, and offload its layers to CPU memory if `teacher_offload`. In place."""
    teacher = teacher.to(resolve_dtype(models.teacher_dtype, config))
    if models.teacher_dtype == "int8":
        quantize_decoder(teacher)
    if models.teacher_offload:
        offload([*teacher.model.encoder.layers, *teacher.model.decoder.layers], config.device)
    return teacher
