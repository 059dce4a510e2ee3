"""`askd-hf cache-teacher`, in which one process takes longer than the process group waits, for test_nodes.py.

The second process checks its clips and fills the caches slowly, and the first adds the labels to the cache slowly. The
timeout of the process group is short from the beginning of such work until the processes have waited for each other.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed import distributed_c10d

from askd_hf.commands import cache_teacher
from askd_hf.data import checks, teacher_cache
from askd_hf.training import caches

TIMEOUT = 6  # seconds
LONGER = 10


def set_timeout(seconds: int) -> None:
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), torch.distributed.group.WORLD)


def slow(work: Callable[..., Any], process: int = 1) -> Callable[..., Any]:
    """Return the work as one process does it slowly."""

    def slowly(*arguments, **options):
        set_timeout(TIMEOUT)
        if PartialState().process_index == process:
            print(f"slow: {work.__name__}", flush=True)
            time.sleep(LONGER)
        return work(*arguments, **options)

    return slowly


def wait(process: PartialState, wait_for_everyone=PartialState.wait_for_everyone) -> None:
    wait_for_everyone(process)
    set_timeout(1800)


PartialState.wait_for_everyone = wait
checks.audio_infos = slow(checks.audio_infos)
caches.cache_encoder = slow(caches.cache_encoder)
teacher_cache._compute_parts = slow(teacher_cache._compute_parts)
teacher_cache.add_files = slow(teacher_cache.add_files, process=0)
cache_teacher.main()
