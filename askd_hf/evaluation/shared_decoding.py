"""Complete a manifest in one process, or in all processes of a distributed run.

Several processes take turns with the batches that one process would decode, so the lines are the same. Each appends
its batches to a file of its own beside the manifest, and at the end they are put together in their order. A run that
was killed is resumed by any number of processes. The processes needn't share a disk.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from ..data.shared_disk import others_wait
from .manifest import Manifest, append_lines

Lines = list[dict[str, Any]]


def complete(
    manifest: Manifest,
    clips: Dataset,
    done: int,
    batch_size: int,
    decode: Callable[[Dataset], Iterable[Lines]],
    after_batch: Callable[[int], object],
    is_writer: bool,
    share_work: bool = True,
) -> None:
    """Decode the clips that the manifest lacks.

    Args:
        clips: all clips of the manifest.
        done: the number of lines that it has.
        batch_size: of `decode`.
        decode: yields the lines of each batch of some clips, in their order.
        after_batch: called with the number of clips that all processes have decoded since the last call.
        is_writer: whether this process writes the manifest, alone of those that share a disk.
        share_work: False if this process decodes all of them, whatever the others do.
    """
    process = PartialState()
    if not share_work or (process.num_processes == 1 and not manifest.parts.exists()):
        for lines in decode(clips.select(range(done, len(clips)))):
            manifest.append(lines)
            after_batch(len(lines))
        manifest.finish()
        return
    sizes = {first: min(batch_size, len(clips) - first) for first in range(0, len(clips), batch_size)}
    rows = manifest.rows()[:done]
    batches = {first: rows[first : first + size] for first, size in sizes.items() if first + size <= done}
    for path in manifest.parts.glob("*.jsonl"):
        batches |= _read_part(path, sizes)
    held = gather_object([sorted(batches)])  # by each process: the processes may have different disks
    missing = sorted(set(sizes).difference(*held))
    after_batch(len(clips) - done - sum(sizes[first] for first in missing))
    rounds = [
        missing[start : start + process.num_processes] for start in range(0, len(missing), process.num_processes)
    ]
    own = missing[process.process_index :: process.num_processes]
    share = clips.select([row for first in own for row in range(first, first + sizes[first])])
    decoded = {}
    with others_wait():
        for first, lines, one_each in zip(own, decode(share) if own else (), rounds, strict=False):
            append_lines(manifest.parts / f"{process.process_index}.jsonl", [dict(first=first, lines=lines)])
            decoded[first] = lines
            after_batch(sum(sizes[first] for first in one_each))
    earlier = set().union(*held[: process.process_index])
    given = {first: lines for first, lines in batches.items() if first not in earlier} | decoded
    found = {first: lines for some in gather_object([given]) for first, lines in some.items()}
    if is_writer:
        manifest.replace([line for first in sizes for line in found[first]])
        shutil.rmtree(manifest.parts, ignore_errors=True)
    process.wait_for_everyone()


def _read_part(path: Path, sizes: dict[int, int]) -> dict[int, Lines]:
    """Return the complete batches of a part by the number of their first clip. Those of other sizes are left out."""
    found = {}
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            batch = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # a line that a killed process began, or zeros after a power failure
            continue
        if batch is not None and sizes.get(batch["first"]) == len(batch["lines"]):
            found[batch["first"]] = batch["lines"]
    return found
