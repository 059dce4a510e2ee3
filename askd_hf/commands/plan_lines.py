"""The lines of the plan that `--dry_run` prints."""

import copy
import csv
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.trainer_utils import HubStrategy

from ..arguments import ModelArguments
from ..callbacks import ADAPTIVE_NOTE, blend_schedule
from ..config import ASKDConfig, resolve_dtype
from ..data import SpeechStream
from ..data.audio_checks import kept_in
from ..data.cache_space import CacheSpace
from ..evaluation.comparison import REPETITIONS, SPEED_CLIPS, speed_batch_sizes
from ..evaluation.memory import memory_bytes
from ..evaluation.model_info import describe_model
from ..evaluation.planning import random_latencies
from ..evaluation.speed import clips_measured, device_name
from ..hub.provenance import Provenance, public_name
from ..hub.upload import Repository
from ..models.alignment_heads import CLIPS
from ..models.layers import copied_decoder_layers, copied_encoder_layers
from ..models.lora import LoraArguments
from ..models.window import POSITIONS_PER_SECOND
from ..schedule import BlendState
from ..training.datasets import SYNTHETIC
from ..training.run_plan import RunLength, RunPlan, counted, duration, evaluations, little_speech, saves, size
from .distill import Models, Options, Speech
from .measured_run import STEPS, Measured
from .select_heads import has_alignment_heads

STUDENT, DATA, BEFORE, SCHEDULE, TIME, NEEDS, OUTPUT = SECTIONS = (
    *("student", "data", "before training", "schedule", "time", "memory and disk", "output"),
)
TOKENS = 20  # per clip of a stream
COLUMN = 14  # width of the numbers of a model


class Shape(NamedTuple):
    """What the size and the speed of a model depend on."""

    config: WhisperConfig
    extractor: WhisperFeatureExtractor
    parameters: int
    disk_bytes: float


def student_shape(models: Models, config: ASKDConfig) -> Shape:
    student, bytes_per_weight = models.student, getattr(torch, config.save_dtype).itemsize
    parameters = student.num_parameters()
    return Shape(student.config, models.processor.feature_extractor, parameters, parameters * bytes_per_weight)


def teacher_shape(models: Models, model_args: ModelArguments, origin: Provenance) -> Shape | None:
    """Return the shape of the teacher as it is stored; None without a teacher."""
    if models.teacher is None:
        return None
    stored = describe_model(model_args.teacher, models.teacher).size_mb
    parameters = origin.teacher.parameters
    extractor = models.teacher_extractor or models.processor.feature_extractor
    disk_bytes = 4 * parameters if stored is None else 1e6 * stored
    config = copy.deepcopy(models.teacher.config)
    config.vocab_size = origin.teacher.vocabulary  # in memory the teacher has the student's
    return Shape(config, extractor, parameters, disk_bytes)


def add_models(
    plan: RunPlan, model_args: ModelArguments, student: Shape, teacher: Shape | None, trained_parameters: int
) -> None:
    """Add the origin of the student, and its size beside the teacher's."""
    if model_args.student:
        plan.add(STUDENT, "made from", model_args.student)
    else:
        encoder, decoder = copied_encoder_layers(student.config), copied_decoder_layers(student.config)
        layers = "the encoder" if encoder is None else f"encoder layers {_listed(encoder)}"
        plan.add(STUDENT, "made from", f"{layers} and decoder layers {_listed(decoder)} of {model_args.teacher}")
    shapes = [student] if teacher is None else [student, teacher]
    rows: dict[str, list[str]] = {
        "": ["student", "teacher"][: len(shapes)],
        "encoder layers": [str(shape.config.encoder_layers) for shape in shapes],
        "decoder layers": [str(shape.config.decoder_layers) for shape in shapes],
        "window": [f"{shape.config.max_source_positions / POSITIONS_PER_SECOND:g} s" for shape in shapes],
        "tokens": [f"{shape.config.vocab_size:,}" for shape in shapes],
        "parameters": [f"{shape.parameters:,}" for shape in shapes],
        "on disk": [size(shape.disk_bytes) for shape in shapes],
    }
    for name, values in rows.items():
        plan.add(STUDENT, name, "".join(f"{value:>{COLUMN}}" for value in values))
    plan.add(STUDENT, "trained", f"{trained_parameters:>{COLUMN},}")


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def add_speed(
    plan: RunPlan, config: ASKDConfig, student: Shape, teacher: Shape | None, tokens: int
) -> dict[str, float]:
    """Measure models of these shapes with random weights. Add the speedup of the student, if there is a teacher.

    Returns:
        Seconds per clip of `student` and `teacher`, features included; without a teacher only of the student.
    """
    dtype = resolve_dtype("auto", config)
    shapes = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    models = {role: (shape.config, shape.extractor) for role, shape in shapes.items()}
    seconds = random_latencies(models, 1, tokens, config.device, dtype)
    if teacher is not None:
        threads = f", {counted(torch.get_num_threads(), 'thread')}" if config.device.type == "cpu" else ""
        plan.add(
            STUDENT,
            "speed",
            f"{seconds['teacher'] / seconds['student']:.1f} times as fast as the teacher at batch size 1 ({tokens} "
            f"tokens per clip, random weights, {device_name(config.device)}{threads})",
        )
    return seconds


