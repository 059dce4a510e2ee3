r"""Measure seconds and memory of the first and the second start with many clips.

    python examples/benchmarks/many_rows.py --rows 60000 120000 240000

Makes two datasets of clips of a second, noise in FLAC of a few hundred bytes, embedded in Parquet files: three
quarters of the rows and one quarter, mixed with the probabilities 0.7 and 0.3. Each start is a process of its own,
which loads them, checks every clip, mixes them and draws the order of an epoch, as `askd-hf distill` does. Then it
reads as many rows of them as a stream. 20 s of the streaming time are `datasets` waiting for Arrow's threads at the
end of an epoch. Memory is the peak of RssAnon after the imports, without the pages of files; streaming isn't included.

For one core: taskset -c 0 python ...
"""

import contextlib
import io
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from transformers.hf_argparser import HfArg

from askd_hf.arguments.parser import parse_args
from askd_hf.errors import exit_on_user_error

TEACHER = Path(__file__).parents[1] / "demo" / "teacher"
RATE = 16_000
SHARES = (0.75, 0.25)  # of the rows, per dataset
SHARD_ROWS = 10_000
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass
class Arguments:
    """How many rows, and where they are."""

    rows: list[int] = HfArg(default_factory=lambda: [60_000, 120_000, 240_000], help="Rows of both datasets.")
    directory: Path | None = HfArg(default=None, help="Where the datasets are made. Default: a temporary directory.")


def main() -> None:
    from steps import print_table

    (args,) = parse_args((Arguments,), None, "many_rows.py", __doc__)
    table = []
    with contextlib.ExitStack() as stack:
        directory = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for rows in args.rows:
            folder = directory / str(rows)
            make_datasets(folder, rows)
            for start in ("first", "second"):
                table.append([f"{rows:,}", start, *in_a_new_process(folder)])
    print_table(["rows", "start", *PHASES, "until training", "CPU time", "memory", "per row"], table)


def in_a_new_process(folder: Path) -> list[str]:
    """Return the cells of a start."""
    os.environ["HF_HOME"] = str(folder / "home")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds, memory, rows = pool.submit(run_start, folder).result()
    cells = [f"{seconds[name]:.1f} s" for name in PHASES]
    until_training = sum(seconds[name] for name in PHASES if name != "stream")
    cells += [f"{until_training:.1f} s", f"{seconds['CPU']:.1f} s"]
    return [*cells, f"{memory / 1e6:.0f} MB", f"{memory / rows:.0f} B"]


# ---- the datasets ----


def make_datasets(folder: Path, rows: int) -> None:
    """Write the datasets `folder/0` and `folder/1`, unless they are there."""
    for number, share in enumerate(SHARES):
        dataset = folder / str(number)
        if dataset.is_dir():
            continue
        generator = np.random.default_rng(number)
        writing = dataset.with_name(f"{number}.writing")
        writing.mkdir(parents=True, exist_ok=True)
        of_dataset = round(share * rows)
        for first in range(0, of_dataset, SHARD_ROWS):
            shard = [make_row(generator) for _ in range(min(SHARD_ROWS, of_dataset - first))]
            pq.write_table(pa.Table.from_pylist(shard), writing / f"train-{first:09d}.parquet")
        writing.rename(dataset)


def make_row(generator: np.random.Generator) -> dict[str, Any]:
    """Return a clip of a second, a hundredth of which is noise, with three words."""
    wave = np.zeros(RATE, np.float32)
    wave[: RATE // 100] = generator.uniform(-0.1, 0.1, RATE // 100)
    content = io.BytesIO()
    soundfile.write(content, wave, RATE, format="FLAC")
    return {"audio": {"bytes": content.getvalue()}, "text": " ".join(generator.choice(DIGITS, 3))}


# ---- a start ----

PHASES = ("imports", "load", "check", "mix", "order", "stream")


class Memory:
    """The most memory that this process has of its own while the block runs, in bytes (Linux)."""

    def __init__(self) -> None:
        self.peak = self.before = own_memory()
        self._ended = threading.Event()

    def __enter__(self) -> "Memory":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.peak = max(self.peak, own_memory())


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def run_start(folder: Path) -> tuple[dict[str, float], int, int]:
    """Return the seconds of the phases, the peak memory in bytes, and the number of rows."""
    seconds: dict[str, float] = {"CPU": 0.0}

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        begin, used = time.perf_counter(), time.process_time()
        yield
        seconds[phase] = time.perf_counter() - begin
        seconds["CPU"] += time.process_time() - used if phase != "stream" else 0.0

    with timed("imports"):
        run_phases = phases_of_a_start(folder)
    with Memory() as memory:
        rows = run_phases(timed, memory)
    return seconds, memory.peak - memory.before, rows


def phases_of_a_start(folder: Path) -> Callable[..., int]:
    """Import the libraries, load the model, and return a function that runs the other phases."""
    import torch
    from torch.utils.data import RandomSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from askd_hf import ASKDConfig, SpeechCollator, load_processor, load_whisper
    from askd_hf.arguments import DataArguments, MixArguments
    from askd_hf.data import ResumableLengthGroupedSampler, StreamSampler, mix
    from askd_hf.training.datasets import training_limits, training_speech, training_splits, validate_split

    collator = SpeechCollator(load_processor(str(TEACHER)), load_whisper(str(TEACHER)).config)
    names = [str(folder / str(number)) for number in range(len(SHARES))]
    data_args = DataArguments(dataset=names)
    mix_args = MixArguments(dataset_probabilities=[0.7, 0.3])
    streamed = MixArguments(dataset_probabilities=[0.7, 0.3], streaming=True)
    config = ASKDConfig(output_dir=str(folder / "run"), use_cpu=True)

    def run(timed: Callable[[str], contextlib.AbstractContextManager[None]], memory: Memory) -> int:
        with timed("load"):
            splits = training_splits(data_args, collator, multilingual=False)
        rows = sum(map(len, splits))
        with timed("check"):
            limits = training_limits(collator, data_args)
            checked = [
                validate_split("training", Path(name).name, split, limits, data_args, config.output_dir, collator)
                for name, split in zip(names, splits, strict=True)
            ]
        with timed("mix"):
            mixed = mix(checked, mix_args.dataset_probabilities, seed=0)
        with timed("order"):
            list(RandomSampler(mixed, generator=torch.Generator().manual_seed(0)))
            by_length = LengthGroupedSampler(16, lengths=mixed["label_tokens"])
            list(ResumableLengthGroupedSampler(by_length, seed=0, epoch=lambda: 0))
        memory.stop()
        with timed("stream"):
            stream = training_speech(data_args, streamed, config, collator, multilingual=False)
            for _ in StreamSampler(stream, rows, batch_size=16):
                pass
        return rows

    return run


if __name__ == "__main__":
    with exit_on_user_error():
        main()
