r"""Propose window, vocabulary and layers of a student that is as fast or as small as required.

    askd-hf plan --teacher openai/whisper-base --speedup 5 --dataset my_speech
    askd-hf plan --teacher openai/whisper-small --max_parameters 40

measures on this machine, with random weights, how long each part of the teacher takes at each size, and prints the
students that reach the target and the command that makes the first of them. With --dataset the window fits the clips
and the vocabulary the transcripts.
"""

import math
import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, WhisperConfig, WhisperProcessor

from ..arguments.parser import parse_args
from ..arguments.plan import PlanArguments
from ..data import clean_texts, load_speech_dataset
from ..data.languages import with_language
from ..evaluation.planning import (
    Candidate,
    Costs,
    candidates,
    measure_costs,
    measured_speedup,
    random_model,
    reaching,
    teacher_is_estimated,
    teacher_shape,
    windows_up_to,
)
from ..evaluation.speed import clip_durations
from ..models.generation_config import MULTILINGUAL_VOCABULARY
from ..models.loading import load_config, load_processor
from ..models.smaller_vocabulary import choose_domain_tokens, count_tokens, vocabulary_size
from .options import options_of

TOKENS = 20  # per clip, if the transcripts are unknown
SHOWN = 8  # students in the table
TRIED = 3  # students measured as a whole
EPOCHS = 5  # of the students in examples/guides/fast-students.md

OPTIONS = options_of("plan")


class Domain(NamedTuple):
    """What is known of the speech.

    Attributes:
        durations: of the clips, seconds; empty if unknown.
        windows: to compare, seconds.
        vocabularies: size of `--vocabulary auto` by window in seconds; empty if unknown.
        tokens: label tokens per clip.
        language: of the transcripts; None if a column has it.
    """

    durations: list[float]
    windows: list[int]
    vocabularies: dict[int, int]
    tokens: int
    language: str | None = None


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
    found = candidates(config, costs, domain.durations, domain.vocabularies)
    good = reaching(found, args.speedup, args.max_parameters)
    print_plan(args, good, costs)
    best, real = confirm(args, config, processor, good, costs)
    print(f"\n{verdict(args, best, real, teacher_is_estimated(config, costs))}")
    print(f"\n{command(args, domain, best)}")
    return best


def describe_domain(args: PlanArguments, config: WhisperConfig, processor: WhisperProcessor) -> Domain:
    """Return durations, vocabularies and label lengths of `--dataset`, with its transcripts as training uses them."""
    whole = teacher_shape(config).window
    if args.dataset is None:
        return Domain([], windows_up_to(whole), {}, TOKENS, args.language or "english")
    speech = load_speech_dataset(args.dataset, args.dataset_config, args.split)
    speech = speech if args.max_samples is None else speech.take(args.max_samples)
    # a duration in the dataset may be in another unit, or missing in some rows
    speech = speech.remove_columns([name for name in speech.column_names if name == "duration"])
    language = args.language or (None if "language" in speech.column_names else "english")
    texts = clean_texts(with_language(speech, language, None, args.dataset), "auto", args.dataset)
    counts = count_tokens(processor.tokenizer, texts.select_columns(["text", "language", "task"]))
    durations = clip_durations(speech, math.inf)
    windows = windows_up_to(whole, durations)
    tokenizer, sizes = processor.tokenizer, {}
    for window in windows:
        kept = choose_domain_tokens(tokenizer, config.vocab_size, window, counts)
        sizes[window] = vocabulary_size(tokenizer, config.vocab_size, window, kept)
    tokens = round(counts.total() / len(speech)) + len(processor.tokenizer.prefix_tokens)
    return Domain(durations, windows, sizes, tokens, language)


def measure(args: PlanArguments, config: WhisperConfig, processor: WhisperProcessor, domain: Domain) -> Costs:
    model = random_model(config, few_layers=True)
    tokens = min(domain.tokens, config.max_target_positions)
    return measure_costs(model, processor.feature_extractor, domain.windows, args.batch_size, tokens)


