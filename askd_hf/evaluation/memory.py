"""Peak memory of a call, and of the process."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of `run()` above the memory in use before it, in bytes; None if it can't be measured.

    On a CUDA GPU this is the memory allocated by PyTorch; other accelerators aren't supported. On a CPU it is the
    resident memory of the process as Linux counts it. The high-water mark is reset first, and memory that the C
    library keeps after `free` is returned to the system, because its reuse would not be counted. Memory of other
    threads of the process is included.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":  # the resident memory of the process doesn't include that of the accelerator
        return None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, another C library, or no permission
        return None
    run()
    return _status_bytes("VmHWM") - before


def process_peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory of the process so far, in bytes; None if it can't be measured.

    On a CUDA GPU this is the memory reserved by PyTorch, on a CPU the resident memory as Linux counts it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        return _status_bytes("VmHWM") if device.type == "cpu" else None
    except (OSError, StopIteration):  # not Linux
        return None


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory of a CUDA GPU, or of the machine for a CPU; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (ValueError, OSError, AttributeError):  # no such system
        return None


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
