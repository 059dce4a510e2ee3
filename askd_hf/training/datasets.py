"""From the options to speech: splits that are checked, mixed or streamed, those of evaluation by language."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..arguments import NONE, DataArguments, MixArguments, SpeechSource, names_of
from ..config import ASKDConfig
from ..data import (
    Limits,
    SpeechCollator,
    SpeechStream,
    as_stream,
    clean_texts,
    filter_invalid_clips,
    load_speech_dataset,
    mix,
    to_stream,
    with_negatives,
)
from ..data.languages import language_code, with_language, without_language
from ..data.negatives import negatives_from, synthetic_negatives
from ..data.teacher_cache import without_soft_labels
from ..data.text import basic_normalizer, replace_column
from ..errors import UserError
from ..evaluation.comparison import EvalSplit
from ..evaluation.metrics import normalizer_for, text_language

SYNTHETIC = "synthetic"
CHECKPOINTS_OF_A_STREAM = 10


def load_split(
    source: SpeechSource,
    limit: int | None,
    data_args: DataArguments,
    multilingual: bool = False,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """A split, its first `limit` rows, with their languages for a multilingual model.

    Raises `UserError` as `load_speech_dataset`, and if a multilingual model isn't told the language.
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
    if limit is not None:
        speech = speech.take(limit) if streaming else speech.select(range(min(limit, len(speech))))
    if not multilingual:
        return without_language(speech, source.dataset)
    if source.language is None and "language" not in speech.column_names:
        raise UserError(
            f"--language is missing: the model is multilingual, and {source.dataset} has no column `language`; say "
            "what is spoken, as in --language english"
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
) -> Dataset:
    """The rows that can be used and are wanted, every clip decoded once; the others are listed in `report_to`.

    Args:
        role: training or evaluation.
        name: of the split in messages and of the list, see `names_of`.
    """
    return filter_invalid_clips(
        speech,
        collator.label_ids,
        limits,
        on_bad_audio=data_args.on_bad_audio,
        num_proc=data_args.preprocessing_num_workers,
        report_file=Path(report_to) / f"skipped-{role}-{name}.csv",
        split=f"{role} split {name}",
    )


def model_limits(collator: SpeechCollator) -> Limits:
    """What the model can take."""
    return Limits(collator.processor.feature_extractor.chunk_length, collator.config.max_target_positions)


def training_limits(collator: SpeechCollator, data_args: DataArguments) -> Limits:
    """Likewise, and what the filters want."""
    return replace(
        model_limits(collator),
        min_duration_in_seconds=data_args.min_duration_in_seconds,
        max_duration_in_seconds=data_args.max_duration_in_seconds,
        min_label_length=data_args.min_label_length,
        max_label_length=data_args.max_label_length,
        times=collator.timestamps > 0.0,
        prompts=collator.prompts > 0.0,
    )


def _label_normalizer(
    data_args: DataArguments, source: SpeechSource, collator: SpeechCollator
) -> Callable[[str], str] | None:
    if data_args.text_normalizer == "none":
        return None
    if data_args.text_normalizer == "basic":
        return basic_normalizer()  # and never by letter, which is for scoring
    if source.task != "translate" and language_code(source.language) not in (None, "en"):
        raise UserError(f"--text_normalizer english: {source.dataset} is {source.language}; choose basic")
    return EnglishTextNormalizer(collator.processor.tokenizer.english_spelling_normalizer or {})


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
    report_to = report_to or config.output_dir
    seed = config.order_seed
    limit = data_args.max_train_samples
    names = names_of(sources)
    normalizers = [_label_normalizer(data_args, source, collator) for source in sources]
    # a normalizer gives lower case, and none knows that of every language
    text_case = data_args.text_case if data_args.text_normalizer == "none" else "lower"
    splits = [
        clean_texts(
            load_split(source, limit, data_args, multilingual, mix_args.streaming),
            text_case,
            name,
            normalize,
            written_in="en" if data_args.text_normalizer == "english" else None,
        )
        for source, name, normalize in zip(sources, names, normalizers, strict=True)
    ]
    _check_columns(mix_args, splits)
    if mix_args.streaming:
        # what the rows of a stream say is known only when they come
        pairs = {(language_code(s.language) or "en", s.task or "transcribe") for s in sources} if multilingual else ()
        no_speech_dataset = _negatives(mix_args, data_args, collator, sorted(pairs))
        return SpeechStream(
            [as_stream(split) for split in splits],
            mix_args.dataset_probabilities,
            seed,
            mix_args.shuffle_buffer_size,
            None if no_speech_dataset is None else as_stream(to_stream(no_speech_dataset)),
            mix_args.no_speech_probability,
            data_args.on_bad_audio,
        )
    limits = training_limits(collator, data_args)
    checked = [
        validate_split("training", name, split, limits, data_args, report_to, collator)
        for split, name in zip(splits, names, strict=True)
    ]
    speech = mix(checked, mix_args.dataset_probabilities, seed)
    spoken = sorted({pair for split in checked for pair in spoken_in(split)}) if multilingual else []
    no_speech_dataset = _negatives(mix_args, data_args, collator, spoken)
    if no_speech_dataset is None:
        return speech
    limits = model_limits(collator).of_negatives()
    no_speech_dataset = validate_split(
        "training", "negatives", no_speech_dataset, limits, data_args, report_to, collator
    )
    return with_negatives(speech, no_speech_dataset, mix_args.no_speech_probability, seed)


