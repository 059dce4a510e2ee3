"""The plan of a run as text, and the numbers in it that follow from the options alone."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..config import ASKDConfig
from .checks import check_whole_batch

LITTLE_SPEECH = 1800.0  # seconds


class RunPlan:
    """Named lines in sections, printed as one aligned block of text.

    Args:
        sections: their names in the order of the plan. Those without lines are left out.
    """

    def __init__(self, title: str, sections: Sequence[str]):
        self.title = title
        self._sections: dict[str, list[tuple[str, str]]] = {section: [] for section in sections}
        self.seconds = 0.0  # of what the lines describe

    def add(self, section: str, name: str, text: str, seconds: float = 0.0) -> None:
        """Append a line to a section. Further lines of `text` are indented to the first.

        Args:
            seconds: time that the run takes for it, for the total. Default: 0.
        """
        self._sections[section].append((name, text))
        self.seconds += seconds

    def __str__(self) -> str:
        width = max(len(name) for lines in self._sections.values() for name, _ in lines)
        blocks = [self.title]
        for section, lines in self._sections.items():
            if not lines:
                continue
            rows = [f"  {name:{width}}  " + text.replace("\n", f"\n{'':{width + 4}}") for name, text in lines]
            blocks.append("\n".join([section, *rows]))
        return "\n\n".join(blocks)


class RunLength(NamedTuple):
    """The length of a run in steps.

    Attributes:
        steps_per_epoch: None for a stream.
        steps: of the whole run.
        done: steps that an earlier run has made.
    """

    steps_per_epoch: int | None
    steps: int
    done: int = 0

    def times(self, every: int | None) -> int:
        """Return how often something happens after `every` so many of the remaining steps, and after the last."""
        return 0 if every is None else math.ceil(self.steps / every) - self.done // every


def run_length(config: ASKDConfig, clips: int | None, batch_size: int, done: int = 0) -> RunLength:
    """Return the length of a run on a training set of `clips`, None for a stream.

    Args:
        batch_size: per process.

    Raises `UserError` if `--dataloader_drop_last` leaves no batch.
    """
    if clips is None:
        return RunLength(None, config.max_steps, done)
    clips_per_batch = batch_size * config.world_size
    batches = clips // clips_per_batch if config.dataloader_drop_last else math.ceil(clips / clips_per_batch)
    if config.dataloader_drop_last:
        check_whole_batch(clips, clips_per_batch)
    per_epoch = max(math.ceil(batches / config.gradient_accumulation_steps), 1)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    return RunLength(per_epoch, steps, done)


def evaluations(config: ASKDConfig, length: RunLength) -> int:
    """Return how often the rest of the run is evaluated, without `--eval_delay`."""
    return length.times(_every(IntervalStrategy(config.eval_strategy).value, config.eval_steps, length))


def saves(config: ASKDConfig, length: RunLength) -> int | None:
    """Return how many checkpoints the rest of the run saves; None if that depends on the evaluations."""
    strategy = SaveStrategy(config.save_strategy)
    if strategy == SaveStrategy.BEST:
        return None
    return length.times(_every(strategy.value, config.save_steps, length))


def _every(strategy: str, steps: float | None, length: RunLength) -> int | None:
    """Return the steps between two evaluations or checkpoints, None if there are none."""
    if strategy == "epoch":
        return length.steps_per_epoch
    if strategy == "steps":
        return math.ceil(length.steps * steps) if steps < 1 else int(steps)
    return None


def duration(seconds: float) -> str:
    """Return a duration such as "0.25 s", "42 s", "3 min 5 s" or "2 h 10 min"."""
    if seconds < 10:
        return f"{max(seconds, 0.001):.2g} s" if seconds else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def little_speech(seconds: float) -> str | None:
    """Return a sentence on training sets of less than `LITTLE_SPEECH`; None for larger ones."""
    if seconds >= LITTLE_SPEECH:
        return None
    return f"{duration(seconds)} for training may be too little: the students of the guides had 1.6 hours"


def size(number: float) -> str:
    """Return a number of bytes such as "85 kB", "12.3 MB" or "1.25 GB"."""
    if number < 1e6:
        return f"{number / 1e3:.0f} kB"
    return f"{number / 1e6:.1f} MB" if number < 1e9 else f"{number / 1e9:,.2f} GB"


def counted(number: int, noun: str) -> str:
    """Return such as "1 clip" or "1,200 clips"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
