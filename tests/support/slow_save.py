"""`askd-hf pseudo-label`, which takes longer to save than the process group waits, for test_shared_decoding.py.

Gives the timeout of training another value, prints that of the process group, and shortens it to 3 s when the
processes begin to save.
"""

import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import distributed_c10d
from transformers import TrainingArguments

from askd_hf.commands import pseudo_label
from askd_hf.data.shared_disk import is_first_on_disk


def with_short_timeout(directory: Path) -> bool:
    is_first, group = is_first_on_disk(directory), torch.distributed.group.WORLD
    print(f"timeout {group._get_backend(torch.device('cpu')).options._timeout.total_seconds():g} s", flush=True)
    distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
    return is_first


def save_slowly(*arguments, save=pseudo_label.write_dataset):
    time.sleep(5)
    return save(*arguments)


TrainingArguments.ddp_timeout = 1234
pseudo_label.is_first_on_disk, pseudo_label.write_dataset = with_short_timeout, save_slowly
pseudo_label.main()
