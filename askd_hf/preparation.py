"""From the options to what training needs: speech that was checked, mixed or streamed, and the caches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from .arguments import CacheArguments, DataArguments, MixArguments, ModelArguments, SpeechSource
from .config import ASKDConfig, resolve_dtype
from .data import (
    Limits,
    SpeechCollator,
    SpeechStream,
    as_stream,
    cache_encoder,
    check_clips,
    clean_texts,
    load_speech,
    mix,
    to_stream,
    with_negatives,
)
from .data.augment import AugmentArguments
from .data.languages import with_language, without_language
from .data.negatives import negatives_from, synthetic_negatives
from .data.text import replace_column
from .errors import UserError
from .metrics import normalizer_for
from .student import encoder_is_deterministic
from .teacher_cache import ALL_COLUMNS, cache_teacher, check_soft_labels, has_soft_labels, teacher_settings
from .teacher_memory import offload, place_teacher, quantize_decoder

LARGEST_VOCABULARY = 2**16
SYNTHETIC = "synthetic"


class EvalSplit(NamedTuple):
    """Clips to evaluate on, of one language and task.

    Attributes:
        skipped: clips of the split that can't be used.
    """

    source: SpeechSource
    clips: Dataset
    skipped: int


# ---- speech ----


def load_split(
    source: SpeechSource,
    limit: int | None,
    data_args: DataArguments,
    multilingual: bool = False,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """A split, its first `limit` rows, with their languages for a multilingual model.

    Raises `UserError` as `load_speech`, and if a multilingual model isn't told the language.
    """
    speech = load_speech(
        source.dataset,
        source.config,
        source.split,
        audio_column=source.audio_column,
        text_column=source.text_column,
        num_proc=data_args.preprocessing_num_workers,
        streaming=streaming,
    )
    if limit is not None:
        speech = speech.take(limit) if streaming else speech.select(range(min(limit, len(speech))))
    if not multilingual:
        return without_language(speech)
    if source.language is None and "language" not in speech.column_names:
        raise UserError(
            f"--language is missing: the model is multilingual, and {source.name} has no column `language`; say what "
            "is spoken, as in --language english"
        )
    return with_language(speech, source.language, source.task)


def check_split(
    role: str,
    source: SpeechSource,
    speech: Dataset,
    data_args: DataArguments,
    report_to: str,
    collator: SpeechCollator,
) -> Dataset:
    """The rows that can be used, every clip decoded once. Those that can't are listed in the directory `report_to`.

    Of training those that the filters leave out are dropped and listed as well.
    """
    limits = limits_of(collator, data_args if role == "training" else None)
    normalize = _label_normalizer(data_args, source, collator) if role == "training" else None
    return check_clips(
        clean_texts(speech, data_args.text_case, source.name, normalize),
        collator.label_ids,
        limits,
        on_bad_audio=data_args.on_bad_audio,
        num_proc=data_args.preprocessing_num_workers,
        report_file=Path(report_to) / f"skipped-{role}-{source.name}.csv",
        split=f"{role} split {source.name}",
    )


def limits_of(collator: SpeechCollator, data_args: DataArguments | None = None, empty_text: bool = False) -> Limits:
    """What the model can take, and with `data_args` what its filters want."""
    filters = {}
    if data_args is not None:
        names = ("min_seconds", "max_seconds", "min_label_tokens", "max_label_tokens")
        filters = {name: getattr(data_args, name) for name in names}
    window = collator.processor.feature_extractor.chunk_length
    return Limits(window, collator.config.max_target_positions, **filters, empty_text=empty_text)


def _label_normalizer(
    data_args: DataArguments, source: SpeechSource, collator: SpeechCollator
) -> Callable[[str], str] | None:
    if data_args.text_normalizer == "none":
        return None
    spelling = collator.processor.tokenizer.english_spelling_normalizer or {}
    return normalizer_for(data_args.text_normalizer, source.language, spelling)[1]


def training_speech(
    data_args: DataArguments,
    mix_args: MixArguments,
    config: ASKDConfig,
    collator: SpeechCollator,
    multilingual: bool,
    report_to: str | None = None,
) -> Dataset | SpeechStream:
    """All that is trained on: every clip looked at once, or a stream that nobody has looked at.

    Args:
        report_to: the directory for lists of clips that are left out. Default: that of the run.

    Raises `UserError` for speech that can't be used, and for options that don't go together.
    """
    sources = data_args.train_sources()
    check_mix(mix_args, sources, config)
    report_to = report_to or config.output_dir
    seed = config.seed if config.data_seed is None else config.data_seed
    limit = data_args.max_train_samples
    splits = [load_split(source, limit, data_args, multilingual, mix_args.streaming) for source in sources]
    if mix_args.streaming:
        # what the rows of a stream say is known only when they come
        languages = sorted({source.language or "en" for source in sources}) if multilingual else []
        negatives = _negatives(mix_args, data_args, collator, languages)
        streams = [
            as_stream(clean_texts(split, data_args.text_case, source.name, normalize))
            for split, source in zip(splits, sources, strict=True)
            for normalize in [_label_normalizer(data_args, source, collator)]
        ]
        return SpeechStream(
            streams,
            mix_args.dataset_weights,
            seed,
            mix_args.shuffle_buffer,
            None if negatives is None else as_stream(to_stream(negatives)),
            mix_args.negatives_share,
            data_args.on_bad_audio,
        )
    checked = [
        check_split("training", source, split, data_args, report_to, collator)
        for split, source in zip(splits, sources, strict=True)
    ]
    speech = mix(checked, mix_args.dataset_weights, seed)
    languages = sorted({name for split in checked for name in split.unique("language")}) if multilingual else []
    negatives = _negatives(mix_args, data_args, collator, languages)
    if negatives is None:
        return speech
    negatives = check_clips(
        negatives,
        collator.label_ids,
        limits_of(collator, empty_text=True),
        on_bad_audio=data_args.on_bad_audio,
        num_proc=data_args.preprocessing_num_workers,
        report_file=Path(report_to) / "skipped-training-negatives.csv",
        split="negatives",
    )
    return with_negatives(speech, negatives, mix_args.negatives_share, seed)


def check_mix(mix_args: MixArguments, sources: list[SpeechSource], config: ASKDConfig) -> None:
    """Raise `UserError` for options of the mix that can't be."""
    weights = mix_args.dataset_weights
    if weights and len(weights) != len(sources):
        raise UserError(f"--dataset_weights: {len(weights)} of them for {len(sources)} of --dataset")
    if mix_args.streaming and config.max_steps <= 0:
        raise UserError("--streaming: nobody knows how long an epoch is; say how long to train with --max_steps")
    if mix_args.streaming and config.train_sampling_strategy == "group_by_length":
        raise UserError("--train_sampling_strategy group_by_length: the lengths of a stream aren't known")


