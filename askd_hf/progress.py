"""One progress bar per phase, with the time left, and text that is printed above it."""

import contextlib
import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

import datasets
from tqdm.auto import tqdm

SECONDS_PER_LINE = 60.0  # between two lines of a phase in a log file


class ProgressLines:
    """The progress of a phase in a log file, where a bar would be a line of thousands of characters.

    Prints a line to stderr at most every `SECONDS_PER_LINE`, and one at the end. Has the methods of `tqdm` that are
    used here.
    """

    def __init__(self, total: int, description: str, done: int, leave: bool):
        self.total, self.description, self.n, self.leave = total, description, done, leave
        self._first, self._postfix = done, ""
        self._start = self._last_line = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self._last_line >= SECONDS_PER_LINE and self._first < self.n < self.total:
            self._last_line = now
            left = (now - self._start) / (self.n - self._first) * (self.total - self.n)
            self._print(f"{tqdm.format_interval(left)} left{self._postfix and f' ({self._postfix})'}")

    def set_postfix_str(self, text: str) -> None:
        self._postfix = text

    def close(self) -> None:
        if self.leave:
            self._print(f"{tqdm.format_interval(time.monotonic() - self._start)} taken")

    def _print(self, seconds: str) -> None:
        print(f"{self.description}: {self.n}/{self.total}, {seconds}", file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


Bar: TypeAlias = tqdm | ProgressLines


def progress_bar(total: int, description: str, unit: str = "clip", done: int = 0, leave: bool = True) -> Bar:
    """Return the progress bar of a phase, a context manager: `ProgressLines` if stderr is a file.

    Only the first process of a distributed run shows one.

    Args:
        total: of the units that the phase has.
        done: units that are done before, such as the steps of a run that is resumed.
        leave: whether the bar stays when it is closed.
    """
    hidden = os.environ.get("RANK", "0") != "0"
    if hidden or sys.stderr.isatty() or _in_notebook():
        options: dict[str, Any] = dict(initial=done, leave=leave, disable=hidden, dynamic_ncols=True)
        return tqdm(total=total, desc=description, unit=unit, **options)
    return ProgressLines(total, description, done, leave)


def _in_notebook() -> bool:
    """Return whether this process is IPython's, whose output is not a terminal, but shows bars."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def progress(items: Collection[Any], description: str, unit: str = "clip") -> Iterator[Any]:
    """Yield the items of a collection, with a progress bar."""
    with progress_bar(len(items), description, unit) as bar:
        for item in items:
            yield item
            bar.update()


def write(text: str) -> None:
    """Print a text to stdout, above the bars of the terminal."""
    tqdm.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def hide_datasets_bars() -> Iterator[None]:
    """Hide the bars of `datasets`, such as those for writing shards, within a phase that has a bar of its own."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
