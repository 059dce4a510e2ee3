r"""How far the teacher's `k` most probable tokens and the rest as one are from its whole distribution.

    python examples/benchmarks/top_k.py --teacher openai/whisper-tiny.en --dataset my_speech
    python examples/benchmarks/top_k.py --teacher openai/whisper-tiny.en --dataset my_speech --student my-student

For a student fresh from the teacher's layers, or a trained one, on some batches: T^2*KL(teacher || student) a label
token, which for top-k is a lower bound, and the gradient of all trained weights beside that of the whole KL. What it
makes of the WER: examples/benchmarks/whole_run.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from steps import Batch, decoder_inputs, print_table, real_batches
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from askd_hf import init_student, load_whisper
from askd_hf.arguments.parser import parse_args
from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.objective import TopK
from askd_hf.projection import (
    LMHeadInputs,
    at_positions,
    capture_lm_head_inputs,
    chunked_distillation_loss,
    label_positions,
)


@dataclass
class TopKArguments:
    """Which models, on what."""

    teacher: str | None = field(default=None, metadata={"help": "Hub id or directory."})
    student: str | None = field(
        default=None, metadata={"help": "Hub id or directory. Default: 2 of the teacher's decoder layers, untrained."}
    )
    dataset: str | None = field(default=None, metadata={"help": "Directory with speech (see askd-hf distill)."})
    language: str | None = field(default=None, metadata={"help": "Language of the speech, for a multilingual model."})
    batch_size: int = field(default=8, metadata={"help": "Clips a batch."})
    batches: int = field(default=8, metadata={"help": "Batches."})
    top_k: list[int] = field(default_factory=lambda: [1, 8, 32, 128, 512], metadata={"help": "The `k` to compare."})
    temperature: float = field(default=2.0, metadata={"help": "Of teacher and student."})
    json: str | None = field(default=None, metadata={"help": "File for the numbers."})


class Distance(NamedTuple):
    """The loss a token, the gradient of all trained weights, and the probability of the rest in the target."""

    loss: float
    gradient: Tensor
    rest: float


def main() -> None:
    (args,) = parse_args((TopKArguments,))
    if not (args.teacher and args.dataset):
        raise UserError("--teacher and --dataset are needed")
    teacher = load_whisper(args.teacher).eval().requires_grad_(False)
    student = load_whisper(args.student) if args.student else init_student(teacher)
    student.model.encoder.requires_grad_(False)
    batches = real_batches(args.teacher, args.dataset, args.language, args.batches, args.batch_size)
    rows = {k: [] for k in args.top_k}
    for batch in batches:
        whole = distance(student, teacher, batch, None, args.temperature)
        for k, row in rows.items():
            part = distance(student, teacher, batch, k, args.temperature)
            off = (part.gradient - whole.gradient).norm() / whole.gradient.norm()
            cosine = F.cosine_similarity(part.gradient, whole.gradient, dim=0)
            row.append((whole.loss, part.loss, part.rest, off.item(), cosine.item()))
    means = {k: torch.tensor(row).mean(0).tolist() for k, row in rows.items()}
    table = []
    for k, (whole, part, rest, off, cosine) in means.items():
        percents = (f"{100 * share:.1f} %" for share in (part / whole, rest, off))
        table.append([str(k), f"{part:.4f}", *percents, f"{cosine:.4f}"])
    print_table(["k", "KL", "of the whole", "probability of the rest", "gradient off by", "cosine"], table)
    clips = f"{len(batches)} batches of {args.batch_size} clips"
    print(f"(T = {args.temperature:g}; whole KL {whole:.4f} a token, T^2 included; {clips})")
    if args.json:
        names = ("whole_kl", "kl", "rest", "gradient_off", "cosine")
        report = {k: dict(zip(names, values, strict=True)) for k, values in means.items()}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def distance(
    student: WhisperForConditionalGeneration,
    teacher: WhisperForConditionalGeneration,
    batch: Batch,
    k: int | None,
    temperature: float,
) -> Distance:
    """T^2*KL to the teacher's top-k, or with None to all of it, and its gradient."""
    labels = batch["labels"]
    positions = label_positions(labels)
    inputs = dict(
        input_features=batch["input_features"],
        decoder_input_ids=decoder_inputs(labels, student.config),
        use_cache=False,
    )
    with torch.no_grad(), capture_lm_head_inputs(teacher, positions) as captured:
        teacher(**inputs)
    target: LMHeadInputs | TopK = captured[0]
    rest = 0.0
    if k is not None:
        target = TopK.from_logits(F.linear(*target), at_positions(labels, positions), k, temperature)
        rest = target.log_rest.exp().mean().item()
    with capture_lm_head_inputs(student, positions) as captured:
        student(**inputs)
    total, _ = chunked_distillation_loss(
        captured[0], at_positions(labels, positions), teacher=target, teacher_weight=1.0, temperature=temperature
    )
    trained = [p for p in student.parameters() if p.requires_grad]
    mean = total / len(positions)
    # in float64, as float32 loses the third digit over so many weights
    gradient = torch.cat([g.flatten().double() for g in torch.autograd.grad(mean, trained)])
    return Distance(mean.item(), gradient, rest)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
