"""`--dry_run`: the steps of a run up to training, a few measured optimizer steps, and the plan of the run.

The steps are those of `askd-hf distill`, with temporary directories in place of the run's. What takes long is measured
on a few clips: transcribing `--unlabeled_dataset`, greedy layer selection, the recovery of the encoder, the caches.
"""

import contextlib
import copy
import io
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME

from ..arguments.writable import check_writable
from ..callbacks import blend_schedule
from ..config import ASKDConfig
from ..errors import UserError
from ..hub.provenance import Provenance
from ..models.layer_selection import selection_cost
from ..pseudo_labels import plan_transcription
from ..pseudo_labels.filters import reason_to_drop
from ..pseudo_labels.transcription import TRANSCRIPTS_DIR
from ..training.checkpoint_lookup import read_trainer_state
from ..training.encoder_recovery import ENCODER_FILE, RECOVERY_DIR, is_recovering, recovered_encoder
from ..training.held_out import hold_out
from ..training.resuming import check_checkpoint, settings_of
from ..training.run_plan import RunPlan, counted, duration, run_length
from ..training.run_settings import config_settings
from . import plan_lines, pseudo_label
from .distill import (
    Models,
    Speech,
    encoder_recovery,
    load_models,
    load_speech,
    make_trainer,
    reduce_vocabulary,
    select_layers,
)
from .measured_run import STEPS, MeasuringTrainer, measuring_config
from .run_options import Options, prepare_run
from .sampled_caches import fill_sample
from .scratch import Scratch, scratch_directory

TRANSCRIBED = 32  # clips of --unlabeled_dataset


def dry_run(options: Options) -> None:
    """Do everything of a run up to training, and print the plan of the run.

    Nothing is written but temporary files, and what the caches of the libraries keep: files of the Hub, and datasets
    that have to be converted.

    Raises `UserError` as the run does before training.
    """
    if options.config.world_size > 1:
        raise UserError("--dry_run is not supported with several processes: start it without accelerate launch")
    checkpoint = prepare_run(options)
    # the steps print what they do in a run
    with scratch_directory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        plan = plan_run(options, checkpoint, scratch)
    print(plan)


def plan_run(run: Options, checkpoint: str | None, scratch: Scratch) -> RunPlan:
    """Return the plan of a run that would resume from `checkpoint`."""
    plan = RunPlan("Plan of the run. Nothing was trained, saved or pushed.", plan_lines.SECTIONS)
    options = in_scratch(run, checkpoint, scratch)
    untranscribed = transcribe_sample(options, scratch, plan) if run.data.unlabeled_dataset else 0
    models = reduce_vocabulary(options, load_models(options))
    speech = load_speech(options, models)
    if run.model.layer_selection == "greedy" and checkpoint is None:
        options = without_selection(options, models, speech, plan)
    options, models = select_layers(options, models, speech, checkpoint)
    config = options.config
    origin = Provenance.of(options.model, options.data, models.teacher, models.student)
    measure_recovery(options, models, speech, scratch, plan)
    student = plan_lines.student_shape(models, config)
    teacher = plan_lines.teacher_shape(models, options.model, origin)

    # ---- the length of the run ----
    clips: Any = speech.train
    held_out: Any = []
    if config.uses_teacher and config.teacher_schedule == "adaptive" and isinstance(clips, Dataset):
        clips, held_out = hold_out(clips)
    number = len(clips) + untranscribed if isinstance(clips, Dataset) else None
    done = 0 if checkpoint is None else read_trainer_state(Path(checkpoint) / TRAINER_STATE_NAME).global_step
    length = run_length(config, number, config.train_batch_size, done)
    phases = [phase.name for phase in blend_schedule(config, length.steps).phases()]

    # ---- a few steps ----
    models, sample = fill_sample(options, models, speech, sample_of(config, speech, clips), scratch, plan)
    short = options._replace(config=measuring_config(config, phases))
    trainer = make_trainer(short, models, sample, origin, MeasuringTrainer)
    del models
    if checkpoint is not None:
        config.hidden_weight = trainer.args.hidden_weight  # the trainer has set its default
        settings = settings_of(config, trainer, clips) | config_settings(config)
        check_checkpoint(checkpoint, settings | {"total_steps": length.steps})
    measured = trainer.measure(phases, next(iter(sample.evaluation.values()), None))
    length = run_length(config, number, measured.batch_size, done)
    repository = trainer.repository
    trainer.free_memory()
    del trainer, sample

    # ---- the plan ----
    plan_lines.add_models(plan, options.model, student, teacher, measured.trained_parameters)
    plan_lines.add_data(plan, config, speech, len(held_out), untranscribed)
    plan_lines.add_schedule(plan, config, length, measured.batch_size, bool(held_out))
    clip_seconds = plan_lines.add_speed(plan, config, student, teacher, plan_lines.mean_tokens(speech))
    plan_lines.add_time(plan, config, length, measured, len(held_out), speech)
    plan_lines.add_time_after_training(plan, run, measured.evaluation_seconds, speech, clip_seconds)
    plan_lines.add_needs(plan, config, options.lora, length, measured, student)
    plan_lines.add_output(plan, run.config, checkpoint, repository)
    plan_lines.add_library_caches(plan, run, speech)
    return plan


