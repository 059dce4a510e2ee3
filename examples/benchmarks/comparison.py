"""The comparison of `training_step.py`: its options, its variants, how they are measured, and its tables."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import steps
import torch
from steps import Batch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from utilization import count_flops, count_waits

from askd_hf import init_student
from askd_hf.data import TEACHER_COLUMNS
from askd_hf.errors import UserError
from askd_hf.evaluation.memory import peak_bytes


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


# ---- measuring ----


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


# ---- tables ----


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
