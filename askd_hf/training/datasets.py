"""Load the training and evaluation sets that the options name."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from ..arguments import DataArguments, MixArguments, SpeechSource, names_of
from ..config import ASKDConfig
from ..data import (
    Limits,
    SpeechCollator,
    SpeechStream,
    clean_texts,
    filter_invalid_clips,
    load_speech_dataset,
    mix,
    select_training_columns,
    to_iterable_dataset,
    with_no_speech,
)
from ..data.columns import JOINED_COLUMNS, longest_first, with_features
from ..data.languages import UNKNOWN, language_code, with_language, without_language
from ..data.long_clips import cut_long_clips, has_times
from ..data.no_speech import as_no_speech, synthetic_no_speech
from ..data.soft_labels import warn_of_unused_soft_labels, without_soft_labels
from ..data.stream import warn_of_repeated_reads
from ..data.text import SAMPLE_SIZE, basic_normalizer, replace_column
from ..errors import UserError
from ..evaluation.comparison import EvalSplit
from ..hub.provenance import public_name
from ..progress import Bar, hide_datasets_bars, progress_bar
from .joined_clips import concatenated, packing_of

SYNTHETIC = "synthetic"  # value of --no_speech_dataset


def load_split(
    source: SpeechSource,
    limit: int | None,
    data_args: DataArguments,
    multilingual: bool = False,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load the first `limit` rows of a split, with language and task columns for a multilingual model.

    Raises `UserError` as `load_speech_dataset` does, and if the language for a multilingual model is unknown.
    """
    speech = load_speech_dataset(
        source.dataset,
        source.config,
        source.split,
        audio_column_name=source.audio_column_name,
        text_column_name=source.text_column_name,
        num_proc=data_args.preprocessing_num_workers,
        streaming=streaming,
    )
    if "joined_keys" in speech.column_names:  # saved by --teacher_cache_dir; validation reads single clips
        with hide_datasets_bars():
            speech = speech.filter(lambda keys: keys is None, input_columns="joined_keys")
        speech = speech.remove_columns(list(JOINED_COLUMNS))
    if limit is not None:
        speech = speech.take(limit)
    if not multilingual:
        return without_language(speech, source.dataset)
    if source.language is None and "language" not in speech.column_names:
        raise UserError(
            f"--language is required: the model is multilingual, and {source.dataset} has no column `language`. Give "
            "the language, such as --language english"
        )
    return with_language(speech, source.language, source.task, source.dataset)


def validate_split(
    role: str,
    name: str,
    speech: Dataset,
    limits: Limits,
    data_args: DataArguments,
    report_to: str,
    collator: SpeechCollator,
    bar: Bar | None = None,
) -> Dataset:
    """Return the valid rows that pass the filters. See `filter_invalid_clips`.

    Args:
        role: training or evaluation.
        name: of the split, see `names_of`.
        report_to: the directory for the list of skipped rows.
        bar: see `filter_invalid_clips`.
    """
    return filter_invalid_clips(
        speech,
        collator.label_ids,
        limits,
        on_bad_audio=data_args.on_bad_audio,
        num_proc=data_args.preprocessing_num_workers,
        recheck=data_args.recheck,
        share_work=True,
        report_file=Path(report_to) / f"skipped-{role}-{name}.csv",
        split=f"{role} split {name}",
        bar=bar,
    )


def model_limits(collator: SpeechCollator, data_args: DataArguments) -> Limits:
    """Return the limits of the model: the duration of a clip and the number of label tokens."""
    return Limits(
        collator.processor.feature_extractor.chunk_length,
        collator.config.max_target_positions,
        skip_long=data_args.long_clips != "error",
    )


def training_limits(collator: SpeechCollator, data_args: DataArguments) -> Limits:
    """Return the limits of the model and of the filters."""
    return replace(
        model_limits(collator, data_args),
        min_duration_in_seconds=data_args.min_duration_in_seconds,
        max_duration_in_seconds=data_args.max_duration_in_seconds,
        min_label_length=data_args.min_label_length,
        max_label_length=data_args.max_label_length,
        check_timestamps=collator.timestamp_probability > 0.0,
        check_prompts=collator.condition_on_prev_probability > 0.0,
    )


def _label_normalizer(
    data_args: DataArguments, source: SpeechSource, collator: SpeechCollator
) -> Callable[[str], str] | None:
    if data_args.text_normalizer == "none":
        return None
    if data_args.text_normalizer == "basic":
        return basic_normalizer()  # without splitting letters, which is for scoring only
    if source.task != "translate" and language_code(source.language) not in (None, "en"):
        raise UserError(
            f"--text_normalizer english requires English transcripts, and {source.dataset} is {source.language}; "
            "choose basic"
        )
    return EnglishTextNormalizer(collator.processor.tokenizer.english_spelling_normalizer or {})


