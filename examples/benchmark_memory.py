"""Memory: of a step, and of the loss alone, naive and ours."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_steps import TEMPERATURE, distil_whisper_loss
from torch import Tensor

from askd_hf.objective import TopK
from askd_hf.projection import Unprojected, chunked_blend

# ---- the loss alone ----


def naive_loss(student: Unprojected, teacher: Unprojected, labels: Tensor) -> Tensor:
    with torch.no_grad():
        teacher_logits = F.linear(*teacher)
    logits = F.linear(*student)
    return distil_whisper_loss(F.cross_entropy(logits.float(), labels), logits, teacher_logits, labels)


def our_loss(student: Unprojected, teacher: Unprojected | TopK, labels: Tensor) -> Tensor:
    kd = dict(teacher_weight=1 / 1.8, temperature=TEMPERATURE)
    total, _ = chunked_blend(student, labels, teacher=teacher, **kd)
    return total / len(labels)


def our_loss_from_cache(student: Unprojected, teacher: Unprojected, labels: Tensor) -> Tensor:
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

    student, teacher = (Unprojected(random(clips * tokens, width), random(vocabulary, width)) for _ in range(2))
    labels = torch.randint(vocabulary, (clips * tokens,), generator=generator, device=device)
    for tensor in student:
        tensor.requires_grad_(True)
    result: dict[str, Any] = {}

    def run(rows: int) -> None:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = LOSSES[kind](
                Unprojected(student.hidden[:rows], student.weight),
                Unprojected(teacher.hidden[:rows], teacher.weight),
                labels[:rows],
            )
        loss.backward()
        result.update(loss=loss.item(), seconds=time.perf_counter() - start)

    run(1)  # so that libraries have taken what they take once
    student.hidden.grad = student.weight.grad = None
    return {"peak_bytes": peak_bytes(lambda: run(len(labels)), device)} | result


# ---- memory ----


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that `run` takes above what was taken before it; None where that can't be measured.

    On a CPU it is that of the process as Linux counts it. The high-water mark is reset first, and what the C library
    has kept of freed memory is given back, so that it isn't reused unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):  # another system or C library, or not allowed
        return None


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
