r"""Transcribe speech with a teacher, keep the good transcripts, and save them as a dataset to train students on.

    askd-hf pseudo-label --teacher openai/whisper-large-v3 --language fr --dataset my_audio

`my_audio` needs no transcripts: a directory of audio files is enough. Transcripts with low confidence or repetition
loops are dropped, and listed with the reason in runs/my_audio-by-whisper-large-v3/dropped.csv. The others are a
`datasets` dataset:

    askd-hf distill --teacher openai/whisper-large-v3 --language fr \
        --dataset runs/my_audio-by-whisper-large-v3/dataset

If the speech has transcripts, one of the teacher's is kept if its word error rate is at most
--wer_threshold. Here with
timestamps, and with the clips of a speaker joined to 30 s:

    askd-hf pseudo-label --teacher openai/whisper-large-v3 --dataset openslr/librispeech_asr \
        --dataset_config clean --split train.100 --language en --wer_threshold 5 --timestamps --concatenate \
        --hub_dataset_id you/labels

To resume an interrupted run, repeat the command. Other thresholds, or --concatenate, filter again without transcribing
again. Options can also be given in a YAML file: --config labels.yaml.
"""

import logging
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import DataArguments, MixArguments, ModelArguments
from ..arguments.parser import parse_args
from ..arguments.writable import check_writable
from ..config import ASKDConfig
from ..data import Limits, filter_invalid_clips
from ..data.shared_disk import is_first_on_disk, others_wait
from ..data.sources import bare_audio
from ..errors import UserError
from ..evaluation.long_form import check_can_transcribe
from ..evaluation.metrics import language_code, normalizer_for, text_language
from ..evaluation.suites import load_set
from ..hub.upload import check_can_push_dataset
from ..models.generation_config import set_language
from ..models.loading import check_max_length, check_processor, load_processor, load_whisper
from ..pseudo_labels import (
    DATASET,
    PseudoLabelArguments,
    build_dataset,
    check_can_concatenate,
    concatenate_clips,
    dataset_card,
    filter_transcripts,
    known_references,
    plan_transcription,
    push_dataset,
    score_transcripts,
    transcribe,
)
from ..pseudo_labels import save_dataset as write_dataset
from ..pseudo_labels.filters import PseudoLabel
from .options import options_of
from .select_heads import has_alignment_heads

logger = logging.getLogger(__name__)

OPTIONS = options_of("pseudo-label")


def main(argv: list[str] | None = None) -> None:
    pseudo_label(*parse_args(OPTIONS, argv, "askd-hf pseudo-label", __doc__))


def pseudo_label(args: PseudoLabelArguments) -> Path:
    """Transcribe, filter and save, as examples/pseudo_label.py does step by step.

    Returns the directory of the dataset. Raises `UserError` for options, models and speech that don't fit together.
    """
    teacher, processor = load_teacher(args)
    clips = load_speech(args, processor)
    transcripts, kept = transcribe_and_filter(args, teacher, processor, clips)
    return save_dataset(args, teacher, processor, clips, transcripts, kept)


def unlabeled_arguments(
    model_args: ModelArguments, data_args: DataArguments, mix_args: MixArguments, config: ASKDConfig
) -> PseudoLabelArguments:
    """Return the options by which `askd-hf distill` transcribes `--unlabeled_dataset`.

    With `--long_clips cut` the transcripts have the times of words; of segments if the teacher has no alignment heads.

    Raises `UserError` if it can't be transcribed.
    """
    if not model_args.teacher:
        raise UserError("--unlabeled_dataset requires --teacher, the model that transcribes it")
    cut = data_args.long_clips == "cut"
    return PseudoLabelArguments(
        teacher=model_args.teacher,
        dataset=data_args.unlabeled_dataset,
        language=data_args.only_language,
        task="translate" if data_args.only_task == "translate" else "transcribe",
        max_samples=data_args.max_train_samples,
        on_bad_audio=data_args.on_bad_audio,
        recheck=data_args.recheck,
        timestamps=cut or mix_args.timestamp_probability > 0.0,
        word_timestamps=cut and has_alignment_heads(model_args.teacher),
        attn_implementation=model_args.attn_implementation,
        device=str(config.device),
        generation_max_length=config.generation_max_length,
        num_workers=config.dataloader_num_workers,
    )


