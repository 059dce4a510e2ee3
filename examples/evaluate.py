r"""Find out how good a Whisper model is, beside its teacher: error rates with intervals, made-up text, speed.

    python examples/evaluate.py --model runs/my-student --teacher openai/whisper-large-v3 --suite open-asr

transcribes LibriSpeech, AMI, Earnings-22 and TED-LIUM with both, writes what they made of every clip to
runs/evaluation-my-student/manifests, and the scores to a table here, to results.json and to report.html. With your own
speech, a directory with audio files and a metadata.csv (file_name,transcription,speaker), and speed:

    python examples/evaluate.py --model runs/my-student --teacher openai/whisper-small --language fr \
        --dataset my_speech --eval_splits test --speed True --speculative True

An interrupted run goes on where it stopped: give the same command again. Scores come from the manifests alone, so
another normalizer needs neither models nor speech:

    python examples/evaluate.py --score_only True --output_dir runs/evaluation-my-student --normalizer basic

All options: --help. They can also stand in a YAML file: --config evaluation.yaml.
"""

from pathlib import Path

import torch

from askd_hf import load_processor, load_whisper
from askd_hf.arguments.parser import parse_args
from askd_hf.arguments.writable import check_writable
from askd_hf.errors import exit_on_user_error
from askd_hf.evaluation import (
    MANIFESTS_DIR,
    EvaluationArguments,
    PreparedSet,
    Results,
    check_can_assist,
    format_results,
    measure_speculative,
    measure_speed,
    plan_jobs,
    prepare_set,
    run_job,
    save_spelling_normalizer,
    score_directory,
    spread_clips,
    write_report,
)
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import check_max_length, check_processor


def main() -> None:
    (args,) = parse_args((EvaluationArguments,))
    directory = Path(args.output_dir)
    check_writable(directory, "--output_dir")
    if args.score_only:
        results = score_directory(directory, args.normalizer, args.n_resamples)
        report(with_earlier(results, directory), directory)
        return

    # ---- models: the one under test first, what it is compared with last ----
    sources = args.sets()
    names = {"student": args.model} | ({"teacher": args.teacher} if args.teacher else {})
    processors = {role: load_processor(name) for role, name in names.items()}
    models = {role: load_whisper(name, attn_implementation=args.attn_implementation) for role, name in names.items()}
    for role, model in models.items():
        check_processor(model, processors[role])
        check_max_length(model, args.generation_max_length)

    # ---- speech: every clip is looked at once, before anything is decoded ----
    sets: list[PreparedSet] = []
    for source in sources:
        sets += prepare_set(
            source,
            window=min(processor.feature_extractor.chunk_length for processor in processors.values()),
            long_form=args.long_form,
            concatenate_seconds=args.concatenate_seconds,
            limit=args.max_eval_samples,
            on_bad_audio=args.on_bad_audio,
            num_proc=args.num_workers or None,
            report_file=directory / f"skipped-{source.name}.csv",
        )

    if args.speed or args.speculative:  # what to time: known before anything is decoded
        timed_set, clips = spread_clips(sets, args.speed_clips)
    if args.speculative:
        check_can_assist(models["teacher"], models["student"])

    # ---- manifests: what is there already isn't decoded again ----
    for processor in processors.values():
        save_spelling_normalizer(directory / MANIFESTS_DIR, processor.tokenizer.english_spelling_normalizer)
    jobs = plan_jobs(
        {role: (name, models[role], processors[role]) for role, name in names.items()},
        sets,
        args.decoding(),
        directory / MANIFESTS_DIR,
        device=torch.device(args.device),
        dtype=args.torch_dtype(),
        overwrite=args.overwrite,
    )
    for job in jobs:
        run_job(job)

    # ---- scores, from the manifests alone, with what an earlier run has measured of the same weights ----
    results = with_earlier(score_directory(directory, args.normalizer, args.n_resamples), directory)
    report(results, directory)
    if not (args.speed or args.speculative):
        return

    # ---- speed: models take turns on the same clips, spread over the first set of short ones ----
    for role, model in models.items():
        set_language(model, processors[role], timed_set.language, timed_set.task)
    if args.speed:
        results.speed = measure_speed(
            models,
            processors,
            clips,
            timed_set.name,
            batch_sizes=sorted({min(size, len(clips)) for size in args.speed_batch_sizes}),
            repetitions=args.repetitions,
            max_length=args.generation_max_length,
        )
    if args.speculative:
        results.speculative = measure_speculative(
            models["teacher"],
            models["student"],
            processors["teacher"],
            clips,
            timed_set.name,
            repetitions=args.repetitions,
            max_length=args.generation_max_length,
        )
    report(results, directory)


def with_earlier(results: Results, directory: Path) -> Results:
    """With the speed that an earlier run has measured of the same weights."""
    file = directory / "results.json"
    if file.exists():
        results.keep_measurements(Results.load(file))
    return results


def report(results: Results, directory: Path) -> None:
    """Print the tables, and write `results.json` and `report.html`."""
    results.save(directory / "results.json")
    print(f"\n{format_results(results)}\n")
    print(f"{directory / 'results.json'}, {write_report(results, directory)}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
