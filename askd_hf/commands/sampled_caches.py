"""The caches of a run for a sample of its clips, in a temporary directory, and the cost of the whole caches."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset

from ..arguments import CacheArguments
from ..config import ASKDConfig, resolve_dtype
from ..data import SpeechCollator, SpeechStream, run_encoder
from ..data.encoder_cache import encoder_cache_space
from ..data.soft_labels import compute_soft_labels
from ..data.teacher_cache import teacher_cache_space
from ..evaluation.latency import synchronized_time
from ..training.caches import (
    autocast_dtype,
    collator_of_teacher,
    soft_label_settings,
    with_encoder_cache,
    with_soft_labels,
)
from ..training.run_plan import RunPlan
from .distill import Models, Options, Speech, fill_caches
from .plan_lines import add_cache
from .scratch import Scratch


def fill_sample(
    options: Options, models: Models, speech: Speech, sample: Speech, scratch: Scratch, plan: RunPlan
) -> tuple[Models, Speech]:
    """Call `fill_caches` for the sample, with temporary caches, and add the cost of those of `speech` to the plan.

    Raises `UserError` as `fill_caches` does for `speech` before it computes anything.
    """
    if isinstance(speech.train, SpeechStream):
        return fill_caches(options, models, sample)
    encoder_dir, teacher_dir = options.caches.encoder_cache_dir, options.caches.teacher_cache_dir
    temporary = replace(
        options.caches,
        encoder_cache_dir=encoder_dir and scratch.directory(encoder_dir),
        teacher_cache_dir=teacher_dir and scratch.directory(teacher_dir),
    )
    if temporary.encoder_cache_dir:
        _add_encoder_cache(options, temporary, models, speech, sample, plan)
    options_of_sample = options._replace(caches=temporary)
    if temporary.teacher_cache_dir:
        return _fill_teacher_cache(options, options_of_sample, models, speech, sample, plan)
    # checks the soft labels that the dataset has
    arguments = models.teacher, speech.collator, options.model, temporary, options.config, models.teacher_extractor
    whole: Any = with_soft_labels(speech.train, *arguments)
    train: Any = sample.train
    sample = sample._replace(train=train.select_columns(whole.column_names))
    return fill_caches(options_of_sample, models, sample)


def _add_encoder_cache(
    options: Options, temporary: CacheArguments, models: Models, speech: Speech, sample: Speech, plan: RunPlan
) -> None:
    """Fill the encoder cache of the sample, and add the cost of that of `speech`."""
    config, student, directory = options.config, models.student, options.caches.encoder_cache_dir
    dtype = resolve_dtype("auto", config)
    with_encoder_cache(sample.collator, student, [sample.train, *sample.evaluation.values()], temporary, config)
    clips = [speech.train, *speech.evaluation.values()]
    space = encoder_cache_space(student, models.processor, clips, directory, dtype, options.caches.encoder_cache_dtype)
    encoder = student.to(config.device).model.encoder

    def encode(batch: dict[str, Any]) -> None:
        with torch.no_grad(), torch.autocast(config.device.type, dtype, enabled=dtype != torch.float32):
            run_encoder(encoder, batch["input_features"].to(config.device))

    seconds = _seconds_per_clip(speech.collator, encode, sample.train, config)
    add_cache(plan, "encoder cache", directory, space, seconds)


def _fill_teacher_cache(
    options: Options, options_of_sample: Options, models: Models, speech: Speech, sample: Speech, plan: RunPlan
) -> tuple[Models, Speech]:
    """Fill the caches of the sample, and add the cost of the teacher cache of `speech`."""
    config, caches, teacher, extractor = options.config, options.caches, models.teacher, models.teacher_extractor
    settings = soft_label_settings(teacher, speech.collator, options.model, caches, config, extractor)
    space = teacher_cache_space(settings, speech.train, speech.collator, caches.teacher_cache_dir)
    # outputs of the teacher's encoder: of an earlier run, else those of the student's encoder if it is the same
    both = (caches, speech.train), (options_of_sample.caches, sample.train)
    found = [collator_of_teacher(speech.collator, teacher, extractor, clips, of, config) for of, clips in both]
    collator = next((one for one in found if one.encoder_cache is not None), found[0])
    filled = fill_caches(options_of_sample, models, sample)  # the teacher is on its device now, in its dtype

    def label(batch: dict[str, Any]) -> None:
        compute_soft_labels(teacher, batch, caches.teacher_top_k, config.temperature, autocast_dtype(config))

    seconds = _seconds_per_clip(collator, label, sample.train, config)
    add_cache(plan, "teacher cache", caches.teacher_cache_dir, space, seconds)
    return filled


def _seconds_per_clip(
    collator: SpeechCollator, compute: Callable[[dict[str, Any]], None], clips: Dataset, config: ASKDConfig
) -> float:
    """Return the seconds per clip of computing a batch that the workers prepare meanwhile."""
    rows = list(clips.select(range(min(len(clips), config.per_device_eval_batch_size))))
    collator(rows[:1])  # the first call is slower
    start = time.perf_counter()
    batch = collator(rows)
    loaded = synchronized_time(config.device)
    compute(batch)
    loading, computing = loaded - start, synchronized_time(config.device) - loaded
    workers = config.dataloader_num_workers
    return (max(loading / workers, computing) if workers else loading + computing) / len(rows)