def mean_tokens(speech: Speech) -> int:
    """Return the mean number of label tokens of the training clips."""
    if isinstance(speech.train, SpeechStream):
        return TOKENS
    return max(round(sum(speech.train["label_tokens"][:]) / len(speech.train)), 1)


def add_data(plan: RunPlan, config: ASKDConfig, speech: Speech, held_out: int, untranscribed: int) -> None:
    """Add clips, hours and skipped rows of the training and evaluation sets.

    Args:
        config: with the directory that the lists of skipped rows are in.
        untranscribed: number of clips of `--unlabeled_dataset` that are expected besides those in `speech`.
    """
    if isinstance(speech.train, SpeechStream):
        plan.add(DATA, "training", "a stream: its clips are checked in training")
    else:
        text = f"{_amount(speech.train)}, {mean_tokens(speech)} label tokens per clip"
        if untranscribed:
            text += f"; and about {untranscribed:,} more that the teacher transcribes first"
        plan.add(DATA, "training", text + _skipped(config.output_dir, "training"))
        if not untranscribed and (note := little_speech(sum(speech.train["duration"][:]))):
            plan.add(DATA, "little speech", note)
    if held_out:
        plan.add(DATA, "held out", f"{counted(held_out, 'training clip')}, for the adaptive schedule")
    for name, split in speech.splits.items():
        skipped = f"; {split.skipped:,} skipped" if split.skipped else ""
        plan.add(DATA, f"evaluation {name}", _amount(split.clips) + skipped)


def _amount(clips: Dataset) -> str:
    return f"{counted(len(clips), 'clip')}, {duration(sum(clips['duration'][:]))}"


def _skipped(directory: str, role: str) -> str:
    """Return the number of skipped rows with the reasons, from the lists in a directory."""
    kinds: Counter[str] = Counter()
    for file in Path(directory).glob(f"skipped-{role}-*.csv"):
        with file.open(newline="", encoding="utf-8") as opened:
            kinds.update(row["reason"].partition(":")[0] for row in csv.DictReader(opened))
    if not kinds:
        return ""
    reasons = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return f"; {kinds.total():,} skipped ({reasons})"


def add_cache(plan: RunPlan, name: str, directory: str, space: CacheSpace, seconds_per_clip: float) -> None:
    """Add what a cache lacks and what that costs."""
    missing = space.clips - space.cached
    text = f"{directory}: {space.cached:,} of {counted(space.clips, 'clip')} cached"
    if missing:
        text += f"; {missing:,} to do: {duration(missing * seconds_per_clip)}, {size(space.missing_bytes)}"
    if space.peak_bytes > space.missing_bytes:
        text += f" ({size(space.peak_bytes)} while it is written)"
    plan.add(BEFORE, name, f"{text}; {size(space.free_bytes)} free", missing * seconds_per_clip)