def spoken_in(dataset: Dataset) -> list[tuple[str, str]]:
    """The pairs of language and task in the rows, sorted; none if the rows don't have them."""
    return sorted(set(_spoken(dataset)))


def _spoken(dataset: Dataset) -> list[tuple[str, str]]:
    """Language and task of every row, if the rows have them."""
    if "language" not in dataset.column_names:
        return []
    return list(zip(dataset["language"][:], dataset["task"][:], strict=True))


def _check_columns(mix_args: MixArguments, splits: list[Dataset | IterableDataset]) -> None:
    """Raise `UserError` if no clip at all has what clips are to be learned with."""
    wanted = {"timestamp_probability": "segments", "condition_on_prev_probability": "prompt"}
    for option, column in wanted.items():
        if getattr(mix_args, option) and not any(column in split.column_names for split in splits):
            raise UserError(
                f"--{option} has no use: no dataset has a column `{column}`; askd-hf pseudo-label makes it"
            )


def check_normalizer(data_args: DataArguments) -> None:
    """Raise `UserError` if `--normalizer` isn't installed, or isn't made for the language of the transcripts."""
    task = "translate" if "translate" in data_args.task else "transcribe"
    for language in data_args.eval_language or data_args.language or [NONE]:
        spoken = None if language == NONE else language
        normalizer_for(data_args.normalizer, text_language(task, spoken), {})


def check_mix(data_args: DataArguments, mix_args: MixArguments, config: ASKDConfig) -> None:
    """Raise `UserError` for options of the mix that can't be."""
    weights, datasets = mix_args.dataset_probabilities, len(data_args.dataset) + bool(data_args.unlabeled_dataset)
    if weights and len(weights) != datasets:
        raise UserError(
            f"--dataset_probabilities: {len(weights)} of them for {datasets} datasets (--unlabeled_dataset is the last)"
        )
    check_normalizer(data_args)
    data_args.train_sources()  # they raise for options that have neither one value nor one for each dataset
    data_args.eval_sources()
    if mix_args.streaming and config.max_steps <= 0:
        raise UserError("--streaming: nobody knows how long an epoch is; say how long to train with --max_steps")
    if mix_args.streaming and config.train_sampling_strategy == "group_by_length":
        raise UserError("--train_sampling_strategy group_by_length: the lengths of a stream aren't known")


def prepare_stream(config: ASKDConfig) -> None:
    """A stream has no epochs: what was to happen at their ends happens ten times in the run."""
    steps = max(config.max_steps // CHECKPOINTS_OF_A_STREAM, 1)
    if config.eval_strategy == IntervalStrategy.EPOCH:
        config.eval_strategy, config.eval_steps = IntervalStrategy.STEPS, steps
    if config.save_strategy == SaveStrategy.EPOCH:
        config.save_strategy, config.save_steps = SaveStrategy.STEPS, steps


def _negatives(
    mix_args: MixArguments, data_args: DataArguments, collator: SpeechCollator, spoken: list[tuple[str, str]]
) -> Dataset | None:
    """The clips without speech; of a multilingual model in its languages in turn, for silence is the same in all.

    Args:
        spoken: pairs of language and task; none for an English-only model.
    """
    if mix_args.no_speech_dataset is None:
        return None
    if mix_args.no_speech_dataset == SYNTHETIC:
        no_speech_dataset = synthetic_negatives(
            max_duration_in_seconds=float(collator.processor.feature_extractor.chunk_length)
        )
    else:
        workers = data_args.preprocessing_num_workers
        noises = load_speech_dataset(mix_args.no_speech_dataset, None, "train", text_required=False, num_proc=workers)
        no_speech_dataset = negatives_from(noises)
    for column, values in zip(("language", "task"), zip(*spoken, strict=True), strict=False):
        in_turn = [values[row % len(values)] for row in range(len(no_speech_dataset))]
        no_speech_dataset = replace_column(no_speech_dataset, column, in_turn)
    return no_speech_dataset


def evaluation_speech(
    data_args: DataArguments, config: ASKDConfig, collator: SpeechCollator, multilingual: bool
) -> dict[str, EvalSplit]:
    """By name the evaluation splits, each of one language and task, every clip looked at once."""
    sources = data_args.eval_sources()
    limits = model_limits(collator)
    found: dict[str, EvalSplit] = {}
    for source, name in zip(sources, names_of(sources), strict=True):
        split = without_soft_labels(load_split(source, data_args.max_eval_samples, data_args, multilingual))
        split = clean_texts(split, data_args.text_case, name)
        clips = validate_split("evaluation", name, split, limits, data_args, config.output_dir, collator)
        found |= _by_language(source, name, split, clips)
    return found


def _by_language(source: SpeechSource, name: str, split: Dataset, clips: Dataset) -> dict[str, EvalSplit]:
    """The `clips` of a `split` that can be used, apart by language and task if there are several."""
    kinds = spoken_in(clips)
    if not kinds:
        return {name: EvalSplit(source, clips, len(split) - len(clips))}
    spoken, there_were = _spoken(clips), Counter(_spoken(split))
    found = {}
    for language, task in kinds:
        rows = [row for row, pair in enumerate(spoken) if pair == (language, task)]
        suffix = f"-{language}" + ("" if task == "transcribe" else f"-{task}") if len(kinds) > 1 else ""
        of_kind = clips.select(rows) if len(kinds) > 1 else clips
        of_source = source._replace(language=language, task=task)
        found[name + suffix] = EvalSplit(of_source, of_kind, there_were[language, task] - len(rows))
    return found
