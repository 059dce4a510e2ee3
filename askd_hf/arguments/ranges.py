"""Checks of option values that don't depend on models or data, made before anything is loaded."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError


@dataclass(frozen=True)
class Range:
    """A range of numbers. NaN is in no range.

    Args:
        low, high: inclusive bounds.
        above, below: exclusive bounds.
        infinite: True if infinity is allowed.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        if not self.infinite and not math.isfinite(value):
            return False
        if not self.low <= value <= self.high:  # NaN as well
            return False
        # the default bounds exclude nothing, not even infinity
        return not (value <= self.above > -math.inf or value >= self.below < math.inf)

    def __str__(self) -> str:
        if self.low > -math.inf and self.high < math.inf:
            return f"between {self.low:g} and {self.high:g}"
        if self.above > -math.inf and self.below < math.inf:
            return f"strictly between {self.above:g} and {self.below:g}"
        parts = [f"at least {self.low:g}"] if self.low > -math.inf else []
        parts += [f"above {self.above:g}"] if self.above > -math.inf else []
        parts += [f"at most {self.high:g}"] if self.high < math.inf else []
        parts += [f"below {self.below:g}"] if self.below < math.inf else []
        return " and ".join(parts or ["a number"])


COUNT = Range(low=1)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(above=0)
SHARE = Range(low=0, high=1)
SEED = Range(low=0, high=2**32 - 1)  # the seeds of NumPy


def check_ranges(options: object, advice: str = "", /, **ranges: Range) -> None:
    """Raise `UserError` if an option, or one number of a list, isn't in its range. None always passes."""
    for name, allowed in ranges.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number not in allowed:
                raise UserError(f"--{name} must be {allowed}, got {number}{advice and f'; {advice}'}")


def check_choice(options: object, name: str, allowed: Iterable[str]) -> None:
    """Raise `UserError` if the option `name` isn't one of the `allowed` values."""
    value = getattr(options, name)
    if value not in allowed:
        raise UserError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_order(options: object, lower: str, upper: str) -> None:
    """Raise `UserError` if the option `lower` is greater than the option `upper`."""
    low, high = getattr(options, lower), getattr(options, upper)
    if low > high:
        raise UserError(f"--{lower} must be at most --{upper}, got {low} and {high}")


def check_layers(option: str, layers: str | None) -> None:
    """Raise `UserError` unless `layers` is a number of layers or a list of distinct layers, such as `0,1,31`."""
    if layers is None:
        return
    try:
        numbers = [int(layer) for layer in layers.removesuffix(",").split(",")]
    except ValueError:
        raise UserError(f"--{option} must be a number or a list such as 0,1,31, got {layers!r}") from None
    if "," not in layers and numbers[0] < 1:
        raise UserError(f"--{option} must be at least 1, got {layers}")
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"--{option} must be distinct layers, counted from 0, got {layers}")


class Window(NamedTuple):
    """The audio window of a student, in whole seconds.

    Attributes:
        shortest: shortest audio context of a training batch. Equal to `longest` for a fixed window.
        longest: what the student takes at a time.
    """

    shortest: int
    longest: int


LONGEST_WINDOW = 30  # seconds, of Whisper


def parse_window(text: str) -> Window:
    """Return the window of `--window_seconds`, such as "6" or "3-10". Raise `UserError` if it is invalid."""
    parts = text.strip().split("-")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(
            f"--window_seconds must be a whole number of seconds such as 6, or a range such as 3-10, got {text!r}"
        )
    window = Window(int(parts[0]), int(parts[-1]))
    if not 1 <= window.shortest <= window.longest <= LONGEST_WINDOW:
        raise UserError(
            f"--window_seconds must be between 1 and {LONGEST_WINDOW}, and a range must be ascending, got {text}"
        )
    return window


def check_vocabulary(vocabulary: str) -> None:
    """Raise `UserError` unless `--vocabulary` is `auto`, a number, or a file with text."""
    if vocabulary == "auto" or vocabulary.isdecimal():
        return
    file = Path(vocabulary)
    if not file.is_file():
        raise UserError(f"--vocabulary must be auto, a number of tokens, or a text file, got {vocabulary!r}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--vocabulary {vocabulary}: not a text file in UTF-8: {error}") from None
    if not text.strip():
        raise UserError(f"--vocabulary {vocabulary}: the file has no text")