def training_speech(
    data_args: DataArguments,
    mix_args: MixArguments,
    config: ASKDConfig,
    collator: SpeechCollator,
    multilingual: bool,
    report_to: str | None = None,
) -> Dataset | SpeechStream:
    """Return the training set: validated and mixed, or an unvalidated stream.

    Args:
        report_to: the directory for the lists of skipped rows. Default: `config.output_dir`.

    Raises `UserError` if the data is invalid, or options don't fit together.
    """
    sources = data_args.train_sources()
    report_to = report_to or config.output_dir
    seed = config.order_seed
    names = names_of(sources)
    cut_long = data_args.long_clips == "cut"
    splits = training_splits(data_args, collator, multilingual, mix_args.streaming, cut_long)
    _check_columns(mix_args, splits)
    limits = training_limits(collator, data_args)
    if mix_args.streaming:
        spoken = sorted({pair for split in splits for pair in _spoken_first(split)}) if multilingual else []
        no_speech_dataset = _negatives(mix_args, data_args, collator, spoken)
        warn_of_repeated_reads(names, splits, config.world_size)
        return SpeechStream(
            [select_training_columns(split) for split in splits],
            mix_args.dataset_probabilities,
            seed,
            mix_args.shuffle_buffer_size,
            None if no_speech_dataset is None else select_training_columns(to_iterable_dataset(no_speech_dataset)),
            mix_args.no_speech_probability,
            data_args.on_bad_audio,
            packing=packing_of(mix_args, limits, collator),
            process=config.process_index,
            processes=config.world_size,
            options=_row_options(data_args, mix_args),
        )
    with progress_bar(sum(map(len, splits)), "Checking training clips") as bar:
        checked = [
            validate_split("training", name, split, limits, data_args, report_to, collator, bar)
            for split, name in zip(splits, names, strict=True)
        ]
    if mix_args.concatenate_probability:
        checked = [concatenated(split, mix_args, limits, seed) for split in checked]
    if config.uses_teacher:
        no_speech = [] if mix_args.no_speech_dataset is None else ["--no_speech_dataset"]
        warn_of_unused_soft_labels(dict(zip(names, checked, strict=True)), no_speech)
    speech = mix(checked, mix_args.dataset_probabilities, seed)
    spoken = sorted({pair for split in checked for pair in spoken_in(split)}) if multilingual else []
    no_speech_dataset = _negatives(mix_args, data_args, collator, spoken)
    if no_speech_dataset is not None:
        limits = model_limits(collator, data_args).for_no_speech()
        no_speech_dataset = validate_split(
            "training", "no_speech", no_speech_dataset, limits, data_args, report_to, collator
        )
        if mix_args.concatenate_probability:
            no_speech_dataset = with_features(no_speech_dataset, Features(no_speech_dataset.features | JOINED_COLUMNS))
        speech = with_no_speech(speech, no_speech_dataset, mix_args.no_speech_probability, seed)
    return speech


def _row_options(data_args: DataArguments, mix_args: MixArguments) -> dict[str, Any]:
    """Return the options that change the rows of a stream."""
    names = "text_case", "text_normalizer", "max_train_samples", "audio_column_name", "text_column_name"
    sources = data_args.train_sources()
    spoken = [[language_code(source.language), source.task] for source in sources]
    sounds, _ = public_name(mix_args.no_speech_dataset)  # it may have moved
    return {name: getattr(data_args, name) for name in names} | {"spoken": spoken, "no_speech_dataset": sounds}


def training_splits(
    data_args: DataArguments,
    collator: SpeechCollator,
    multilingual: bool,
    streaming: bool = False,
    cut_long: bool = False,
) -> list[Dataset | IterableDataset]:
    """Load the rows of each training set, with the transcripts that training uses.

    Args:
        cut_long: True to cut clips that are longer than the student's window, in the sets with the times of words or
            segments. The first start decodes all audio for this; otherwise none is decoded.

    Raises `UserError` if `cut_long`, no set has times, and one has longer clips.
    """
    sources = data_args.train_sources()
    for source in sources:  # before the first one is loaded
        _label_normalizer(data_args, source, collator)

    splits = [
        load_split(source, data_args.max_train_samples, data_args, multilingual, streaming) for source in sources
    ]
    if cut_long:
        window, workers = collator.processor.feature_extractor.chunk_length, data_args.preprocessing_num_workers
        some_have_times = any(has_times(split) for split in splits)
        splits = [
            split
            if some_have_times and not has_times(split)  # its longer clips are skipped
            else cut_long_clips(split, window, source.dataset, workers, data_args.recheck)
            for split, source in zip(splits, sources, strict=True)
        ]
    return [
        with_clean_labels(split, name, source, data_args, collator)
        for split, source, name in zip(splits, sources, names_of(sources), strict=True)
    ]


def with_clean_labels(
    split: Dataset | IterableDataset,
    name: str,
    source: SpeechSource,
    data_args: DataArguments,
    collator: SpeechCollator,
) -> Dataset | IterableDataset:
    """Return rows with the transcripts that training uses: as `--text_case` and `--text_normalizer` say.

    Args:
        name: of the rows, for messages.
        source: whose language the normalizer must support.
    """
    # normalizers return lower case, but not for every language
    text_case = data_args.text_case if data_args.text_normalizer == "none" else "lower"
    written_in = "en" if data_args.text_normalizer == "english" else None
    return clean_texts(split, text_case, name, _label_normalizer(data_args, source, collator), written_in)


