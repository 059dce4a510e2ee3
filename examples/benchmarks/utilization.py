"""Floating-point operations of an update, and how often it synchronizes with the GPU."""

import warnings
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products, convolutions and attention, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_waits(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how many operations made the CPU wait for the GPU (`torch.cuda.set_sync_debug_mode`). None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)