def load_teacher(args: PseudoLabelArguments) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Load the teacher, after the output directory was checked."""
    args.start_processes()
    check_outside(args)
    check_writable(Path(args.output_dir), "--output_dir")
    if args.hub_dataset_id:
        check_can_push_dataset(args.hub_dataset_id)
    processor = load_processor(args.teacher)
    teacher = load_whisper(args.teacher, attn_implementation=args.attn_implementation)
    check_processor(teacher, processor)
    check_max_length(teacher, args.generation_max_length)
    # before the clips are loaded and checked
    set_language(teacher, processor, args.source().language, args.task)
    check_can_transcribe(teacher, "short_form", args.time_marks())
    normalizer_for(args.normalizer, text_language(args.task, args.source().language), {})
    return teacher, processor


def check_outside(args: PseudoLabelArguments) -> None:
    """Raise `UserError` if the result would be inside of a directory of audio files without metadata."""
    dataset, output = Path(args.dataset), Path(args.output_dir)
    if output.resolve().is_relative_to(dataset.resolve()) and bare_audio(dataset):
        raise UserError(
            f"the transcripts would be written to {output}, inside of {dataset}, a directory of audio files, where "
            "the next command would take them for the dataset: give pseudo-label another --output_dir, or start the "
            "command in another directory"
        )


def load_speech(args: PseudoLabelArguments, processor: WhisperProcessor) -> Dataset:
    """Load the clips and check every one, before anything is transcribed."""
    window, workers = processor.feature_extractor.chunk_length, args.check_workers
    clips = load_set(args.source(), args.max_samples, workers, text_required=False)
    if args.concatenate:
        check_can_concatenate(clips, window, args.concatenate_seconds)
    return filter_invalid_clips(
        clips,
        None,
        Limits(window),
        on_bad_audio=args.on_bad_audio,
        num_proc=workers,
        recheck=args.recheck,
        share_work=True,
        report_file=Path(args.output_dir) / "skipped.csv",
        split=args.split,
    )


def transcribe_and_filter(
    args: PseudoLabelArguments,
    teacher: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Dataset,
) -> tuple[list[PseudoLabel], list[int]]:
    """Transcribe the clips that have no transcript in `--output_dir` yet, and filter all transcripts.

    Returns:
        The transcripts with their measures, and the indices of those that are kept.
    """
    transcripts = transcribe_clips(args, teacher, processor, clips)
    return transcripts, filter_transcripts(transcripts, args.thresholds(), Path(args.output_dir) / "dropped.csv")


def transcribe_clips(
    args: PseudoLabelArguments,
    teacher: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Dataset,
) -> list[PseudoLabel]:
    """Transcribe the clips that have no transcript in `--output_dir` yet, and return all with their measures."""
    language = language_code(args.language) if args.task == "transcribe" else "en"
    _, normalize = normalizer_for(args.normalizer, language, processor.tokenizer.english_spelling_normalizer or {})
    texts = clips["text"][:]
    if args.task == "translate" and args.text_column_name is None and args.label_source != "reference" and any(texts):
        logger.warning(
            "the transcripts of the speech are no references for translations: if a column has English ones, name it "
            "with --text_column_name"
        )
        texts = [None] * len(texts)
    references = known_references(texts, required=args.label_source == "reference")
    lines = transcribe(plan_transcription(args, teacher, processor, clips))
    return score_transcripts(lines, references, normalize, language, label_source=args.label_source)


def save_dataset(
    args: PseudoLabelArguments,
    teacher: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Dataset,
    transcripts: list[PseudoLabel],
    kept: list[int],
) -> Path:
    """Save the clips that are kept with their transcripts and a card; apply `--concatenate` and `--hub_dataset_id`.

    On each disk one process saves them. Returns the directory of the dataset.
    """
    directory = Path(args.output_dir)
    is_first = is_first_on_disk(directory)
    with others_wait():
        if is_first:
            _save_dataset(args, teacher, processor, clips, transcripts, kept)
    return directory / DATASET


def _save_dataset(
    args: PseudoLabelArguments,
    teacher: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Dataset,
    transcripts: list[PseudoLabel],
    kept: list[int],
) -> None:
    directory = Path(args.output_dir)
    language = getattr(teacher.generation_config, "language", None)  # an English-only teacher has none
    labeled = build_dataset(clips, transcripts, kept, language, args.task)
    if args.concatenate:
        labeled = concatenate_clips(
            labeled,
            processor.tokenizer,
            max_duration_in_seconds=args.concatenate_seconds or processor.feature_extractor.chunk_length,
            max_label_length=teacher.config.max_target_positions,
            directory=directory,
            num_proc=args.num_workers or None,
        )
    card = dataset_card(args, labeled, len(clips), len(kept))
    labeled = write_dataset(labeled, directory, card)
    if PartialState().is_main_process:
        hours = sum(labeled["duration"]) / 3600
        print(f"{len(labeled)} rows, {hours:.2f} hours: --dataset {directory / DATASET}")
        if args.hub_dataset_id:
            advice = (
                f"the labels are safe in {directory}: run the same command again, if need be after `hf auth login`"
            )
            push_dataset(labeled, args.hub_dataset_id, card, advice + " with a token that may write there")
