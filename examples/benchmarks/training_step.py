r"""What a training step costs: naive distillation, plain fine-tuning and ours, side by side in one run.

    python examples/benchmarks/training_step.py --model tiny --json runs/benchmark-tiny.json

makes a Whisper of random weights in the shape of tiny (base, small, large-v3; or `--model DIRECTORY`), a student with
2 of its decoder layers, and batches of random features and labels (or `--dataset DIRECTORY` with speech). Then every
variant makes one update in turn, again and again, so that whatever else the machine does meets all of them:

    a           naive: teacher and student whole, full-vocabulary KL and CE, labels padded to the batch's longest
    a448        the same with labels padded to the decoder's 448 positions, as distil-whisper pads them
    b           Seq2SeqTrainer, plain fine-tuning of the same student
    c           ASKDTrainer in its teacher phase, nothing cached
    d           c with the encoder's output cached
    e           d with the teacher's most probable tokens cached: the teacher isn't run
    f-ema       ASKDTrainer in its self phase, the self-teacher an average; the encoder's output cached
    f-snapshot  the same with a snapshot
    g           floor: cross-entropy alone on cached encoder output, no trainer

The encoder is frozen in all of them. Batches are in the device's memory beforehand: reading them isn't measured.
Ratios between variants of one run mean something, seconds only on the machine that they are from. A GPU is measured by
the same command, with --bf16, --torch_compile or --attn_implementation. For the rows of cost_model.py, measured beside
computed:

    python examples/benchmarks/training_step.py --model large-v3 --batch_size 32 --label_tokens 25 74 --bf16 \
        --peak_tflops 989 --cost_table

In place of the comparison:

    python examples/benchmarks/training_step.py --sweep labels       # or batch, vocabulary, decoder_layers, clips
    python examples/benchmarks/training_step.py --fast_student       # e with a short window and a small vocabulary
    python examples/benchmarks/training_step.py --loss_memory --batch_size 32 --label_tokens 128 128
    python examples/benchmarks/training_step.py --trainer_overhead 100
"""

import copy
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import memory
import overhead
import steps
import torch
import transformers
from cost_table import cost_table
from steps import Batch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from utilization import count_flops, count_waits

from askd_hf import init_student
from askd_hf.arguments.parser import parse_args
from askd_hf.data import TEACHER_COLUMNS
from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.evaluation.memory import peak_bytes
from askd_hf.models.window import POSITIONS_PER_SECOND