def _negatives(
    mix_args: MixArguments, data_args: DataArguments, collator: SpeechCollator, languages: list[str]
) -> Dataset | None:
    """The clips without speech; of a multilingual model in its languages in turn, for silence is the same in all."""
    if mix_args.negatives is None:
        return None
    if mix_args.negatives == SYNTHETIC:
        negatives = synthetic_negatives(max_seconds=float(collator.processor.feature_extractor.chunk_length))
    else:
        workers = data_args.preprocessing_num_workers
        noises = load_speech(mix_args.negatives, None, "train", text_required=False, num_proc=workers)
        negatives = negatives_from(noises)
    if languages:
        in_turn = [languages[row % len(languages)] for row in range(len(negatives))]
        negatives = with_language(replace_column(negatives, "language", in_turn), None, "transcribe")
    return negatives


def evaluation_speech(
    data_args: DataArguments, config: ASKDConfig, collator: SpeechCollator, multilingual: bool
) -> dict[str, EvalSplit]:
    """By name the evaluation splits, each of one language and task, every clip looked at once."""
    sources = data_args.eval_sources()
    names = [source.name for source in sources]
    found = {}
    for source in sources:
        name = source.name if names.count(source.name) == 1 else f"{source.directory}-{source.split}"
        if name in found:
            raise UserError(f"--eval_splits: two splits are called {name}; evaluate them one after the other")
        split = without_soft_labels(load_split(source, data_args.max_eval_samples, data_args, multilingual))
        clips = check_split("evaluation", source, split, data_args, config.output_dir, collator)
        spoken = ["language", "task"] if multilingual else []
        kinds = sorted(set(zip(*(clips[column][:] for column in spoken), strict=True))) if spoken else []
        if len(kinds) < 2:
            if kinds:
                source = source._replace(language=kinds[0][0], task=kinds[0][1])
            found[name] = EvalSplit(source, clips, len(split) - len(clips))
            continue
        for language, task in kinds:
            pairs = enumerate(zip(clips["language"][:], clips["task"][:], strict=True))
            of_kind = clips.select([row for row, pair in pairs if pair == (language, task)])
            part = f"{name}-{language}" if task == "transcribe" else f"{name}-{language}-{task}"
            found[part] = EvalSplit(source._replace(language=language, task=task), of_kind, 0)
    return found


def without_soft_labels(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in ALL_COLUMNS if name in dataset.column_names])


# ---- caches ----


def check_caches(
    caches: CacheArguments,
    models: ModelArguments,
    config: ASKDConfig,
    vocabulary: int,
    mix_args: MixArguments | None = None,
    augment: AugmentArguments | None = None,
) -> None:
    """Raise `UserError` for cache options that can't be."""
    if augment is not None and augment.augment and caches.cache_encoder:
        raise UserError("--augment: the encoder's output of a clip that is always another can't be cached")
    if mix_args is not None and mix_args.streaming and (caches.cache_encoder or caches.cache_teacher):
        raise UserError("--cache_encoder, --cache_teacher: they need all clips at once, which --streaming never has")
    changing = mix_args is not None and (mix_args.timestamp_probability or mix_args.prompt_probability)
    if changing and caches.cache_teacher:
        raise UserError(
            "--cache_teacher: it has the teacher's answers for a clip's plain labels, and with "
            "--timestamp_probability and --prompt_probability they change from epoch to epoch"
        )
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
    if caches.cache_teacher and config.hidden_weight:
        raise UserError(
            f"--hidden_weight {config.hidden_weight:g} needs the teacher's hidden states at every step, which "
            "--cache_teacher doesn't keep: leave out one of them"
        )
    if caches.cache_encoder and config.freeze_encoder is False:
        raise UserError(
            "--cache_encoder needs an encoder that stays as it is: leave it out, or keep the encoder whole and frozen "
            "(no --encoder_layers, no --freeze_encoder False)"
        )


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
    dataset: Dataset | SpeechStream,
    teacher: WhisperForConditionalGeneration | None,
    collator: SpeechCollator,
    models: ModelArguments,
    caches: CacheArguments,
    config: ASKDConfig,
    teacher_extractor: WhisperFeatureExtractor | None = None,
) -> Dataset | SpeechStream:
    """The dataset with its teacher columns: those it came with, checked, or those of `--cache_teacher`.

    Without either, or without a use for them, it has none.

    Args:
        teacher: with its full weights. To label it is cast and moved to where the run computes.
        teacher_extractor: if it isn't the student's, which `collator` has.
    """
    if isinstance(dataset, SpeechStream):
        return dataset
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
