r"""Evaluate a Whisper model and its teacher: error rates with intervals, hallucinations, speed.

    askd-hf evaluate --model runs/my-student --teacher openai/whisper-large-v3 --suite open-asr

transcribes LibriSpeech, AMI, Earnings-22 and TED-LIUM with both models, writes the transcript of every clip to
runs/evaluation-my-student/manifests, and prints the scores and writes them to results.json and report.html. With your
own speech, a directory with audio files and a metadata.csv (file_name,transcription,speaker), and speed:

    askd-hf evaluate --model runs/my-student --teacher openai/whisper-small --language fr \
        --dataset my_speech --eval_splits test --speed True --speculative True

To resume an interrupted run, repeat the command. Scores are computed from the manifests alone, so another normalizer
needs neither models nor speech:

    askd-hf evaluate --score_only True --output_dir runs/evaluation-my-student --normalizer basic

Options can also be given in a YAML file: --config evaluation.yaml.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import GENERATION_CONFIG_NAME

from ..arguments.parser import parse_args
from ..arguments.writable import check_writable
from ..data.locks import locked
from ..data.shared_disk import is_first_on_disk
from ..evaluation import (
    MANIFESTS_DIR,
    DatasetSpec,
    EvaluationArguments,
    PreparedSet,
    Results,
    check_can_assist,
    check_references,
    format_results,
    format_speed,
    measure_speculative,
    measure_speed,
    plan_jobs,
    prepare_set,
    run_jobs,
    save_draft_length,
    save_spelling_normalizer,
    score_directory,
    spread_clips,
    write_report,
)
from ..evaluation.long_form import Method, check_can_transcribe
from ..evaluation.results import CLIP_CONTEXT
from ..models.generation_config import generation_config_file, set_language
from ..models.loading import check_max_length, check_processor, load_processor, load_whisper
from .next_steps import print_publishing
from .options import options_of

OPTIONS = options_of("evaluate")


class Models(NamedTuple):
    """The model to evaluate, `student`, and the one to compare it with, `teacher`, if any; each by its role."""

    names: dict[str, str]
    models: dict[str, WhisperForConditionalGeneration]
    processors: dict[str, WhisperProcessor]


class Speech(NamedTuple):
    """The evaluation sets, and the clips to measure speed on: None if it isn't measured."""

    sets: list[PreparedSet]
    timed: tuple[DatasetSpec, Dataset] | None


def main(argv: list[str] | None = None) -> None:
    evaluate(*parse_args(OPTIONS, argv, "askd-hf evaluate", __doc__))


def evaluate(args: EvaluationArguments) -> None:
    """Transcribe, score and report, as examples/evaluate.py does step by step.

    Raises `UserError` for options, models and speech that don't fit together.
    """
    check_writable(Path(args.output_dir), "--output_dir")
    if args.score_only:
        report(args, score(args))
        return
    models = load_models(args)
    speech = load_speech(args, models)
    write_manifests(args, models, speech)
    if not PartialState().is_main_process:
        return
    results = score(args)
    report(args, results, speech)
    if speech.timed:
        report(args, time_models(args, models, speech, results), speech, format_speed)
    print_publishing(args.model, Path(args.output_dir) / "results.json")


def load_models(args: EvaluationArguments) -> Models:
    """Load student and teacher with their processors."""
    args.start_processes()
    sets = args.sets()  # raises UserError for sets that don't fit together
    names = {"student": args.model}
    if args.clip_context:
        names[CLIP_CONTEXT] = args.model
    if args.teacher:
        names["teacher"] = args.teacher
    processors = {role: load_processor(name) for role, name in names.items()}
    models = {role: load_whisper(name, attn_implementation=args.attn_implementation) for role, name in names.items()}
    for role, model in models.items():
        check_processor(model, processors[role])
        check_max_length(model, args.generation_max_length)
        for spec in sets:  # before their clips are downloaded and checked
            set_language(model, processors[role], spec.language, spec.task)
        for method in cast(list[Method], ["short_form", *(args.long_form or [])]):  # checked by the options
            check_can_transcribe(model, method, args.decoding().timestamps)
    if args.speculative:
        check_can_assist(models["teacher"], models["student"])
    if args.save_num_assistant_tokens:
        generation_config_file(args.model, "--save_num_assistant_tokens")  # raises UserError if there is none
    return Models(names, models, processors)


