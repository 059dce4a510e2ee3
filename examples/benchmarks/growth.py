"""How the cost of a training step grows: the sweeps of `training_step.py`, and its comparison of fast students."""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import steps
from comparison import VARIANTS, BenchmarkArguments, columns_for, measure, prepare, seconds_of

from askd_hf.models.window import POSITIONS_PER_SECOND

SWEEPS = {
    "batch": [2, 4, 8, 16],
    "labels": [16, 32, 64, 128],
    "vocabulary": [6_483, 12_966, 25_932, 51_864],
    "decoder_layers": [1, 2, 3, 4],
    "clips": [8, 16, 32, 64],
}


def sweep(args: BenchmarkArguments) -> list[dict[str, Any]]:
    """The medians of naive, ours with both caches, and the floor, at every value of one quantity."""
    report, rows = [], []
    for value in args.sweep_values or SWEEPS[args.sweep]:
        changes = {
            "batch": dict(batch_size=value),
            "labels": dict(label_tokens=[value, value]),
            "decoder_layers": dict(decoder_layers=str(value)),
            "vocabulary": {},
        }[args.sweep]
        bench = prepare(replace(args, **changes), vocabulary=value if args.sweep == "vocabulary" else None)
        results = measure(bench, ["a", "e", "g"], with_memory=False)
        report.append({args.sweep: value, "seconds": {name: result["seconds"] for name, result in results.items()}})
        a, e, g = (statistics.median(result["seconds"]) for result in results.values())
        rows.append([str(value), f"{a:.3f}", f"{e:.3f}", f"{g:.3f}", f"{a / e:.2f}", f"{e / g:.2f}"])
    steps.print_table([args.sweep, "a: median s", "e: median s", "g: median s", "a / e", "e / g"], rows)
    return report


def fast_student(args: BenchmarkArguments) -> list[dict[str, Any]]:
    """Measure `e` and the size of the encoder cache at each window with each vocabulary, in turn."""
    windows, vocabularies = (None, args.student_window), (None, args.student_vocabulary)
    sizes = list(itertools.product(windows, vocabularies))
    benches = [prepare(args, vocabulary, window) for window, vocabulary in sizes]
    updates = [VARIANTS["e"].build(bench, bench.student) for bench in benches]
    seconds: list[list[float]] = [[] for _ in sizes]
    for repetition in range(args.warm_up + args.repetitions):
        for bench, update, times in zip(benches, updates, seconds, strict=True):
            batch = columns_for("e", bench, repetition)
            elapsed = seconds_of(lambda: update(batch), args.device)  # noqa: B023
            if repetition >= args.warm_up:
                times.append(elapsed)
    report, rows = [], []
    whole = statistics.median(seconds[0])
    cached = [bench.batches[0]["encoder_outputs"][0].nbytes for bench in benches]
    for bench, times, size in zip(benches, seconds, cached, strict=True):
        config = bench.student.config
        window = config.max_source_positions // POSITIONS_PER_SECOND
        report.append(
            {"window_seconds": window, "vocabulary": config.vocab_size, "seconds": times, "cached_bytes": size}
        )
        median = statistics.median(times)
        shares = [f"{whole / median:.2f}", f"{size / 1e6:.3f}", f"{cached[0] / size:.2f}"]
        rows.append([f"{window} s", f"{config.vocab_size:,}", f"{median:.3f}", *shares])
    steps.print_table(["window", "tokens", "e: median s", "speedup", "cached MB per clip", "times smaller"], rows)
    return report


def sweep_clips(args: BenchmarkArguments) -> list[dict[str, Any]]:
    """The passes that fill the caches, once a run, and an epoch of `e`, over so many clips."""
    numbers = args.sweep_values or SWEEPS["clips"]
    bench = prepare(replace(args, batches=-(-max(numbers) // args.batch_size)))
    update = VARIANTS["e"].build(bench, bench.student)
    parts: dict[str, Callable[[int], object]] = {
        "encoder pass": lambda i: steps.with_encoder_output(bench.batches[i], bench.student, args.bf16),
        "teacher pass": lambda i: steps.with_teacher_columns(bench.batches[i], bench.teacher, args.top_k),
        "epoch of e": lambda i: update(columns_for("e", bench, i)),
    }
    seconds = {number: {part: [] for part in parts} for number in numbers}
    for repetition in range(args.warm_up + args.repetitions):
        for number in numbers:
            for part, run in parts.items():
                batches = range(-(-number // args.batch_size))
                elapsed = seconds_of(lambda: [run(i) for i in batches], args.device)  # noqa: B023
                if repetition >= args.warm_up:
                    seconds[number][part].append(elapsed)
    rows = []
    for number in numbers:
        medians = [statistics.median(seconds[number][part]) for part in parts]
        rows.append([str(number), *(text for m in medians for text in (f"{m:.3f}", f"{1000 * m / number:.1f}"))])
    steps.print_table(["clips", *(head for part in parts for head in (f"{part}: s", "ms a clip"))], rows)
    return [{"clips": number, "seconds": seconds[number]} for number in numbers]
