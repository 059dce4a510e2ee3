"""From the options to what training needs besides speech: caches, and a teacher that takes little memory."""

import logging
from dataclasses import replace

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import CacheArguments, MixArguments, ModelArguments
from ..config import ASKDConfig, resolve_dtype
from ..data import SpeechCollator, SpeechStream, cache_encoder
from ..data.augment import AugmentArguments
from ..data.soft_labels import (
    SOFT_LABEL_COLUMNS,
    check_soft_labels,
    has_soft_labels,
    teacher_settings,
    without_soft_labels,
)
from ..data.teacher_cache import cache_teacher
from ..errors import UserError
from ..models.student import encoder_is_deterministic
from ..models.teacher_memory import offload, place_teacher, quantize_decoder

logger = logging.getLogger(__name__)

LARGEST_VOCABULARY = 2**16


def check_caches(
    caches: CacheArguments,
    models: ModelArguments,
    config: ASKDConfig,
    vocabulary: int,
    mix_args: MixArguments | None = None,
    augment: AugmentArguments | None = None,
) -> None:
    """Raise `UserError` for cache options that can't be."""
    if augment is not None and augment.augmentations and caches.encoder_cache_dir:
        raise UserError(
            "--augmentations can't be combined with --encoder_cache_dir: augmented audio differs in every epoch"
        )
    if mix_args is not None and mix_args.streaming and (caches.encoder_cache_dir or caches.teacher_cache_dir):
        raise UserError(
            "--encoder_cache_dir, --teacher_cache_dir: they need all clips at once, which --streaming never has"
        )
    changing = mix_args is not None and (mix_args.timestamp_probability or mix_args.condition_on_prev_probability)
    if changing and caches.teacher_cache_dir:
        raise UserError(
            "--teacher_cache_dir: it has the teacher's answers for a clip's plain labels, and with "
            "--timestamp_probability and --condition_on_prev_probability they change from epoch to epoch"
        )
    if caches.teacher_cache_dir and not models.teacher:
        raise UserError(
            "--teacher_cache_dir labels with a teacher: give it with --teacher. To train on what it has labelled before: "
            f"--dataset {caches.teacher_cache_dir}"
        )
    if caches.teacher_cache_dir and not config.uses_teacher:
        raise UserError(f"--teacher_cache_dir has no use: --preset {config.preset} has no teacher phase")
    if caches.teacher_cache_dir and not 1 <= caches.teacher_top_k < vocabulary:
        raise UserError(f"--teacher_top_k {caches.teacher_top_k} is not from 1 to {vocabulary - 1}, the vocabulary's")
    if caches.teacher_cache_dir and vocabulary > LARGEST_VOCABULARY:
        raise UserError(
            f"--teacher_cache_dir: {vocabulary} tokens; it keeps their ids as uint16, {LARGEST_VOCABULARY}"
        )
    if caches.teacher_cache_dir and config.hidden_weight:
        raise UserError(
            f"--hidden_weight {config.hidden_weight:g} needs the teacher's hidden states at every step, which "
            "--teacher_cache_dir doesn't keep: leave out one of them"
        )
    if caches.encoder_cache_dir and config.freeze_encoder is False:
        raise UserError(
            "--encoder_cache_dir needs an encoder that stays as it is: leave it out, or keep the encoder whole and frozen "
            "(no --encoder_layers, no --freeze_encoder False)"
        )


def with_encoder_cache(
    collator: SpeechCollator,
    model: WhisperForConditionalGeneration,
    datasets: list[Dataset],
    caches: CacheArguments,
    config: ASKDConfig,
) -> SpeechCollator:
    """The collator, reading `model`'s encoder outputs from `--encoder_cache_dir`; what isn't there is computed first."""
    if caches.encoder_cache_dir is None:
        return collator
    if not encoder_is_deterministic(model.config):
        raise UserError(
            "--encoder_cache_dir: the model's config asks for SpecAugment, layerdrop or dropout, with which the encoder's "
            "output is another in every epoch. Set them to 0 in its config.json, or train without the cache"
        )
    cache = cache_encoder(
        model,
        collator.processor,
        datasets,
        caches.encoder_cache_dir,
        batch_size=config.per_device_eval_batch_size,
        device=config.device,
        dtype=resolve_dtype("auto", config),
        process_index=config.process_index,
        num_processes=config.world_size,
        num_workers=config.dataloader_num_workers,
    )
    PartialState().wait_for_everyone()
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
) -> Dataset | SpeechStream:
    """The dataset with its teacher columns: those it came with, checked, or those of `--teacher_cache_dir`.

    Without either, or without a use for them, it has none.

    Args:
        teacher: with its full weights. To label it is cast and moved to where the run computes.
        teacher_extractor: if it isn't the student's, which `collator` has.
    """
    if isinstance(dataset, SpeechStream):
        return dataset
    if not config.uses_teacher:
        return without_soft_labels(dataset)
    if not (has_soft_labels(dataset) or caches.teacher_cache_dir):
        alike = [name for name in SOFT_LABEL_COLUMNS if name in dataset.column_names]
        if alike:
            logger.warning("the columns %s aren't the soft labels of a teacher: left out", ", ".join(alike))
        return without_soft_labels(dataset)
    dtype, autocast = resolve_dtype(models.teacher_dtype, config), resolve_dtype("auto", config)
    autocast = None if autocast == torch.float32 else autocast
    settings = None
    if teacher is not None:
        top_k, temperature = caches.teacher_top_k, config.temperature
        int8 = models.teacher_dtype == "int8"
        extractor = teacher_extractor or collator.processor.feature_extractor
        settings = teacher_settings(teacher, models.teacher, top_k, temperature, autocast or dtype, int8, extractor)
    if not caches.teacher_cache_dir:
        check_soft_labels(dataset, collator, config.temperature, settings)
        return dataset
    if teacher_extractor is not None:
        collator = replace(collator, processor=WhisperProcessor(teacher_extractor, collator.processor.tokenizer))
    cache = collator.encoder_cache
    if cache is not None and not cache.matches(teacher, collator.processor):
        collator = replace(collator, encoder_cache=None)
    return cache_teacher(
        lambda: place_teacher(compress_teacher(teacher, models, config), config.device).eval(),
        settings,
        dataset,
        collator,
        caches.teacher_cache_dir,
        batch_size=config.per_device_eval_batch_size,
        autocast=autocast,
        num_workers=config.dataloader_num_workers,
    )


def compress_teacher(
    teacher: WhisperForConditionalGeneration, models: ModelArguments, config: ASKDConfig
) -> WhisperForConditionalGeneration:
    """The teacher itself, its weights as `teacher_dtype` says, and in CPU memory until they run if it is offloaded."""
    teacher = teacher.to(resolve_dtype(models.teacher_dtype, config))
    if models.teacher_dtype == "int8":
        quantize_decoder(teacher)
    if models.teacher_offload:
        offload([*teacher.model.encoder.layers, *teacher.model.decoder.layers], config.device)
    return teacher