def load_speech(args: EvaluationArguments, models: Models) -> Speech:
    """Load the sets and check every clip, before anything is transcribed."""
    windows = [processor.feature_extractor.chunk_length for processor in models.processors.values()]
    sets: list[PreparedSet] = []
    for spec in args.sets():
        sets += prepare_set(
            spec,
            window=min(*windows, args.max_duration_in_seconds),
            long_form=cast(list[Method], args.long_form),  # checked by the options
            concatenate_seconds=args.concatenate_seconds,
            limit=args.max_eval_samples,
            on_bad_audio=args.on_bad_audio,
            num_proc=args.check_workers,
            recheck=args.recheck,
            report_file=Path(args.output_dir) / f"skipped-{spec.name}.csv",
        )
    for prepared in sets:
        check_references(prepared.spec, prepared.clips["text"][:], args.normalizer)
    timed = spread_clips(sets, args.speed_clips) if args.speed or args.speculative else None
    return Speech(sets, timed)


def write_manifests(args: EvaluationArguments, models: Models, speech: Speech) -> None:
    """Transcribe every clip that has no transcript in `--output_dir` yet, in all processes.

    Raises `UserError` if another run is writing there, or transcripts were made with other settings.
    """
    folder = Path(args.output_dir) / MANIFESTS_DIR
    is_first = is_first_on_disk(folder)
    with locked(folder) if is_first else contextlib.nullcontext():
        for processor in models.processors.values() if is_first else ():
            save_spelling_normalizer(folder, processor.tokenizer.english_spelling_normalizer)
        jobs = plan_jobs(
            {role: (name, models.models[role], models.processors[role]) for role, name in models.names.items()},
            speech.sets,
            args.decoding(),
            folder,
            device=torch.device(args.device),
            dtype=args.torch_dtype(),
            overwrite=args.overwrite,
        )
        run_jobs(jobs)


def score(args: EvaluationArguments) -> Results:
    """Score the manifests. Speed that an earlier run measured with the same weights is kept."""
    results = score_directory(Path(args.output_dir), args.normalizer, args.n_resamples)
    earlier = Path(args.output_dir) / "results.json"
    if earlier.exists():
        results.keep_measurements(Results.load(earlier))
    return results


def time_models(args: EvaluationArguments, models: Models, speech: Speech, results: Results) -> Results:
    """Add to the results the speed of the models, which take turns on the same clips, and of speculative decoding."""
    timed_set, clips = speech.timed
    for role, model in models.models.items():
        set_language(model, models.processors[role], timed_set.language, timed_set.task)
    if args.speed:
        results.speed = measure_speed(
            models.models,
            models.processors,
            clips,
            timed_set.name,
            batch_sizes=sorted({min(size, len(clips)) for size in args.speed_batch_sizes}),
            repetitions=args.repetitions,
            max_length=args.generation_max_length,
        )
    if args.speculative:
        results.speculative = measure_speculative(
            models.models["teacher"],
            models.models["student"],
            models.processors["teacher"],
            clips,
            timed_set.name,
            num_assistant_tokens=sorted(set(args.num_assistant_tokens)),
            repetitions=args.repetitions,
            max_length=args.generation_max_length,
        )
        if args.save_num_assistant_tokens:
            saved = save_draft_length(args.model, results.speculative)
            number = f"num_assistant_tokens {results.speculative.num_assistant_tokens}"
            what = number if saved else "not changed, as the teacher isn't faster with it in every repetition"
            print(f"{Path(args.model) / GENERATION_CONFIG_NAME}: {what}")
    return results


def report(
    args: EvaluationArguments,
    results: Results,
    speech: Speech | None = None,
    format_tables: Callable[[Results], str] = format_results,
) -> None:
    """Print the tables, and write `results.json` and `report.html`.

    Args:
        speech: from which the report gets audio; None to use what an earlier report has saved.
        format_tables: returns the tables to print.
    """
    directory = Path(args.output_dir)
    results.save(directory / "results.json")
    print(f"\n{format_tables(results)}\n")
    page = write_report(results, directory, speech.sets if speech else ())
    print(f"{directory / 'results.json'}, {page}")
