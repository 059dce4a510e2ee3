"""Which values an option can have, whatever the models and the data: checked before anything is loaded."""

import math
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; NaN is in none, and infinity only with `infinite`.

    Args:
        low, high: the bounds, both allowed.
        above, below: bounds that aren't allowed themselves.
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
        # a bound that wasn't given excludes nothing, not even infinity
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
SEED = Range(low=0, high=2**32 - 1)  # what numpy takes


def check_ranges(options: object, advice: str = "", /, **ranges: Range) -> None:
    """Raise `UserError` if a number of `options`, or one in a list of them, isn't in its range. None always passes.

    Args:
        options: a dataclass whose fields are the options.
        advice: what else can be done, at the end of the message.
        ranges: by the names of the options.
    """
    for name, allowed in ranges.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number not in allowed:
                raise UserError(f"--{name} {number} is not {allowed}{advice and f'; {advice}'}")


def check_order(options: object, lower: str, upper: str) -> None:
    """Raise `UserError` if the option `lower` is more than the option `upper`."""
    low, high = getattr(options, lower), getattr(options, upper)
    if low > high:
        raise UserError(f"--{lower} {low} is more than --{upper} {high}: nothing would be left")


def check_layers(option: str, layers: str | None) -> None:
    """Raise `UserError` unless `layers` is a number of layers, or a list of different ones, for whatever model."""
    if layers is None:
        return
    try:
        numbers = [int(layer) for layer in layers.removesuffix(",").split(",")]
    except ValueError:
        raise UserError(f"{option}: {layers!r} is neither a number nor a list such as 0,1,31") from None
    if "," not in layers and numbers[0] < 1:
        raise UserError(f"{option}: {layers} is not at least 1")
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"{option}: {layers} must be different layers, counted from 0")
