"""Memory: of a step, and of the loss alone, naive and ours."""

import time
from typing import Any

import torch
import torch.nn.functional as F
from steps import TEMPERATURE, distil_whisper_loss
from torch import Tensor

from askd_hf.evaluation.memory import peak_bytes
from askd_hf.objective import TopK
from askd_hf.projection import LMHeadInputs, chunked_distillation_loss

# ---- the loss alone ----


def naive_loss(student: LMHeadInputs, teacher: LMHeadInputs, labels: Tensor) -> Tensor:
    with torch.no_grad():
        teacher_logits = F.linear(*teacher)
    logits = F.linear(*student)
    return distil_whisper_loss(F.cross_entropy(logits.float(), labels), logits, teacher_logits, labels)


def our_loss(student: LMHeadInputs, teacher: LMHeadInputs | TopK, labels: Tensor) -> Tensor:
    kd = dict(teacher_weight=1 / 1.8, temperature=TEMPERATURE)
    total, _ = chunked_distillation_loss(student, labels, teacher=teacher, **kd)
    return total / len(labels)


def our_loss_from_cache(student: LMHeadInputs, teacher: LMHeadInputs, labels: Tensor) -> Tensor:
    k = min(32, len(teacher.weight) - 1)
    ids = torch.arange(k, device=labels.device).expand(len(labels), k)
    log_probs = torch.full(ids.shape, -5.0, device=labels.device)
    return our_loss(student, TopK(ids, log_probs, log_probs[:, 0], log_probs[:, 0]), labels)


LOSSES = {"naive": naive_loss, "ours": our_loss, "ours, teacher cached": our_loss_from_cache}


def measure_loss(kind: str, size: tuple[int, int, int, int], device: torch.device, bf16: bool) -> dict[str, Any]:
    """Peak memory above the inputs, seconds and value of one of `LOSSES`, forward and backward.

    `size`: clips, label tokens of each, width of the model, vocabulary.
    """
    clips, tokens, width, vocabulary = size
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(width**-0.25)

    student, teacher = (LMHeadInputs(random(clips * tokens, width), random(vocabulary, width)) for _ in range(2))
    labels = torch.randint(vocabulary, (clips * tokens,), generator=generator, device=device)
    for tensor in student:
        tensor.requires_grad_(True)
    result: dict[str, Any] = {}

    def run(rows: int) -> None:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = LOSSES[kind](
                LMHeadInputs(student.hidden[:rows], student.weight),
                LMHeadInputs(teacher.hidden[:rows], teacher.weight),
                labels[:rows],
            )
        loss.backward()
        result.update(loss=loss.item(), seconds=time.perf_counter() - start)

    run(1)  # so that libraries have taken what they take once
    student.hidden.grad = student.weight.grad = None
    return {"peak_bytes": peak_bytes(lambda: run(len(labels)), device)} | result
