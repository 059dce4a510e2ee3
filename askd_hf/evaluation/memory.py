"""The most memory that a call takes."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that `run` takes above what was taken before it; None where that can't be measured.

    On a CUDA GPU it is what PyTorch has allocated there; of other accelerators it isn't known. On a CPU it is the
    resident memory of the process as Linux counts it: the high-water mark is reset first, and what the C library has
    kept of freed memory is given back, so that it isn't reused unseen. Other threads of the process would be counted
    with it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":  # the process's memory isn't that accelerator's
        return None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):  # another system or C library, or not allowed
        return None
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, tied ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
