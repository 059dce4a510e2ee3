"""What the machine has."""

import os


def available_cores() -> int:
    """Return the number of CPU cores that this process may use, such as those of its Slurm job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