def in_scratch(options: Options, checkpoint: str | None, scratch: Scratch) -> Options:
    """Return the options with a temporary `--output_dir`. They can be changed without changing those of the run.

    The recovered encoder of a run that is resumed is in the directory, unless its layers would be selected again.
    """
    data, config = copy.copy(options.data), copy.copy(options.config)
    config.output_dir = scratch.directory(config.output_dir)
    finished = recovered_encoder(checkpoint, options.config.output_dir)
    greedy = options.model.layer_selection == "greedy"
    if finished is not None and (checkpoint is not None or (is_recovering(options.config) and not greedy)):
        link = Path(config.output_dir, RECOVERY_DIR, ENCODER_FILE)
        link.parent.mkdir(parents=True)
        link.symlink_to(finished.absolute())
    return options._replace(data=data, config=config)


# ---- what a run does before training, measured on a few clips ----


def transcribe_sample(options: Options, scratch: Scratch, plan: RunPlan) -> int:
    """Check `--unlabeled_dataset`, transcribe a few of its clips, and add them to the training sets.

    Transcripts of an earlier run are used if there are those of all clips.

    Returns:
        The number of the other clips that are expected in the training set.
    """
    name, filters = options.data.unlabeled_dataset, "the filters of askd-hf pseudo-label"
    arguments = pseudo_label.unlabeled_arguments(options.model, options.data, options.mix, options.config)
    directory = Path(arguments.output_dir)
    pseudo_label.check_outside(arguments)
    check_writable(directory, "--output_dir")
    arguments = replace(arguments, output_dir=scratch.directory(str(directory)))
    if (directory / TRANSCRIPTS_DIR).is_dir():
        shutil.copytree(directory / TRANSCRIPTS_DIR, Path(arguments.output_dir, TRANSCRIPTS_DIR))
    teacher, processor = pseudo_label.load_teacher(arguments)
    clips = pseudo_label.load_speech(arguments, processor)
    missing = len(clips) - plan_transcription(arguments, teacher, processor, clips).done
    text = f"{name}: {len(clips) - missing:,} of {counted(len(clips), 'clip')} transcribed"
    sample = clips
    if missing:
        number = min(TRANSCRIBED, len(clips))
        sample = clips.select([i * len(clips) // number for i in range(number)])
        arguments = replace(arguments, output_dir=scratch.directory(str(directory)))
    start = time.perf_counter()
    transcripts = pseudo_label.transcribe_clips(arguments, teacher, processor, sample)
    seconds = (time.perf_counter() - start) / len(sample)
    reasons = [reason_to_drop(transcript, arguments.thresholds()) for transcript in transcripts]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    if not kept:
        raise UserError(
            f"--unlabeled_dataset {name}: {filters} drop {len(reasons)} of {len(reasons)} transcripts "
            f"({reasons[0].reason}); change their thresholds, and give the result as --dataset"
        )
    saved = pseudo_label.save_dataset(arguments, teacher, processor, sample, transcripts, kept)
    options.data.pseudo_labeled_dataset = str(saved)
    expected = round(len(clips) * len(kept) / len(sample))
    if missing:
        text += f"; {missing:,} to do: {duration(missing * seconds)}"
        plan.seconds += missing * seconds
    text += f"; {filters} keep {len(kept):,} of {len(sample):,}"
    if expected > len(kept):
        text += ".\nVocabulary, encoder recovery, caches and held-out clips are planned from these alone"
    plan.add(plan_lines.BEFORE, "transcription", text)
    return expected - len(kept)


def without_selection(options: Options, models: Models, speech: Speech, plan: RunPlan) -> Options:
    """Return the options without `--layer_selection greedy`, whose cost is added to the plan."""
    trials, seconds = selection_cost(options.model, models.teacher, speech.train, speech.collator, options.config)
    text = f"{counted(trials, 'trial')}, at most {duration(trials * seconds)}. The plan is for evenly spread layers"
    plan.add(plan_lines.BEFORE, "layer selection", text, trials * seconds)
    return options._replace(model=replace(options.model, layer_selection="spread"))


def measure_recovery(options: Options, models: Models, speech: Speech, scratch: Scratch, plan: RunPlan) -> None:
    """Measure the recovery of a pruned encoder, and mark the encoder as trained. That of a resumed run is loaded."""
    recovery = encoder_recovery(options, models, speech)
    if recovery is None:
        return
    if Path(options.config.output_dir, RECOVERY_DIR, ENCODER_FILE).is_file():
        recovery.run()
        text = "finished by the earlier run"
    else:
        steps, seconds = recovery.measure(Path(scratch.directory(RECOVERY_DIR)), STEPS)
        epochs = counted(recovery.epochs, "epoch")
        text = f"{epochs}, {counted(steps, 'step')} of {duration(seconds)}: {duration(steps * seconds)}"
        plan.seconds += steps * seconds
    plan.add(plan_lines.BEFORE, "encoder recovery", text)


def sample_of(config: ASKDConfig, speech: Speech, clips: Any) -> Speech:
    """Return the clips of `STEPS` steps, and an evaluation batch of clips of medium length.

    Args:
        clips: the training set without the clips that are held out. A stream is returned unchanged.
    """
    if isinstance(clips, Dataset):
        number = STEPS * config.train_batch_size * config.gradient_accumulation_steps
        rows = np.random.default_rng(config.order_seed).permutation(len(clips))[:number]
        clips = clips.select(rows.tolist())
    splits = {}
    for name, split in list(speech.splits.items())[:1]:
        number = min(config.per_device_eval_batch_size, len(split.clips))
        start = (len(split.clips) - number) // 2  # they are sorted by duration
        splits[name] = split._replace(clips=split.clips.select(range(start, start + number)))
    return Speech(clips, splits, speech.collator)