def spoken_in(dataset: Dataset) -> list[tuple[str, str]]:
    """Return the distinct pairs of language and task in the rows, sorted; empty without these columns."""
    return sorted(set(_spoken(dataset)))


def _spoken(dataset: Dataset) -> list[tuple[str, str]]:
    """Return language and task of every row; empty without these columns."""
    if "language" not in dataset.column_names:
        return []
    return list(zip(dataset["language"][:], dataset["task"][:], strict=True))


def _spoken_first(stream: IterableDataset) -> set[tuple[str, str]]:
    """Return the distinct pairs of language and task in the first rows of a stream, as it isn't read in advance."""
    rows = stream.select_columns(["language", "task"]).take(SAMPLE_SIZE)
    return {(row["language"], row["task"]) for row in rows if row["language"] != UNKNOWN}


def _check_columns(mix_args: MixArguments, splits: list[Dataset | IterableDataset]) -> None:
    """Raise `UserError` if an option requires a column that no dataset has."""
    wanted = {"timestamp_probability": "segments", "condition_on_prev_probability": "prompt"}
    for option, column in wanted.items():
        if getattr(mix_args, option) and not any(column in split.column_names for split in splits):
            raise UserError(
                f"--{option} requires a column `{column}`, and no dataset has one; askd-hf pseudo-label creates it"
            )


def _negatives(
    mix_args: MixArguments, data_args: DataArguments, collator: SpeechCollator, spoken: list[tuple[str, str]]
) -> Dataset | None:
    """Return the clips without speech. For a multilingual model they get its languages and tasks in turn.

    Args:
        spoken: pairs of language and task; empty for an English-only model.
    """
    if mix_args.no_speech_dataset == SYNTHETIC:
        no_speech_dataset = synthetic_no_speech(
            max_duration_in_seconds=float(collator.processor.feature_extractor.chunk_length)
        )
    else:
        noises = no_speech_rows(mix_args, data_args)
        if noises is None:
            return None
        no_speech_dataset = as_no_speech(noises)
    for column, values in zip(("language", "task"), zip(*spoken, strict=True), strict=False):
        in_turn = [values[row % len(values)] for row in range(len(no_speech_dataset))]
        no_speech_dataset = replace_column(no_speech_dataset, column, in_turn)
    return no_speech_dataset


def no_speech_rows(mix_args: MixArguments, data_args: DataArguments) -> Dataset | None:
    """Return the rows of `--no_speech_dataset`; None if it isn't given, or `synthetic`. Nothing is decoded."""
    if mix_args.no_speech_dataset in (None, SYNTHETIC):
        return None
    workers = data_args.preprocessing_num_workers
    return load_speech_dataset(mix_args.no_speech_dataset, None, "train", text_required=False, num_proc=workers)


def evaluation_rows(data_args: DataArguments, multilingual: bool) -> dict[str, Dataset]:
    """Return the rows of the evaluation splits by name. Nothing is decoded. Raises `UserError` for a missing split."""
    sources = data_args.eval_sources()
    return {
        name: clean_texts(
            without_soft_labels(load_split(source, data_args.max_eval_samples, data_args, multilingual)),
            data_args.text_case,
            name,
        )
        for source, name in zip(sources, names_of(sources), strict=True)
    }


def evaluation_speech(
    splits: dict[str, Dataset], data_args: DataArguments, config: ASKDConfig, collator: SpeechCollator
) -> dict[str, EvalSplit]:
    """Return the validated evaluation splits by name, each of one language and task.

    The clips are sorted, longest first: a batch is decoded until its longest text ends.

    Args:
        splits: the result of `evaluation_rows`.
    """
    sources, limits = data_args.eval_sources(), model_limits(collator, data_args)
    found: dict[str, EvalSplit] = {}
    if not splits:
        return found
    with progress_bar(sum(map(len, splits.values())), "Checking evaluation clips") as bar:
        for source, (name, split) in zip(sources, splits.items(), strict=True):
            clips = validate_split("evaluation", name, split, limits, data_args, config.output_dir, collator, bar)
            found |= _by_language(source, name, split, longest_first(clips))
    return found


def _by_language(source: SpeechSource, name: str, split: Dataset, clips: Dataset) -> dict[str, EvalSplit]:
    """Split the valid `clips` of a `split` by language and task."""
    pairs = spoken_in(clips)
    if not pairs:
        return {name: EvalSplit(source, clips, len(split) - len(clips))}
    spoken, total = _spoken(clips), Counter(_spoken(split))
    found = {}
    for language, task in pairs:
        rows = [row for row, pair in enumerate(spoken) if pair == (language, task)]
        suffix = f"-{language}" + ("" if task == "transcribe" else f"-{task}") if len(pairs) > 1 else ""
        pair_clips = clips.select(rows) if len(pairs) > 1 else clips
        pair_source = source._replace(language=language, task=task)
        found[name + suffix] = EvalSplit(pair_source, pair_clips, total[language, task] - len(rows))
    return found
