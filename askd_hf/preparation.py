"""From the options to what training needs: checked splits, the encoder's cache, the teacher's soft labels."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from .arguments import CacheArguments, DataArguments, ModelArguments, SpeechSource
from .config import ASKDConfig, resolve_dtype
from .data import SpeechCollator, cache_encoder, check_clips, load_speech, normalize_case
from .errors import UserError
from .student import encoder_is_deterministic
from .teacher_cache import ALL_COLUMNS, cache_teacher, check_soft_labels, has_soft_labels, teacher_settings
from .teacher_memory import offload, place_teacher, quantize_decoder

LARGEST_VOCABULARY = 2**16


def load_split(source: SpeechSource, limit: int | None, data_args: DataArguments) -> Dataset:
    """A split as it is, its first `limit` rows."""
    speech = load_speech(
        source.dataset,
        source.config,
        source.split,
        audio_column=data_args.audio_column,
        text_column=data_args.text_column,
        num_proc=data_args.preprocessing_num_workers,
    )
    if limit is not None:
        speech = speech.select(range(min(limit, len(speech))))
    return speech


def check_split(
    role: str,
    source: SpeechSource,
    speech: Dataset,
    data_args: DataArguments,
    report_to: str,
    collator: SpeechCollator,
) -> Dataset:
    """The rows that can be used, every clip decoded once. Those that can't are listed in the directory `report_to`."""
    return check_clips(
        normalize_case(speech, data_args.text_case, source.name),
        collator.label_ids,
        max_seconds=collator.processor.feature_extractor.chunk_length,
        max_label_tokens=collator.config.max_target_positions,
        on_bad_audio=data_args.on_bad_audio,
        num_proc=data_args.preprocessing_num_workers,
        report_file=Path(report_to) / f"skipped-{role}-{source.name}.csv",
        split=f"{role} split {source.name}",
    )


def check_caches(caches: CacheArguments, models: ModelArguments, config: ASKDConfig, vocabulary: int) -> None:
    """Raise `UserError` for cache options that can't be."""
    if caches.cache_teacher and not models.teacher:
        raise UserError(
            "--cache_teacher labels with a teacher: give it with --teacher. To train on what it has labelled before: "
            f"--dataset {caches.cache_teacher}"
        )
    if caches.cache_teacher and not config.uses_teacher:
        raise UserError(f"--cache_teacher has no use: --preset {config.preset} has no teacher phase")
    if caches.cache_teacher and not 1 <= caches.teacher_top_k < vocabulary:
        raise UserError(f"--teacher_top_k {caches.teacher_top_k} is not from 1 to {vocabulary - 1}, the vocabulary's")
    if caches.cache_teacher and vocabulary > LARGEST_VOCABULARY:
        raise UserError(f"--cache_teacher: {vocabulary} tokens; it keeps their ids as uint16, {LARGEST_VOCABULARY}")
    if caches.cache_encoder and not config.freeze_encoder:
        raise UserError("--cache_encoder needs an encoder that stays as it is: leave --freeze_encoder on")


def with_encoder_cache(
    collator: SpeechCollator,
    model: WhisperForConditionalGeneration,
    datasets: list[Dataset],
    caches: CacheArguments,
    config: ASKDConfig,
) -> SpeechCollator:
    """The collator, reading `model`'s encoder outputs from `--cache_encoder`; what isn't there is computed first."""
    if caches.cache_encoder is None:
        return collator
    if not encoder_is_deterministic(model.config):
        raise UserError(
            "--cache_encoder: the model's config asks for SpecAugment, layerdrop or dropout, with which the encoder's "
            "output is another in every epoch. Set them to 0 in its config.json, or train without the cache"
        )
    cache = cache_encoder(
        model,
        collator.processor,
        datasets,
        caches.cache_encoder,
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
    dataset: Dataset,
    teacher: WhisperForConditionalGeneration | None,
    collator: SpeechCollator,
    models: ModelArguments,
    caches: CacheArguments,
    config: ASKDConfig,
    teacher_extractor: WhisperFeatureExtractor | None = None,
) -> Dataset:
    """The dataset with its teacher columns: those it came with, checked, or those of `--cache_teacher`.

    Without either, or without a use for them, it has none.

    Args:
        teacher: with its full weights. To label it is cast and moved to where the run computes.
        teacher_extractor: if it isn't the student's, which `collator` has.
    """
    if not config.uses_teacher:
        return without_soft_labels(dataset)
    if not (has_soft_labels(dataset) or caches.cache_teacher):
        return without_soft_labels(dataset)
    dtype, autocast = resolve_dtype(models.teacher_dtype, config), resolve_dtype("auto", config)
    autocast = None if autocast == torch.float32 else autocast
    settings = None
    if teacher is not None:
        top_k, temperature = caches.teacher_top_k, config.temperature
        int8 = models.teacher_dtype == "int8"
        settings = teacher_settings(teacher, models.teacher, top_k, temperature, autocast or dtype, int8)
    if not caches.cache_teacher:
        check_soft_labels(dataset, collator, config.temperature, settings)
        return dataset
    if teacher_extractor is not None:
        collator = replace(collator, processor=WhisperProcessor(teacher_extractor, collator.processor.tokenizer))
    cache = collator.encoder_cache
    if cache is not None and not cache.is_of(teacher, collator.processor):
        collator = replace(collator, encoder_cache=None)
    return cache_teacher(
        lambda: place_teacher(light_teacher(teacher, models, config), config.device).eval(),
        settings,
        dataset,
        collator,
        caches.cache_teacher,
        batch_size=config.per_device_eval_batch_size,
        autocast=autocast,
        num_workers=config.dataloader_num_workers,
    )


def light_teacher(
    teacher: WhisperForConditionalGeneration, models: ModelArguments, config: ASKDConfig
) -> WhisperForConditionalGeneration:
    """The teacher itself, its weights as `teacher_dtype` says, and in CPU memory until they run if it is offloaded."""
    teacher = teacher.to(resolve_dtype(models.teacher_dtype, config))
    if models.teacher_dtype == "int8":
        quantize_decoder(teacher)
    if models.teacher_offload:
        offload([*teacher.model.encoder.layers, *teacher.model.decoder.layers], config.device)
    return teacher


def without_soft_labels(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in ALL_COLUMNS if name in dataset.column_names])
