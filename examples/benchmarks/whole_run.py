r"""What a whole distillation costs and gives: a naive loop, ours, and ours with caches, on the same speech.

    python examples/benchmarks/whole_run.py --teacher openai/whisper-tiny.en --language english \
        --dataset my_speech --eval_dataset my_test_speech --max_train_samples 400 --num_train_epochs 5

makes students by the static objective of distil-whisper (preset kd), which all variants share:

    naive       a plain loop: teacher and student whole, full-vocabulary KL, labels padded to the batch's longest
    uncached    askd-hf distill
    cached-32   askd-hf distill with both caches, built within the time that is given; 32 tokens of the teacher's
    cached-8    likewise with 8 tokens, and with the encoder's cache of the run before, as later runs have it
    cached-128  likewise with 128 tokens

Each runs in a process of its own, one after the other; its seconds are from the start of Python to the saved student.
Cross-entropy and WER are measured afterwards, and not in the seconds; with --generation_max_length, as students of
little data loop in some clips. All other options are those of askd-hf distill.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from steps import NaiveStep
from torch.utils.data import DataLoader
from transformers import get_scheduler

from askd_hf import ASKDConfig, ASKDTrainer, SpeechCollator, init_student
from askd_hf.arguments import DataArguments, MixArguments, ModelArguments
from askd_hf.arguments.parser import parse_args
from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.evaluation.metrics import compute_metrics_for
from askd_hf.models.generation_config import is_multilingual, set_languages
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.schedule import PRESETS
from askd_hf.training.datasets import evaluation_rows, evaluation_speech, training_speech

VARIANTS = ("naive", "uncached", "cached-32", "cached-8", "cached-128")


@dataclass
class RunArguments:
    """Which runs."""

    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": f"Of {', '.join(VARIANTS)}. Default: all."}
    )
    naive_only: bool = field(default=False, metadata={"help": "Be the process of the naive run."})
    evaluate_only: bool = field(
        default=False, metadata={"help": "Evaluate the students of an earlier run, which gives no seconds."}
    )
    json: str | None = field(default=None, metadata={"help": "File for the seconds and the error rates."})


def main() -> None:
    run_args, model_args, data_args, config = parse_args((RunArguments, ModelArguments, DataArguments, ASKDConfig))
    if data_args.unlabeled_dataset or not (model_args.teacher and data_args.eval_dataset and config.output_dir):
        raise UserError("--teacher, --eval_dataset and --output_dir are needed")
    if run_args.naive_only:
        naive_run(model_args, data_args, config)
        return
    folder = Path(config.output_dir)
    seconds = {}
    for variant in run_args.variants:
        start = time.perf_counter()
        if run_args.evaluate_only:
            seconds[variant] = float("nan")
            continue
        subprocess.run(command(variant, folder), check=True)
        seconds[variant] = time.perf_counter() - start
        print(f"{variant}: {seconds[variant]:.0f} s", flush=True)
    scores = {variant: evaluate(folder / variant, data_args, config) for variant in run_args.variants}
    print("\n              seconds   cross-entropy    WER      times faster than")
    for variant, total in seconds.items():
        score = scores[variant]
        compared = [f"{seconds[other] / total:.2f} x {other}" for other in VARIANTS[:2] if other in seconds]
        figures = f"{total:9.0f}{score['loss']:15.3f}{score['wer']:9.1f} %"
        print(f"{variant:12s}{figures}      {'   '.join(compared)}")
    if run_args.json:
        report = {"seconds": seconds, "scores": scores}
        Path(run_args.json).write_text(json.dumps(report, indent=2) + "\n")


def command(variant: str, folder: Path) -> list[str]:
    """The run of a variant as a command: this one's options, and its own after them."""
    own = ["--preset", "kd", "--output_dir", str(folder / variant), "--eval_strategy", "no", "--save_strategy", "no"]
    given = without(sys.argv[1:], "--variants", "--json", "--output_dir")
    if variant == "naive":
        return [sys.executable, str(Path(__file__)), *given, *own, "--naive_only", "True"]
    if variant.startswith("cached-"):
        own += [
            "--encoder_cache_dir",
            str(folder / "encoder"),
            "--teacher_cache_dir",
            str(folder / f"teacher-{variant}"),
        ]
        own += ["--teacher_top_k", variant.removeprefix("cached-")]
    # the evaluation set is this script's: reading and checking it belongs to no run
    given = without(given, "--eval_dataset")
    return [sys.executable, "-m", "askd_hf.commands.main", "distill", *given, *own]


def without(arguments: list[str], *options: str) -> list[str]:
    """Arguments less some options and their values."""
    kept, dropping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            dropping = argument in options
        if not dropping:
            kept.append(argument)
    return kept


def naive_run(model_args: ModelArguments, data_args: DataArguments, config: ASKDConfig) -> None:
    """A plain loop over shuffled batches with AdamW, a linear schedule and clipping, as Trainer's defaults are."""
    torch.manual_seed(config.seed)
    teacher = load_whisper(model_args.teacher).to(config.device).eval().requires_grad_(False)
    student = init_student(teacher, model_args.decoder_layers)
    processor = load_processor(model_args.teacher)
    set_languages(student, processor, [(source.language, source.task) for source in data_args.train_sources()])
    collator = SpeechCollator(processor, student.config)
    speech = training_speech(data_args, MixArguments(), config, collator, is_multilingual(student))
    batches = DataLoader(speech, config.per_device_train_batch_size, shuffle=True, collate_fn=collator)
    step = NaiveStep(student, teacher, config.bf16)
    total = int(config.num_train_epochs) * len(batches)
    for group in step.optimizer.param_groups:
        group["lr"] = config.learning_rate
    schedule = get_scheduler("linear", step.optimizer, config.get_warmup_steps(total), total)
    done = 0
    for _ in range(int(config.num_train_epochs)):
        for batch in batches:
            names = ("input_features", "labels")
            loss = step({name: batch[name].to(config.device) for name in names})
            schedule.step()
            done += 1
            if done % int(config.logging_steps) == 0:
                print(f"step {done} of {total}: loss {loss.item() / 1.8:.4f}", flush=True)
    student.save_pretrained(config.output_dir)
    processor.save_pretrained(config.output_dir)


def evaluate(model_dir: Path, data_args: DataArguments, config: ASKDConfig) -> dict[str, float]:
    """Cross-entropy, WER and CER on the evaluation split, as in training."""
    model, processor = load_whisper(str(model_dir)), load_processor(str(model_dir))
    collator = SpeechCollator(processor, model.config)
    (split,) = evaluation_speech(
        evaluation_rows(data_args, is_multilingual(model)), data_args, config, collator
    ).values()
    trainer = ASKDTrainer(
        model=model,
        args=replace(config, preset="ce", eval_strategy="no", **PRESETS["ce"]),
        data_collator=collator,
        eval_dataset=split.clips,
        processing_class=processor,
        compute_metrics=compute_metrics_for(processor, data_args.normalizer),
    )
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in ("loss", "wer", "cer")}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
