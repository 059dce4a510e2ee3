r"""Distil a Whisper model into a smaller one.

    python examples/distill.py --teacher openai/whisper-large-v3

makes a student of the teacher's encoder and 2 of its decoder layers and trains it on 100 hours of LibriSpeech: first
on the teacher's distribution and the labels, then on the labels and the student's own average. With your own speech,
a directory with audio files and a metadata.csv (file_name,transcription):

    python examples/distill.py --teacher openai/whisper-small --language fr \
        --dataset my_speech --eval_splits validation --num_train_epochs 10

Each epoch after the first, and every further run, costs a fraction with the encoder's outputs and the teacher's most
probable tokens on disk: --encoder_cache_dir cache/encoder --teacher_cache_dir cache/teacher.

All options: --help. They can also stand in a YAML file: --config run.yaml. A killed or interrupted run goes on with
--resume_from_checkpoint last. On several GPUs: accelerate launch examples/distill.py ...
"""

import sys
from dataclasses import replace
from pathlib import Path

from pseudo_label import pseudo_label
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline, set_seed

from askd_hf import ASKDConfig, ASKDTrainer, SpeechCollator, UserError, init_student
from askd_hf.arguments import CacheArguments, DataArguments, MixArguments, ModelArguments
from askd_hf.arguments.packages import check_optimizer
from askd_hf.arguments.parser import parse_args
from askd_hf.data import SAMPLING_RATE, SpeechStream, decode_audio
from askd_hf.data.augment import AugmentArguments, Augmenter
from askd_hf.data.teacher_cache import has_soft_labels
from askd_hf.errors import exit_on_user_error, memory_errors
from askd_hf.evaluation import format_results
from askd_hf.evaluation.comparison import evaluate_models
from askd_hf.evaluation.metrics import compute_metrics_for
from askd_hf.hub.provenance import Provenance
from askd_hf.models.generation_config import allow_silence, is_multilingual, no_timestamps, set_languages
from askd_hf.models.layer_selection import choose_layers
from askd_hf.models.loading import check_max_length, check_processor, load_processor, load_whisper
from askd_hf.models.lora import LoraArguments, loadable_base, with_lora
from askd_hf.models.student import check_pair, same_encoder
from askd_hf.models.teacher_memory import check_int8
from askd_hf.models.vocabulary import with_vocabulary_of
from askd_hf.pseudo_labels import PseudoLabelArguments
from askd_hf.training.caches import check_caches, compress_teacher, with_encoder_cache, with_soft_labels
from askd_hf.training.checkpoints import checkpoint_to_resume
from askd_hf.training.datasets import (
    check_mix,
    evaluation_speech,
    prepare_stream,
    spoken_in,
    training_limits,
    training_speech,
)
from askd_hf.training.run_dir import (
    check_directories,
    exit_non_main_processes,
    prepare_encoder,
    prepare_evaluation,
    set_default_output_dir,
)
from askd_hf.training.run_settings import check_options

OPTIONS = (ModelArguments, DataArguments, MixArguments, AugmentArguments, CacheArguments, LoraArguments)


def main() -> None:
    # options: the command line, then --config, then the defaults
    distill(*parse_args((*OPTIONS, ASKDConfig)))