@dataclass
class BenchmarkArguments:
    """What is measured, on what, and how often."""

    model: str = field(
        default="tiny",
        metadata={"help": f"The teacher: a shape, {', '.join(steps.SHAPES)} (random weights), or a directory."},
    )
    decoder_layers: str = field(
        default="2", metadata={"help": "Decoder layers of the student, as askd-hf distill takes them."}
    )
    batch_size: int = field(default=8, metadata={"help": "Clips a batch."})
    label_tokens: list[int] = field(
        default_factory=lambda: [15, 75],
        metadata={"help": "Fewest and most label tokens of a synthetic clip; the lengths are uniform between them."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Directory with speech (see askd-hf distill) for real batches. Default: synthetic ones."},
    )
    language: str | None = field(default=None, metadata={"help": "Language of the speech, for a multilingual model."})
    batches: int = field(default=4, metadata={"help": "Different batches; the repetitions take turns with them."})
    top_k: int = field(default=32, metadata={"help": "Tokens that the teacher cache holds at every label token."})
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": "Which to measure. Default: all."}
    )
    repetitions: int = field(default=7, metadata={"help": "Timed updates of every variant."})
    slow_repetitions: int = field(default=2, metadata={"help": "Timed updates of a448, which is many times slower."})
    warm_up: int = field(default=1, metadata={"help": "Updates of every variant before, which aren't timed."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16, and the teacher's weights in it."})
    torch_compile: bool = field(
        default=False,
        metadata={"help": "Trainer's torch.compile of the student, in the variants b to f."},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention: sdpa, eager, flash_attention_2."})
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak of the device in its dtype in 10^12 operations per second, such as 989 for an H200 in "
            "bfloat16: for the share of it that each variant reaches."
        },
    )
    cost_table: bool = field(
        default=False,
        metadata={"help": "Also print the rows of cost_model.py for these models and batches, measured and computed."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU although there is a GPU."})
    sweep: Literal["batch", "labels", "vocabulary", "decoder_layers", "clips"] | None = field(
        default=None,
        metadata={
            "help": "Measure a, e and g over several values of one quantity; or, for clips, the passes that fill the "
            "caches and an epoch of e over so many clips."
        },
    )
    sweep_values: list[int] = field(
        default_factory=list, metadata={"help": "The values of the sweep. Default: four that suit it."}
    )
    fast_student: bool = field(
        default=False,
        metadata={"help": "Measure e with 30 s and the whole vocabulary, and with a short window and 6,000 tokens."},
    )
    student_window: int = field(default=6, metadata={"help": "The short window of --fast_student, in seconds."})
    student_vocabulary: int = field(default=6_000, metadata={"help": "The small vocabulary of --fast_student."})
    loss_memory: bool = field(
        default=False,
        metadata={"help": "Measure the memory of the loss alone, from hidden states on: the naive one and ours."},
    )
    trainer_overhead: int = field(
        default=0,
        metadata={"help": "Train so many steps of the self phase and report the share of time outside of computing."},
    )
    json: str | None = field(default=None, metadata={"help": "File for all numbers as they were measured."})

    def __post_init__(self):
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise UserError(f"--variants {' '.join(unknown)}: choose from {', '.join(VARIANTS)}")
        if len(self.label_tokens) != 2 or not 1 <= self.label_tokens[0] <= self.label_tokens[1]:
            raise UserError("--label_tokens: two numbers, the fewest (at least 1) and the most")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")


class Bench(NamedTuple):
    """What all variants have in common. The batches have the columns of all of them."""

    args: BenchmarkArguments
    teacher: WhisperForConditionalGeneration
    student: WhisperForConditionalGeneration
    batches: list[Batch]

    @property
    def trainer_options(self) -> dict[str, Any]:
        return steps.trainer_options(self.args.device, self.args.bf16, self.args.torch_compile)


class Variant(NamedTuple):
    """A kind of update, from a fresh copy of the student to what takes a batch and returns the loss."""

    description: str
    columns: tuple[str, ...]
    build: Callable[[Bench, WhisperForConditionalGeneration], Callable[[Batch], Tensor]]


RAW, ENCODED = ("input_features",), ("encoder_outputs",)
OUR_RAW, OUR_ENCODED = (*RAW, "label_positions"), (*ENCODED, "label_positions")  # as of `SpeechCollator`

VARIANTS = {
    "a": Variant("naive", RAW, lambda b, student: steps.NaiveStep(student, b.teacher, b.args.bf16)),
    "a448": Variant("naive, padded to 448", RAW, lambda b, student: steps.NaiveStep(student, b.teacher, b.args.bf16)),
    "b": Variant("plain fine-tuning", RAW, lambda b, student: steps.fine_tuning(student, b.trainer_options)),
    "c": Variant(
        "teacher phase", OUR_RAW, lambda b, student: steps.teacher_phase_ratio(student, b.teacher, b.trainer_options)
    ),
    "d": Variant(
        "teacher phase, encoder cached",
        OUR_ENCODED,
        lambda b, student: steps.teacher_phase_ratio(student, b.teacher, b.trainer_options),
    ),
    "e": Variant(
        "teacher phase, both cached",
        (*OUR_ENCODED, *TEACHER_COLUMNS),
        lambda b, student: steps.teacher_phase_ratio(student, None, b.trainer_options),
    ),
    "f-ema": Variant(
        "self phase, average", OUR_ENCODED, lambda b, student: steps.self_phase(student, "ema", b.trainer_options)
    ),
    "f-snapshot": Variant(
        "self phase, snapshot",
        OUR_ENCODED,
        lambda b, student: steps.self_phase(student, "snapshot", b.trainer_options),
    ),
    "g": Variant("floor", ENCODED, lambda b, student: steps.FloorStep(student, b.args.bf16)),
}
SLOW = ("a448",)


def main() -> None:
    (args,) = parse_args((BenchmarkArguments,))
    report: dict[str, Any] = {"arguments": asdict(args), "machine": machine(args.device)}
    print(" ".join(f"{name}={value}" for name, value in report["machine"].items()), flush=True)
    if args.sweep:
        report["sweep"] = sweep_clips(args) if args.sweep == "clips" else sweep(args)
    if args.fast_student:
        report["fast_student"] = fast_student(args)
    if args.loss_memory:
        report["loss_memory"] = loss_memory(args)
    if args.trainer_overhead:
        report["trainer_overhead"] = trainer_overhead(args)
    if not (args.sweep or args.fast_student or args.loss_memory or args.trainer_overhead):
        bench = prepare(args)
        report["label_tokens"] = [(batch["labels"] != -100).sum(1).tolist() for batch in bench.batches]
        report["variants"] = measure(bench, args.variants, with_memory=True)
        print_comparison(report["variants"])
        print_utilization(report["variants"], report["label_tokens"], args.peak_tflops)
        if args.cost_table:
            configs = bench.teacher.config, bench.student.config
            report["cost_table"] = cost_table(report["variants"], report["label_tokens"], *configs, args.peak_tflops)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---- the comparison ----


def prepare(args: BenchmarkArguments, vocabulary: int | None = None, window_seconds: int | None = None) -> Bench:
    """Models and batches on the device."""
    teacher = steps.make_teacher(args.model, args.device, args.attn_implementation, vocabulary, window_seconds)
    student = init_student(teacher, args.decoder_layers)
    student.set_attn_implementation(args.attn_implementation)
    if args.bf16:
        teacher = teacher.to(torch.bfloat16)
    if args.dataset:
        batches = steps.real_batches(args.model, args.dataset, args.language, args.batches, args.batch_size)
    else:
        batches = steps.synthetic_batches(teacher.config, args.batches, args.batch_size, tuple(args.label_tokens))
    batches = [{name: column.to(args.device) for name, column in batch.items()} for batch in batches]
    batches = [steps.with_encoder_output(batch, student, args.bf16) for batch in batches]
    batches = [steps.with_teacher_columns(batch, teacher, args.top_k) for batch in batches]
    return Bench(args, teacher, student, batches)


def measure(bench: Bench, names: list[str], with_memory: bool) -> dict[str, dict[str, Any]]:
    """Seconds of every repetition, the loss of the first update and, if asked for, memory of the named variants."""
    args = bench.args
    encoder = bench.student.model.encoder  # frozen, so that all have the same one: nine of a large model take 20 GB
    update = {
        name: VARIANTS[name].build(bench, copy.deepcopy(bench.student, {id(encoder): encoder})) for name in names
    }
    results = {name: {"description": VARIANTS[name].description, "seconds": []} for name in names}
    for name in names:
        for i in range(max(1, args.warm_up)):
            loss = update[name](columns_for(name, bench, i)).item()
            results[name].setdefault("first_loss", loss)
    for repetition in range(args.repetitions):
        # each starts a round as often as the others: what is left in the caches of the one before favors nobody
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            if name in SLOW and repetition >= args.slow_repetitions:
                continue
            batch = columns_for(name, bench, repetition)
            results[name]["seconds"].append(seconds_of(lambda: update[name](batch), args.device))  # noqa: B023
    if with_memory:
        longest = max(range(len(bench.batches)), key=lambda i: bench.batches[i]["labels"].shape[1])
        for name in names:
            batch = columns_for(name, bench, longest)
            results[name]["peak_bytes"] = peak_bytes(lambda: update[name](batch), args.device)  # noqa: B023
            results[name]["held_bytes"] = steps.held_bytes(update[name].held())
            results[name]["waits"] = count_waits(lambda: update[name](batch), args.device)  # noqa: B023
            results[name]["flops"] = [
                count_flops(lambda: update[name](columns_for(name, bench, i)))  # noqa: B023
                for i in range(len(bench.batches))
            ]
    return results


def columns_for(name: str, bench: Bench, i: int) -> Batch:
    """The `i`-th batch as the variant gets it."""
    batch = bench.batches[i % len(bench.batches)]
    batch = {column: batch[column] for column in (*VARIANTS[name].columns, "labels")}
    return steps.padded_to(batch, bench.student.config.max_target_positions) if name == "a448" else batch


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_comparison(results: dict[str, dict[str, Any]]) -> None:
    medians = {name: statistics.median(result["seconds"]) for name, result in results.items()}
    naive = [name for name in ("a", "a448") if name in medians]
    heads = ["", "", "min s", "median s", "max s", *(f"x {name}" for name in naive)]
    heads += (["/ g"] if "g" in medians else []) + ["MB held", "MB in a step"]
    rows = []
    for name, result in results.items():
        median = medians[name]
        row = [name, result["description"]]
        row += [f"{seconds:.3f}" for seconds in (min(result["seconds"]), median, max(result["seconds"]))]
        row += [f"{medians[other] / median:.2f}" for other in naive]
        row += [f"{median / medians['g']:.2f}"] if "g" in medians else []
        rows.append([*row, megabytes(result["held_bytes"]), megabytes(result["peak_bytes"])])
    steps.print_table(heads, rows)
    print("(x a: times as fast as a; / g: times the floor; in a step: more than is held, at its peak)")


def print_utilization(
    results: dict[str, dict[str, Any]], label_tokens: list[list[int]], peak_tflops: float | None
) -> None:
    """Print tokens per second, FLOP, FLOP/s and synchronizations of each variant.

    Batch and floating-point operations are means, the time is the median.
    """
    tokens = statistics.mean(map(sum, label_tokens))
    rows = []
    for name, result in results.items():
        seconds, flops = statistics.median(result["seconds"]), statistics.mean(result["flops"])
        tflops = flops / seconds / 1e12
        share = f"{100 * tflops / peak_tflops:.1f}" if peak_tflops else "n/a"
        waits = "n/a" if result["waits"] is None else str(result["waits"])
        rows.append([name, f"{tokens / seconds:,.0f}", f"{flops / 1e9:,.0f}", f"{tflops:.3f}", share, waits])
    steps.print_table(["", "label tokens per s", "GFLOP", "TFLOP/s", "% of the peak", "waits for the GPU"], rows)


def megabytes(number: int | None) -> str:
    return "n/a" if number is None else f"{number / 1e6:,.0f}"


# ---- how cost grows ----

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


# ---- the loss alone, and Trainer around the step ----


def loss_memory(args: BenchmarkArguments) -> dict[str, dict[str, Any]]:
    """Peak memory of the loss from hidden states on, forward and backward, each in a process of its own."""
    config = steps.whisper_config(args.model)
    size = args.batch_size, args.label_tokens[1], config.d_model, config.vocab_size
    report = {}
    # fresh processes: what one has freed and the C library kept would hide what the next one takes
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["memory"])  # imports once
    for kind in memory.LOSSES:
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            report[kind] = pool.submit(memory.measure_loss, kind, size, args.device, args.bf16).result()
    naive = report["naive"]["peak_bytes"]
    rows = [
        [kind, megabytes(r["peak_bytes"]), f"{naive / r['peak_bytes']:.1f}" if naive else "n/a", f"{r['seconds']:.3f}"]
        for kind, r in report.items()
    ]
    steps.print_table([f"{size[0]} x {size[1]} label tokens", "MB at the peak", "times less", "s"], rows)
    return report


def trainer_overhead(args: BenchmarkArguments) -> dict[str, Any]:
    """`ASKDTrainer.train()` in the self phase on cached encoder output: where its time goes."""
    bench = prepare(args)
    seconds = overhead.train_timed(bench.student, bench.batches, args.trainer_overhead, bench.trainer_options)
    wall = seconds.pop("wall")
    inside = sum(seconds[name] for name in overhead.COMPUTING)
    seconds["anything else"] = wall - sum(seconds.values())
    percent = 100 * (wall - inside) / wall
    steps.print_table(
        [f"{args.trainer_overhead} steps", "s", "%"],
        [[name, f"{s:.3f}", f"{100 * s / wall:.2f}"] for name, s in seconds.items()],
    )
    print(f"overhead of train() around forward, backward, clipping and the optimizer: {percent:.2f} %")
    return {"steps": args.trainer_overhead, "wall": wall, "seconds": seconds, "overhead_percent": percent}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