def print_plan(args: PlanArguments, good: list[Candidate], costs: Costs) -> None:
    """Print the first of the candidates that reach the target."""
    print(
        f"{len(good)} students of {args.teacher} are expected to reach the target, for clips of {costs.tokens} "
        "tokens. The first ones:"
    )
    print("window, s  vocabulary  encoder layers  decoder layers  parameters, M  expected speedup  clips that fit, %")
    for shape in good[:SHOWN]:
        print(
            f"{shape.window:9}  {shape.vocabulary:10,}  {shape.encoder_layers:14}  {shape.decoder_layers:14}  "
            f"{shape.parameters / 1e6:13.1f}  {shape.speedup:15.1f}x  {100 * shape.fitting:17.1f}"
        )


def confirm(
    args: PlanArguments, config: WhisperConfig, processor: WhisperProcessor, good: list[Candidate], costs: Costs
) -> tuple[Candidate, float]:
    """Measure the first candidate as a whole, and if it misses the target, faster ones, up to `TRIED`.

    Args:
        good: of `reaching`.
        costs: of the teacher.

    Returns:
        The first candidate that reaches `--speedup`, else the last one measured, and its measured speedup.
    """
    left = good
    for _ in range(TRIED):
        best = left[0]
        real = measured_speedup(config, processor.feature_extractor, best, args.batch_size, costs)
        if args.speedup is None or real >= args.speedup:
            break
        enough = best.speedup * args.speedup / real  # if the estimate is off by the same factor for all
        left = [shape for shape in left if shape.speedup >= enough]
        if not left:
            break
    return best, real


def verdict(args: PlanArguments, shape: Candidate, real: float, estimated: bool) -> str:
    """Return a sentence about the measured speedup of a candidate, and whether it reaches `--speedup`.

    Args:
        estimated: True if the teacher wasn't measured as a whole.
    """
    threads = torch.get_num_threads()
    text = (
        f"The student with {shape.window} s, {shape.vocabulary:,} tokens, {shape.encoder_layers} encoder and "
        f"{shape.decoder_layers} decoder layers is {real:.1f} times as fast as the teacher, measured as a whole with "
        f"random weights at batch size {args.batch_size} on {threads} thread{'s' * (threads > 1)}"
    )
    text += ". The teacher takes too long for this: its time is the sum of its parts" if estimated else ""
    if args.speedup is None or real >= args.speedup:
        return f"{text}. Its command:"
    return f"{text}. This misses {args.speedup:g}x: other work slows a measurement down. Its command:"


def has_languages(teacher: str, vocabulary: int) -> bool:
    """Return whether a model is multilingual: by its generation config, or else by the size of its vocabulary."""
    try:
        return bool(GenerationConfig.from_pretrained(teacher).is_multilingual)
    except (OSError, AttributeError):
        return vocabulary >= MULTILINGUAL_VOCABULARY


def command(args: PlanArguments, domain: Domain, shape: Candidate) -> str:
    """Return the command that distills this student."""
    teacher = teacher_shape(load_config(args.teacher))
    words = ["askd-hf", "distill", "--teacher", args.teacher, "--decoder_layers", shape.decoder_layers]
    if shape.encoder_layers < teacher.encoder_layers:
        words += ["--encoder_layers", shape.encoder_layers]
    if shape.window < teacher.window:
        words += ["--window_seconds", shape.window, "--long_clips", "skip"]
    labels = "cache/labels"  # of each vocabulary their own
    if shape.vocabulary < teacher.vocabulary:
        is_auto = shape.vocabulary == domain.vocabularies.get(shape.window)
        vocabulary = "auto" if is_auto else shape.vocabulary
        words += ["--vocabulary", vocabulary]
        labels += f"-{vocabulary}-{shape.window:g}s"
    # distill requires the language of a multilingual teacher
    language = args.language or (domain.language if has_languages(args.teacher, teacher.vocabulary) else None)
    words += ["--language", language] if language else []
    words += ["--dataset", args.dataset or "my_speech"]
    words += ["--dataset_config", args.dataset_config] if args.dataset_config else []
    words += ["--train_split", args.split] if args.split != "train" else []
    splits = [
        name
        for name in ("validation", "dev", "test")
        if args.dataset and name != args.split and (Path(args.dataset) / name).is_dir()
    ]
    words += ["--eval_splits", splits[0]] if splits else []
    words += ["--encoder_cache_dir", "cache/encoder"] if "--encoder_layers" not in words else []
    rate = "5e-5" if shape.decoder_layers > 2 else "1e-4"  # the start of a deeper student is closer to the teacher
    words += ["--teacher_cache_dir", labels, "--learning_rate", rate, "--num_train_epochs", EPOCHS]
    return shlex.join(map(str, words))