def distill(
    model_args: ModelArguments,
    data_args: DataArguments,
    mix_args: MixArguments,
    augment: AugmentArguments,
    caches: CacheArguments,
    lora: LoraArguments,
    config: ASKDConfig,
) -> None:
    if not (model_args.teacher or model_args.student):
        raise UserError("--teacher is missing: a Whisper model to distil, such as openai/whisper-large-v3")
    if model_args.student and model_args.layer_selection == "greedy":
        raise UserError("--layer_selection greedy chooses among the teacher's layers: --student has its own")
    set_default_output_dir(config, model_args)
    check_mix(data_args, mix_args, config)
    check_directories(config, caches)
    if not data_args.eval_sources():
        prepare_evaluation(config, [])
    resume_from = checkpoint_to_resume(config.output_dir, config.resume_from_checkpoint)
    if resume_from is not None:
        check_options(config, resume_from)

    if lora.keep_adapter:
        loadable_base(model_args.student, config.push_to_hub)
    if model_args.teacher_dtype == "int8":
        check_int8()

    # ---- teacher and student: the student is made from the teacher's full weights ----
    # one that neither gives its layers nor has a weight may still transcribe --unlabeled_dataset, in whatever tokens
    teacher = (
        load_teacher(model_args) if model_args.teacher and (config.uses_teacher or not model_args.student) else None
    )
    student = load_student(model_args, teacher)
    processor = load_processor(model_args.student or model_args.teacher)
    check_processor(student, processor)
    check_max_length(student, config.generation_max_length)
    check_optimizer(config, student)
    spoken = [(source.language, source.task) for source in data_args.train_sources()]
    set_languages(student, processor, spoken or [(data_args.only_language, data_args.only_task)])
    multilingual = is_multilingual(student)
    teacher_extractor = None
    if teacher is not None:
        # it may have another vocabulary (large-v3 has a token more) and other mel bins (128, not 80) than the student
        theirs = load_processor(model_args.teacher)
        check_processor(teacher, theirs)
        teacher = with_vocabulary_of(student.config, processor.tokenizer, teacher, theirs.tokenizer)
        teacher_extractor = None if same_encoder(teacher, student) else theirs.feature_extractor
        check_pair(teacher, student, own_features=True)
    prepare_encoder(config, compressed=not (model_args.student or same_encoder(teacher, student)))
    check_caches(caches, model_args, config, student.config.vocab_size, mix_args, augment)
    collator = SpeechCollator(
        processor,
        student.config,
        timestamps=mix_args.timestamp_probability,
        prompts=mix_args.condition_on_prev_probability,
        augmenter=Augmenter(augment, processor.feature_extractor.n_samples) if augment.augment else None,
    )

    # ---- speech: every clip is looked at once, before training starts; those of a stream when they come ----
    if data_args.unlabeled_dataset:
        data_args.labelled = str(transcribe(model_args, data_args, mix_args, config))
    train_dataset = training_speech(data_args, mix_args, config, collator, multilingual)
    if config.uses_teacher and teacher is None and not has_soft_labels(train_dataset):
        raise UserError(f"preset {config.preset} has a teacher: give it with --teacher, or choose --preset ps-kd")
    if config.uses_teacher and has_soft_labels(train_dataset) and collator.is_random:
        raise UserError(
            "the dataset has a teacher's answers for its clips as they are: train on it without --augment, "
            "--timestamp_probability and --condition_on_prev_probability, or on the speech itself with the teacher"
        )
    splits = evaluation_speech(data_args, config, collator, multilingual)
    eval_datasets = {name: split.clips for name, split in splits.items()}
    if mix_args.streaming:
        prepare_stream(config)
    prepare_evaluation(config, list(eval_datasets))

    if not model_args.student:
        chosen = choose_layers(model_args, teacher, train_dataset, collator, config, resume_from)
        if chosen != model_args:
            model_args, student = chosen, load_student(chosen, teacher)
    # by what the rows say, as far as they have been looked at
    looked_at = [] if mix_args.streaming else spoken_in(train_dataset)
    set_languages(student, processor, looked_at or [(s.language, s.task) for s in data_args.train_sources()])
    if mix_args.no_speech_dataset:
        allow_silence(student)
    origin = Provenance.of(model_args, data_args, teacher, student)  # for the model card

    # ---- what no step changes is computed once: --encoder_cache_dir, --teacher_cache_dir ----
    collator = with_encoder_cache(collator, student, [train_dataset, *eval_datasets.values()], caches, config)
    train_dataset = with_soft_labels(train_dataset, teacher, collator, model_args, caches, config, teacher_extractor)
    if isinstance(train_dataset, SpeechStream):
        collator = replace(collator, limits=training_limits(collator, data_args))
    if (
        teacher is not None
        and config.uses_teacher
        and (config.eval_teacher_losses or not has_soft_labels(train_dataset))
    ):
        teacher = compress_teacher(teacher, model_args, config)
        collator = replace(collator, teacher_extractor=teacher_extractor)
    else:
        teacher = None

    # ---- training ----
    set_seed(config.seed)  # for the adapter's first weights; the trainer sets it for its own
    trainer = ASKDTrainer(
        model=with_lora(student, lora, config.freeze_encoder) if lora.lora_r else student,
        args=config,
        keep_adapter=lora.keep_adapter,
        teacher_model=teacher,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets if len(eval_datasets) > 1 else next(iter(eval_datasets.values()), None),
        data_collator=collator,
        processing_class=processor,
        origin=origin,
        compute_metrics=compute_metrics_for(processor, data_args.normalizer),
    )
    del teacher  # the trainer frees it as soon as its weight is 0 for good
    trainer.train(resume_from_checkpoint=resume_from)
    if not trainer.stop.stopped:
        trainer.save_state()
        trainer.save_model()
    exit_non_main_processes()
    if trainer.stop.stopped:
        go_on = "go on with --resume_from_checkpoint last"
        if config.save_only_model:
            go_on = f"with --save_only_model it can't go on; its student is in checkpoint-{trainer.state.global_step}"
        print(f"stopped after step {trainer.state.global_step}; {go_on}")
    elif trainer.stop.requested:
        print(f"training was finished already; the student is in {config.output_dir}")
        if config.push_to_hub:
            print(f"it wasn't published: {trainer.publisher.advice()}")
    if trainer.stop.requested:
        sys.exit(130)
    if config.load_best_model_at_end and trainer.state.best_model_checkpoint:
        best, value = Path(trainer.state.best_model_checkpoint).name, trainer.state.best_metric
        print(f"the student is {best}, whose {config.metric_for_best_model} was best: {value:.4g}")

    # ---- what has become of the student ----
    if eval_datasets and data_args.compare:
        trainer.free_memory()
        try:
            with memory_errors(config.per_device_eval_batch_size):
                models = load_models(model_args, config.output_dir)
                results = evaluate_models(models, splits, data_args.normalizer, config)
                print(f"\n{format_results(results)}")
        except UserError as error:  # the student is trained and saved: the rest is worth doing
            print(f"\nno comparison: {error}", file=sys.stderr)
    if eval_datasets or not isinstance(train_dataset, SpeechStream):
        listen(config.output_dir, next(iter(eval_datasets.values()), train_dataset)[0])
    print(f'\nThe student: pipeline("automatic-speech-recognition", model="{config.output_dir}")')
    trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()


