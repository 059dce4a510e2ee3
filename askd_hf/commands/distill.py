r"""Distill a Whisper model into a smaller one.

    askd-hf distill --teacher openai/whisper-large-v3

makes a student of the teacher's encoder and 2 of its decoder layers and trains it on 100 hours of LibriSpeech: first
on the labels and the teacher's distribution, then on the labels. With your own speech, a directory with audio files
and a metadata.csv (file_name,transcription):

    askd-hf distill --teacher openai/whisper-small --language fr \
        --dataset my_speech --eval_splits validation --num_train_epochs 10

Every epoch after the first, and every further run, is several times faster if the encoder's outputs and the teacher's
most probable tokens are cached on disk: --encoder_cache_dir cache/encoder --teacher_cache_dir cache/teacher.

Options can also be given in a YAML file: --config run.yaml. To resume an interrupted run, repeat the command with
--resume_from_checkpoint last. --resume_from_checkpoint auto also works for the first start. On several GPUs:
accelerate launch -m askd_hf.commands.main distill ...
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, set_seed

from ..arguments import DataArguments
from ..arguments.packages import check_optimizer
from ..arguments.parser import parse_args
from ..data import SpeechCollator, SpeechStream
from ..data.augment import Augmenter
from ..data.teacher_cache import has_soft_labels
from ..errors import UserError, memory_errors
from ..evaluation.comparison import EvalSplit
from ..evaluation.metrics import compute_metrics_for
from ..hub.provenance import Provenance
from ..hub.training_summary import count_clips
from ..models.from_arguments import load_student, load_teacher
from ..models.generation_config import allow_silence, is_multilingual, set_languages
from ..models.layer_selection import choose_layers
from ..models.layers import is_pruned_encoder
from ..models.loading import check_max_length, check_processor, load_processor, load_whisper
from ..models.lora import find_target_modules, with_lora
from ..models.smaller_vocabulary import with_smaller_vocabulary
from ..models.spec_augment import check_spec_augment
from ..models.student import check_pair, same_encoder
from ..models.vocabulary import with_vocabulary_of
from ..models.window import check_window, shortest_context, window_seconds, with_window_of
from ..trainer import ASKDTrainer
from ..training.caches import (
    check_caches,
    check_labels_of_cache,
    compress_teacher,
    with_encoder_cache,
    with_soft_labels,
)
from ..training.checks import check_speed
from ..training.datasets import (
    evaluation_rows,
    evaluation_speech,
    no_speech_rows,
    spoken_in,
    training_limits,
    training_speech,
)
from ..training.encoder_recovery import EncoderRecovery, recovery_epochs
from ..training.run_dir import (
    exit_non_main_processes,
    prepare_encoder,
    prepare_evaluation,
    prepare_stream,
)
from ..training.student_vocabulary import check_vocabulary_size, reduce_student, transcripts
from .options import options_of
from .pseudo_label import pseudo_label, unlabeled_arguments
from .report import report
from .run_options import Options, prepare_run
from .select_heads import select_heads_after_training

OPTIONS = options_of("distill")


class Models(NamedTuple):
    """The models of a run."""

    teacher: WhisperForConditionalGeneration | None  # None if the run doesn't need one
    student: WhisperForConditionalGeneration  # before training
    processor: WhisperProcessor  # of the student
    teacher_extractor: WhisperFeatureExtractor | None  # None if the teacher takes the student's features


class Speech(NamedTuple):
    """The speech of a run."""

    train: Dataset | SpeechStream  # rows with `audio`, `text` and `clip`
    splits: dict[str, EvalSplit]  # evaluation splits by name, each of one language and task
    collator: SpeechCollator

    @property
    def evaluation(self) -> dict[str, Dataset]:
        return {name: split.clips for name, split in self.splits.items()}


def main(argv: list[str] | None = None) -> None:
    distill(*parse_args(OPTIONS, argv, "askd-hf distill", __doc__))


def distill(*arguments: Any) -> None:
    """Train a student and report on it, as examples/distill.py does step by step. With `--dry_run`, print the plan.

    Raises `UserError` for options, models and speech that don't fit together. Ends the process with status 130 if
    training was interrupted.

    Args:
        arguments: instances of the classes in `OPTIONS`.
    """
    options = Options(*arguments)
    if options.run.dry_run:
        from .dry_run import dry_run  # it takes the steps below

        return dry_run(options)
    checkpoint = prepare_run(options)
    models = reduce_vocabulary(options, load_models(options))
    speech = load_speech(options, models)
    options, models = select_layers(options, models, speech, checkpoint)
    origin = Provenance.of(options.model, options.data, models.teacher, models.student)
    recover_pruned_encoder(options, models, speech, origin)
    models, speech = fill_caches(options, models, speech)
    trainer = make_trainer(options, models, speech, origin)
    del models
    train(trainer, checkpoint)
    if options.run.select_alignment_heads:
        select_heads_after_training(trainer, options.model, speech.splits, speech.train)
    report(trainer, options.model, options.data, speech.splits, speech.train)


# ---- models ----


def load_models(options: Options) -> Models:
    """Load the teacher, and load the student or make it of the teacher's layers.

    The teacher is mapped to the student's vocabulary if it has another one (large-v3 has a token more). It keeps its
    own features if it has other mel bins (128 in place of 80).
    """
    model_args, config = options.model, options.config
    teacher = extractor = None
    # a teacher that gives no layers and has no weight may still transcribe --unlabeled_dataset, with any vocabulary
    if model_args.teacher and (config.uses_teacher or not model_args.student):
        teacher = load_teacher(model_args)
    student = load_student(model_args, teacher)
    check_window(model_args, student)
    processor = load_processor(model_args.student or model_args.teacher)
    if not model_args.student:
        processor = with_window_of(student, processor)
    check_processor(student, processor)
    check_max_length(student, config.generation_max_length)
    check_optimizer(config, student)
    spoken = source_languages(options.data)
    set_languages(student, processor, spoken or [(options.data.only_language, options.data.only_task)])
    if teacher is not None:
        teacher_processor = load_processor(model_args.teacher)
        check_processor(teacher, teacher_processor)
        teacher = with_vocabulary_of(student.config, processor.tokenizer, teacher, teacher_processor.tokenizer)
        shares_features = same_encoder(teacher, student) and shortest_context(model_args) is None
        extractor = None if shares_features else teacher_processor.feature_extractor
        check_pair(teacher, student, own_features=True)
    recovered = recovery_epochs(model_args, config, student, options.mix.streaming) > 0
    pruned = is_pruned_encoder(student.config) and not recovered
    prepare_encoder(config, compressed=pruned)
    check_caches(options.caches, model_args, config, student.config.vocab_size, options.mix, options.augment)
    check_spec_augment(student.config, config.spec_augment)
    if options.lora.lora_r:
        find_target_modules(student, options.lora, config.freeze_encoder)
    by_default = config.hidden_weight is None and pruned and not options.caches.teacher_cache_dir
    check_speed(options.augment, options.mix.timestamp_probability, config, bool(config.hidden_weight or by_default))
    return Models(teacher, student, processor, extractor)


def reduce_vocabulary(options: Options, models: Models) -> Models:
    """Apply `--vocabulary` to student, teacher and tokenizer. `--unlabeled_dataset` is transcribed before."""
    if options.model.vocabulary is None:
        return models
    vocabulary, streaming, tokenizer = options.model.vocabulary, options.mix.streaming, models.processor.tokenizer
    check_vocabulary_size(vocabulary, models.student, tokenizer, streaming)
    collator, multilingual = make_collator(options, models), is_multilingual(models.student)
    transcribe_unlabeled(options, multilingual)
    rows = transcripts(vocabulary, options.data, collator, multilingual, streaming)
    least = options.model.vocabulary_min_count
    student, smaller = reduce_student(vocabulary, models.student, tokenizer, rows, least)
    teacher = with_smaller_vocabulary(models.teacher, tokenizer, smaller, window_seconds(student))
    check_caches(options.caches, options.model, options.config, student.config.vocab_size)
    processor = WhisperProcessor(models.processor.feature_extractor, smaller)
    return models._replace(teacher=teacher, student=student, processor=processor)


def source_languages(data_args: DataArguments) -> list[tuple[str | None, str | None]]:
    """Return language and task of each training dataset, as the options give them."""
    return [(source.language, source.task) for source in data_args.train_sources()]


def select_layers(options: Options, models: Models, speech: Speech, checkpoint: str | None) -> tuple[Options, Models]:
    """Apply `--layer_selection greedy`, and set the student's languages and tasks to those of the training rows.

    Without greedy selection the student keeps its layers. The options returned have the selected layers.
    """
    model_args, config = options.model, options.config
    if not model_args.student:
        chosen = choose_layers(model_args, models.teacher, speech.train, speech.collator, config, checkpoint)
        if chosen != model_args:
            options = options._replace(model=chosen)
            models = models._replace(student=load_student(chosen, models.teacher))
    # the rows of a stream aren't known yet
    spoken = [] if options.mix.streaming else spoken_in(speech.train)
    set_languages(models.student, models.processor, spoken or source_languages(options.data))
    if options.mix.no_speech_dataset or count_clips(speech.train)[2]:
        allow_silence(models.student)
    return options, models


def recover_pruned_encoder(options: Options, models: Models, speech: Speech, origin: Provenance) -> None:
    """Train a pruned encoder on audio alone, before the distillation, and note it in `origin`."""
    recovery = encoder_recovery(options, models, speech)
    if recovery is not None:
        with memory_errors("out of memory in the recovery of the encoder: lower --per_device_train_batch_size"):
            recovery.run()
        origin.encoder_recovery_epochs = recovery.epochs


def encoder_recovery(options: Options, models: Models, speech: Speech) -> EncoderRecovery | None:
    """Return the recovery of a pruned encoder, None if there is none."""
    model_args, config, student = options.model, options.config, models.student
    epochs = recovery_epochs(model_args, config, student, options.mix.streaming)
    if not epochs or isinstance(speech.train, SpeechStream):
        return None
    whole = load_whisper(model_args.student) if model_args.student else models.teacher
    extractor = models.processor.feature_extractor
    return EncoderRecovery(model_args, config, student, whole, speech.train, extractor, epochs, options.data)


# ---- speech ----


def load_speech(options: Options, models: Models) -> Speech:
    """Load the training and evaluation speech and check every clip; the rows of a stream are checked in training.

    `--unlabeled_dataset` is transcribed first.
    """
    data_args, config = options.data, options.config
    collator, multilingual = make_collator(options, models), is_multilingual(models.student)
    transcribe_unlabeled(options, multilingual)
    evaluation = evaluation_rows(data_args, multilingual)  # first, so that a split that isn't there is found at once
    train_dataset = training_speech(data_args, options.mix, config, collator, multilingual)
    if config.uses_teacher and models.teacher is None and not has_soft_labels(train_dataset):
        raise UserError(f"--preset {config.preset} requires --teacher; without a teacher choose --preset ps-kd")
    if config.uses_teacher and has_soft_labels(train_dataset) and collator.changes_targets:
        raise UserError(
            "the dataset has cached soft labels of the unchanged clips: train on it without --augment_teacher, "
            "--timestamp_probability and --condition_on_prev_probability, or on the speech itself with the teacher"
        )
    splits = evaluation_speech(evaluation, data_args, config, collator)
    if options.mix.streaming:
        prepare_stream(config)
    prepare_evaluation(config, list(splits))
    return Speech(train_dataset, splits, collator)


def make_collator(options: Options, models: Models) -> SpeechCollator:
    augment, extractor = options.augment, models.processor.feature_extractor
    return SpeechCollator(
        models.processor,
        models.student.config,
        timestamp_probability=options.mix.timestamp_probability,
        condition_on_prev_probability=options.mix.condition_on_prev_probability,
        shortest_context=shortest_context(options.model),
        augmenter=Augmenter(augment, extractor.n_samples) if augment.augmentations else None,
        features_on_device=options.data.features_on_device,
    )


def transcribe_unlabeled(options: Options, multilingual: bool) -> None:
    """Transcribe `--unlabeled_dataset`, if given, with the teacher, and add the result to the training sets.

    Transcripts of an earlier run are used again.

    Raises `UserError` if other speech of the run doesn't exist, before the hours that this takes.
    """
    data_args = options.data
    if data_args.unlabeled_dataset and not data_args.pseudo_labeled_dataset:
        evaluation_rows(data_args, multilingual)
        no_speech_rows(options.mix, data_args)
        arguments = unlabeled_arguments(options.model, data_args, options.mix, options.config)
        data_args.pseudo_labeled_dataset = str(pseudo_label(arguments))


def fill_caches(options: Options, models: Models, speech: Speech) -> tuple[Models, Speech]:
    """Fill `--encoder_cache_dir` and `--teacher_cache_dir`, and return models and speech as training needs them.

    The teacher returned is None if training doesn't run it. Else it has the dtype of `--teacher_dtype`.
    """
    teacher, student, _, extractor = models
    model_args, caches, config = options.model, options.caches, options.config
    train_dataset, collator = speech.train, speech.collator
    settings = check_labels_of_cache(teacher, collator, model_args, caches, config, extractor)
    clips = [train_dataset, *speech.evaluation.values()]
    with memory_errors("out of memory while a cache is filled: lower --per_device_eval_batch_size"):
        collator = with_encoder_cache(collator, student, clips, caches, config)
        train_dataset = with_soft_labels(
            train_dataset, teacher, collator, model_args, caches, config, extractor, settings
        )
    if isinstance(train_dataset, SpeechStream):
        collator = replace(collator, limits=training_limits(collator, options.data))
    runs_teacher = config.uses_teacher and (config.eval_teacher_losses or not has_soft_labels(train_dataset))
    if teacher is not None and runs_teacher:
        teacher = compress_teacher(teacher, model_args, config)
        if extractor is None and collator.keeps_teacher_clean and not has_soft_labels(train_dataset):
            extractor = models.processor.feature_extractor
        collator = replace(collator, teacher_extractor=extractor)
    else:
        teacher = None
    return models._replace(teacher=teacher), speech._replace(train=train_dataset, collator=collator)


# ---- training ----


def make_trainer(
    options: Options,
    models: Models,
    speech: Speech,
    origin: Provenance,
    trainer_class: type[ASKDTrainer] = ASKDTrainer,
) -> ASKDTrainer:
    """Return the trainer. It frees the teacher when its weight is 0 for good, so keep no reference to `models`."""
    config, lora = options.config, options.lora
    evaluation = speech.evaluation
    set_seed(config.seed)  # for the adapter's first weights; the trainer sets it for its own
    return trainer_class(
        model=with_lora(models.student, lora, config.freeze_encoder) if lora.lora_r else models.student,
        args=config,
        keep_adapter=lora.keep_adapter,
        teacher_model=models.teacher,
        train_dataset=speech.train,
        eval_dataset=evaluation if len(evaluation) > 1 else next(iter(evaluation.values()), None),
        data_collator=speech.collator,
        processing_class=models.processor,
        origin=origin,
        compute_metrics=compute_metrics_for(models.processor, options.data.normalizer),
    )


def train(trainer: ASKDTrainer, checkpoint: str | None) -> None:
    """Train from the start or from `checkpoint`, and save the student. Only the main process returns.

    A run that was interrupted ends the process with status 130, after it has saved a checkpoint.
    """
    config, stop = trainer.args, trainer.stop
    trainer.train(resume_from_checkpoint=checkpoint)
    if not stop.stopped:
        trainer.save_state()
        trainer.save_model()
    exit_non_main_processes()
    if stop.stopped:
        advice = "go on with --resume_from_checkpoint last"
        if config.save_only_model:
            advice = f"with --save_only_model it can't go on; its student is in checkpoint-{trainer.state.global_step}"
        print(f"stopped after step {trainer.state.global_step}; {advice}")
    elif stop.requested:
        print(f"training was already finished; the student is in {config.output_dir}")
        if config.push_to_hub:
            print(f"not published: {trainer.publisher.advice()}")
    if stop.requested:
        sys.exit(130)
    if config.load_best_model_at_end and trainer.state.best_model_checkpoint:
        best, value = Path(trainer.state.best_model_checkpoint).name, trainer.state.best_metric
        print(f"the student is {best}, with the best {config.metric_for_best_model}: {value:.4g}")