def add_schedule(plan: RunPlan, config: ASKDConfig, length: RunLength, batch_size: int, is_adaptive: bool) -> None:
    """Add the number of steps and the phases."""
    accumulation = config.gradient_accumulation_steps
    clips = f"{batch_size} clips" if accumulation == 1 else f"{batch_size} x {accumulation} clips"
    if length.steps_per_epoch is None:
        plan.add(SCHEDULE, "steps", f"{length.steps:,} of {clips}")
    else:
        epochs = f"{length.steps / length.steps_per_epoch:g}"
        epoch = counted(length.steps_per_epoch, "step")
        plan.add(SCHEDULE, "steps", f"{length.steps:,} of {clips}: {epochs} epochs of {epoch}")
    plan.add(SCHEDULE, "phases", blend_schedule(config, length.steps).table())
    if is_adaptive:
        plan.add(SCHEDULE, "", ADAPTIVE_NOTE)


def add_time(
    plan: RunPlan, config: ASKDConfig, length: RunLength, measured: Measured, held_out: int, speech: Speech
) -> None:
    """Add the time per step and per epoch, of the run, and of the evaluations in training."""
    schedule = blend_schedule(config, length.steps)
    steps = {name: max(end - max(start, length.done), 0) for name, start, end, *_ in schedule.phases()}
    longest = max(measured.step_seconds.values())
    seconds = {name: measured.step_seconds.get(name, longest) for name in steps}
    for name in steps:
        text = f"{duration(seconds[name])} per step (median of {STEPS})"
        if length.steps_per_epoch is not None:
            text += f", {duration(seconds[name] * length.steps_per_epoch)} per epoch"
        plan.add(TIME, f"{name} phase", text)
    training, number = sum(steps[name] * seconds[name] for name in steps), sum(steps.values())
    text = f"{duration(training)} for {counted(number, 'step')}{' left' if length.done else ''}"
    if held_out and "teacher" in steps:
        text += f"; {duration(number * max(seconds.values()))} if the teacher is kept to the end"
    plan.add(TIME, "training", text, training)
    if held_out and "teacher" in steps:
        first = length.done // schedule.measured_every
        times = max((schedule.teacher_end(BlendState()) - 1) // schedule.measured_every - first, 0)
        clips_per_step = measured.batch_size * config.gradient_accumulation_steps
        most = times * held_out / clips_per_step * seconds["teacher"]
        plan.add(TIME, "held-out clips", f"{counted(times, 'measurement')}: at most {duration(most)}", most)
    times = evaluations(config, length)
    if measured.evaluation_seconds is not None and times:
        once = measured.evaluation_seconds * evaluation_batches(config, speech)
        text = f"{counted(times, 'time')}, {duration(once)} each: {duration(times * once)}"
        plan.add(TIME, "evaluation", f"{text}, and longer while the transcripts are too long", times * once)


def evaluation_batches(config: ASKDConfig, speech: Speech) -> int:
    return sum(math.ceil(len(clips) / config.per_device_eval_batch_size) for clips in speech.evaluation.values())


def add_time_after_training(
    plan: RunPlan, options: Options, evaluation_seconds: float | None, speech: Speech, clip_seconds: dict[str, float]
) -> None:
    """Add the selection of alignment heads, the comparison after training, and the total of the plan.

    Args:
        evaluation_seconds: of a batch by the student; None without evaluation clips.
        clip_seconds: of a clip at batch size 1, by model, from `add_speed`.
    """
    config, both = options.config, sum(clip_seconds.values())
    splits = list(speech.evaluation.values())
    # those of `select_heads_after_training`
    aligned = splits[:1] if isinstance(speech.train, SpeechStream) else [speech.train]
    selects = options.run.select_alignment_heads and not options.lora.keep_adapter
    if selects and aligned and "teacher" in clip_seconds and has_alignment_heads(options.model.teacher):
        number = min(CLIPS, len(aligned[0]))
        text = f"on {counted(number, 'clip')}: about {duration(number * both)} (not with --no_select_alignment_heads)"
        plan.add(TIME, "alignment heads", text, number * both)
    if options.data.compare and evaluation_seconds is not None:
        models = [*clip_seconds]
        compared = "student and initial student" if len(models) == 1 else "student, initial student and teacher"
        after = evaluation_seconds * evaluation_batches(config, speech) * (1 + both / clip_seconds["student"])
        text = f"evaluation of {compared}: {duration(after)}, and longer where their transcripts are too long"
        plan.add(TIME, "after training", text, after)
        number = min(SPEED_CLIPS, len(splits[0]))
        seconds = both * clips_measured(number, speed_batch_sizes(number), REPETITIONS, config.device)
        text = f"of {' and '.join(models)} on {counted(number, 'clip')}: about {duration(seconds)}"
        plan.add(TIME, "measured speed", f"{text} (neither this nor the evaluation with --no_compare)", seconds)
    plan.add(TIME, "total", f"about {duration(plan.seconds)} on this machine")


def add_needs(
    plan: RunPlan, config: ASKDConfig, lora: LoraArguments, length: RunLength, measured: Measured, student: Shape
) -> None:
    """Add memory, and the disk space of checkpoints and student."""
    device = config.device
    if measured.peak_bytes is not None:
        kind = "GPU memory" if device.type == "cuda" else "resident memory of the process"
        total = memory_bytes(device)
        of = "" if total is None else f" of {size(total)}"
        plan.add(NEEDS, "peak memory", f"{size(measured.peak_bytes)}{of}, {kind}")
    times, each = saves(config, length), size(measured.checkpoint_bytes)
    if times is None:
        plan.add(NEEDS, "checkpoints", f"after each better evaluation, {each} each")
    elif times:
        limit = config.save_total_limit or None
        kept = times if limit is None else min(times, limit + (config.load_best_model_at_end and limit == 1))
        in_all = size(kept * measured.checkpoint_bytes)
        plan.add(NEEDS, "checkpoints", f"{counted(times, 'time')}, {each} each; {kept:,} kept: {in_all}")
    else:
        plan.add(NEEDS, "checkpoints", "none")
    if lora.keep_adapter:
        plan.add(NEEDS, "adapter", size(4 * measured.trained_parameters))
    else:
        plan.add(NEEDS, "student", f"{size(student.disk_bytes)} in {config.save_dtype}")


def add_output(plan: RunPlan, config: ASKDConfig, checkpoint: str | None, repository: Repository | None) -> None:
    """Add the directory of the run, what it resumes from, and what is pushed where."""
    exists = "exists" if Path(config.output_dir).exists() else "will be created"
    plan.add(OUTPUT, "directory", f"{config.output_dir} ({exists})")
    plan.add(OUTPUT, "found in the clips", f"kept in {kept_in()}, for the run")
    plan.add(OUTPUT, "resumed from", checkpoint or "nothing: the run starts from the beginning")
    if repository is None:
        plan.add(OUTPUT, "pushed", "nothing")
        return
    visibility = {True: "private", False: "public", None: "as public or private as its owner's default"}
    state = "exists" if repository.exists else "will be created"
    branch = f", branch {config.hub_revision}" if config.hub_revision else ""
    when = "at the end" if config.hub_strategy == HubStrategy.END else "at every checkpoint and at the end"
    what = f"student, processor and model card, {when},"
    plan.add(OUTPUT, "pushed", f"{what} to {repository.repo_id}{branch} ({state}, {visibility[repository.private]})")


def add_library_caches(plan: RunPlan, options: Options, speech: Speech) -> None:
    """Add what the caches of the libraries keep of this dry run. The run reads it there."""
    data, models, noise = options.data, options.model, options.mix.no_speech_dataset
    names = [models.teacher, models.student, *data.dataset, *data.eval_dataset, data.unlabeled_dataset]
    names += [*models.encoder_recovery_dataset, None if noise == SYNTHETIC else noise]
    hub = sorted({name for name in names if public_name(name)[1]})
    if hub:
        plan.add(OUTPUT, "downloads", f"of {', '.join(hub)}, kept in {constants.HF_HOME}")
    train = [] if isinstance(speech.train, SpeechStream) else [speech.train]
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    files = {Path(file["filename"]) for clips in (*train, *speech.evaluation.values()) for file in clips.cache_files}
    converted = [file for file in files if file.is_relative_to(root)]
    if converted:
        total = size(sum(file.stat().st_size for file in converted))
        plan.add(OUTPUT, "converted data", f"{total}, kept in {root}")