def transcribe(
    model_args: ModelArguments, data_args: DataArguments, mix_args: MixArguments, config: ASKDConfig
) -> Path:
    """The dataset of the teacher's transcripts of `--unlabeled_dataset`; those that are on the disk aren't made again."""
    if not model_args.teacher:
        raise UserError("--unlabeled_dataset: who is to transcribe it? Give --teacher")
    if config.world_size > 1:
        raise UserError("--unlabeled_dataset is transcribed by one process: do it by examples/pseudo_label.py, before")
    return pseudo_label(
        PseudoLabelArguments(
            teacher=model_args.teacher,
            dataset=data_args.unlabeled_dataset,
            language=data_args.only_language,
            task=data_args.only_task or "transcribe",
            max_samples=data_args.max_train_samples,
            on_bad_audio=data_args.on_bad_audio,
            timestamps=mix_args.timestamp_probability > 0.0,
            attn_implementation=model_args.attn_implementation,
            device=str(config.device),
            generation_max_length=config.generation_max_length,
            num_workers=config.dataloader_num_workers,
        )
    )


def load_teacher(model_args: ModelArguments) -> WhisperForConditionalGeneration:
    return load_whisper(model_args.teacher, attn_implementation=model_args.attn_implementation)


def load_student(
    model_args: ModelArguments, teacher: WhisperForConditionalGeneration | None
) -> WhisperForConditionalGeneration:
    if model_args.student:
        return load_whisper(model_args.student, attn_implementation=model_args.attn_implementation)
    return init_student(teacher, model_args.decoder_layers, model_args.encoder_layers)


def load_models(
    model_args: ModelArguments, output_dir: str
) -> dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]]:
    """Student, initial student and teacher, each with what it was loaded by and its processor."""
    teacher = load_teacher(model_args) if model_args.teacher else None
    student = load_whisper(output_dir, attn_implementation=model_args.attn_implementation)
    processor = load_processor(output_dir)
    made_of = model_args.student or f"layers of {model_args.teacher}"
    models = {
        "student": (output_dir, student, processor),
        "initial student": (made_of, load_student(model_args, teacher), processor),
    }
    if teacher is not None:
        models["teacher"] = (model_args.teacher, teacher, load_processor(model_args.teacher))
    return models


def listen(model_dir: str, clip: dict) -> None:
    """Transcribe one clip as anyone would who has nothing but the saved directory."""
    transcribe = pipeline("automatic-speech-recognition", model=model_dir)
    sound = {"raw": decode_audio(clip["audio"]), "sampling_rate": SAMPLING_RATE}
    heard = transcribe(sound, generate_kwargs=no_timestamps(transcribe.model))["text"]
    print(f"\n{clip['clip']}\n  reference: {clip['text']}\n  pipeline:  {heard.strip()}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
