r"""Propose window, vocabulary and layers of a student that is as fast or as small as required.

    askd-hf plan --teacher openai/whisper-base --speedup 5 --dataset my_speech
    askd-hf plan --teacher openai/whisper-small --max_parameters 40

measures on this machine, with random weights, how long each part of the teacher takes at each size, and prints the
students that reach the target and the command that makes the first of them. With --dataset the window fits the clips
and the vocabulary the transcripts.
"""

import shlex
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import WhisperConfig, WhisperProcessor
from transformers.hf_argparser import HfArg

from ..arguments.parser import parse_args
from ..arguments.ranges import COUNT, POSITIVE, check_ranges
from ..data import load_speech_dataset
from ..data.audio import SAMPLING_RATE, waveform
from ..data.labels import text_ids
from ..errors import UserError
from ..evaluation.planning import (
    Candidate,
    Costs,
    candidates,
    measure_costs,
    measured_speedup,
    random_model,
    reaching,
)
from ..models.loading import load_config, load_processor
from ..models.smaller_vocabulary import choose_tokens, count_tokens, fewest_tokens, text_bytes

TOKENS = 20  # per clip, if the transcripts are unknown
SHOWN = 8  # students in the table


@dataclass
class PlanArguments:
    """The teacher and the target."""

    _argument_group_name = "plan"

    teacher: str = HfArg(help="Whisper model to distill: a Hub id or a local directory. Its weights aren't read.")
    speedup: float | None = HfArg(default=None, help="How many times as fast as the teacher the student must be.")
    max_parameters: float | None = HfArg(default=None, help="Maximum number of parameters, in millions.")
    dataset: str | None = HfArg(
        default=None,
        help="Speech of the domain, as `askd-hf distill` takes it. Default: none; choose the window by yours.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of --dataset on the Hub.")
    split: str = HfArg(default="train", help="Split of --dataset.")
    max_samples: int | None = HfArg(default=None, help="Look only at the first max_samples clips. Default: all.")
    batch_size: int = HfArg(default=1, help="Clips per batch to measure at.")
    threads: int | None = HfArg(default=None, help="CPU threads to measure with. Default: PyTorch's.")

    def __post_init__(self):
        if self.speedup is None and self.max_parameters is None:
            raise UserError("--speedup or --max_parameters is required: the target")
        check_ranges(self, speedup=POSITIVE, max_parameters=POSITIVE, batch_size=COUNT, threads=COUNT)
        check_ranges(self, "leave it out for all clips", max_samples=COUNT)


OPTIONS = (PlanArguments,)


class Domain(NamedTuple):
    """What is known of the speech.

    Attributes:
        durations: of the clips, seconds; empty if unknown.
        vocabulary: size of `--vocabulary auto` with the teacher's window; None if unknown.
        tokens: label tokens per clip.
    """

    durations: list[float]
    vocabulary: int | None
    tokens: int


def main(argv: list[str] | None = None) -> None:
    plan(*parse_args(OPTIONS, argv, "askd-hf plan", __doc__))


def plan(args: PlanArguments) -> Candidate:
    """Measure, print the students that reach the target and the command for the best one, and return it.

    Raises `UserError` if no student of this teacher reaches the target.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config, processor = load_config(args.teacher), load_processor(args.teacher)
    domain = describe_domain(args, config, processor)
    costs = measure(args, config, processor, domain)
    found = candidates(config, costs, domain.durations, domain.vocabulary)
    good = reaching(found, args.speedup, args.max_parameters)
    best = good[0]
    print_plan(args, good, costs)
    real = measured_speedup(config, processor.feature_extractor, best, args.batch_size, domain.tokens)
    print(
        f"Measured with random weights, {torch.get_num_threads()} threads, batch size {args.batch_size}: {real:.1f}x"
    )
    print(f"\n{command(args, best)}")
    return best


def describe_domain(args: PlanArguments, config: WhisperConfig, processor: WhisperProcessor) -> Domain:
    """Return durations, vocabulary and label lengths of `--dataset`."""
    if args.dataset is None:
        return Domain([], None, TOKENS)
    speech = load_speech_dataset(args.dataset, args.dataset_config, args.split)
    speech = speech if args.max_samples is None else speech.take(args.max_samples)
    tokenizer = processor.tokenizer
    counts = count_tokens(tokenizer, speech.select_columns("text"))
    kept = choose_tokens(tokenizer, counts)
    window = config.max_source_positions / 50
    size = fewest_tokens(tokenizer, config.vocab_size, window) + len(kept) - len(text_bytes(tokenizer))
    tokens = round(statistics.mean(len(text_ids(tokenizer, text or "")) for text in speech["text"]))
    return Domain(durations(speech), size, tokens + len(tokenizer.prefix_tokens))


def durations(speech: Dataset) -> list[float]:
    """Return the duration of each clip in seconds, from the column `duration` if there is one."""
    if "duration" in speech.column_names:
        return [float(value) for value in speech["duration"][:]]
    return [len(waveform(row)) / SAMPLING_RATE for row in speech.select_columns(["audio", "clip"])]


def measure(args: PlanArguments, config: WhisperConfig, processor: WhisperProcessor, domain: Domain) -> Costs:
    model = random_model(config)
    return measure_costs(model, processor.feature_extractor, args.batch_size, domain.tokens)


def print_plan(args: PlanArguments, good: list[Candidate], costs: Costs) -> None:
    """Print the first of the candidates that reach the target."""
    print(
        f"{len(good)} students of {args.teacher} reach the target, for clips of {costs.tokens} tokens. The first ones:"
    )
    print("window, s  vocabulary  encoder layers  decoder layers  parameters, M  expected speedup  clips that fit, %")
    for shape in good[:SHOWN]:
        print(
            f"{shape.window:9}  {shape.vocabulary:10,}  {shape.encoder_layers:14}  {shape.decoder_layers:14}  "
            f"{shape.parameters / 1e6:13.1f}  {shape.speedup:15.1f}x  {100 * shape.fitting:17.1f}"
        )


def command(args: PlanArguments, shape: Candidate) -> str:
    """Return the command that distills this student."""
    config = load_config(args.teacher)
    words = ["askd-hf", "distill", "--teacher", args.teacher, "--decoder_layers", shape.decoder_layers]
    if shape.encoder_layers < config.encoder_layers:
        words += ["--encoder_layers", shape.encoder_layers]
    if shape.window * 50 < config.max_source_positions:
        words += ["--window_seconds", shape.window, "--long_clips", "skip"]
    if shape.vocabulary < config.vocab_size:
        words += ["--vocabulary", "auto" if args.dataset else shape.vocabulary]
    words += ["--dataset", args.dataset or "my_speech"]
    return shlex.join(map(str, words))
