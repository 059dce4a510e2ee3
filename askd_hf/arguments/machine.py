"""What the machine has."""

import os

MOST_WORKERS = 8  # of a loader, by default


def available_cores() -> int:
    """Return the number of CPU cores that this process may use, such as those of its Slurm job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_per_process() -> int:
    """Return the number of CPU cores for this process of a distributed run, at least 1.

    The processes that torchrun or `accelerate launch` starts on a machine share its cores. A process that Slurm starts
    has its own (`--cpus-per-task`).
    """
    return max(available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def default_workers() -> int:
    """Return the number of loader processes for a GPU: its share of the cores less one, 1 to `MOST_WORKERS`."""
    return min(MOST_WORKERS, max(cores_per_process() - 1, 1))
