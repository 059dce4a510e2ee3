"""An evaluation as one HTML page that can be opened, mailed and kept: no scripts, no requests, nothing beside it.

The text and the plots are in `templates/report.html` and `report_parts.html`, the looks in `report.css` beside them;
here is what they are drawn from. A plot is SVG within the page, its positions in percent and its text in pixels: so it
is as legible on a phone as on a screen, and takes its colours from the page in light and in dark.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..errors import disk_errors
from .metrics import meaning_of
from .results import CONFIDENCE, Results, Scores, SetResult, SpeedOfModel
from .table import BROKEN_WORDS, PLAIN
from .worst_clips import worst_clips

HARDEST_SPEAKERS = 10
MINUS = "\N{MINUS SIGN}"
SHAPES = ("circle", "square", "diamond", "triangle")  # of the models in the plots; the colours follow in report.css
METHODS = {"short": "short clips", "sequential": "long-form, sequential", "chunked": "long-form, chunked"}


def write_report(results: Results, folder: Path) -> Path:
    """Write `folder/report.html`: what `results` say, with the worst clips from the manifests in `folder`.

    Sections without a measured value are left out, and so are the worst clips of a set without manifests.

    Raises:
        UserError: if the page can't be written.
    """
    page = _environment().get_template("report.html").render(_context(results, folder))
    path = folder / "report.html"
    with disk_errors(f"{path} can't be written"):
        path.write_text(page, encoding="utf-8")
    return path


def _environment() -> jinja2.Environment:
    """Escapes all text, as transcripts may hold anything; a name that isn't there is an error, not an empty place."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("askd_hf.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "signed": _signed, "share": _share, "tick": _tick}
    return environment


def _context(results: Results, folder: Path) -> dict[str, Any]:
    roles = list(results.models)
    scored = [entry for entry in results.sets if _wer(entry)]
    timed = results.speed.rows if results.speed else []
    manifests = folder / results.manifests
    return {
        "results": results,
        "roles": roles,
        "student": roles[0],
        "teacher": roles[-1] if len(roles) > 1 else None,
        "shapes": dict(zip(roles, _shapes(len(roles)), strict=True)),
        "methods": METHODS,
        "confidence": _tick(100 * CONFIDENCE),
        "headline": headline(results),
        "scored": scored,
        "compared": [entry for entry in scored if entry.paired],
        "wer_axis": Axis.over(end for entry in scored for s in entry.scores.values() for end in _ends(s)),
        "error_axis": Axis.over(s.wer for entry in scored for s in entry.scores.values() if s.wer is not None),
        "difference_axis": Axis.over(end for entry in scored if entry.paired for end in entry.paired.interval),
        "seconds_axis": Axis.over(row.encoder.median + row.decoder.median for row in timed),
        "against_teacher": any(row.times_faster is not None for row in timed),
        "faster": [row for row in timed if row.role == roles[0] and row.times_faster is not None],
        "trade": speed_against_wer(results),
        "speakers": [by_speaker(entry, roles) for entry in scored if _several_speakers(entry)],
        "worst": [(entry, *found) for entry in results.sets if (found := worst_clips(entry, manifests, roles[0]))],
        "settings": _flat(results.settings),
        "normalizer_note": meaning_of({entry.normalizer for entry in scored}),
        "broken": [entry.name for entry in scored if entry.broken_words],
        "broken_words": BROKEN_WORDS,
        "plain": PLAIN,
        "silent": lambda entry: entry.silent_clips if entry.speech else entry.clips,
        "made_up": _made_up,
    }


def _shapes(models: int) -> list[str]:
    """The student a circle, the teacher a square, those between a diamond or a triangle."""
    between = [SHAPES[2 + i % 2] for i in range(models - 2)]
    return [SHAPES[0], *between, SHAPES[1]][:models]


# ---------------------------------------------------------------------------------------------------------------------
# scales


@dataclass(frozen=True)
class Axis:
    """A scale of a plot; `at` says where a value stands on it, in percent of the plot's width.

    Attributes:
        ticks: round values, the ends among them.
        logarithmic: equal distances are equal ratios.
    """

    ticks: tuple[float, ...]
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Iterable[float]) -> "Axis":
        """A linear scale of about five steps of 1, 2 or 5, times a power of ten, over `values` and 0."""
        values = [0.0, *values]
        low, high = min(values), max(values)
        aim = (high - low) / 5 or 1.0
        power = 10.0 ** math.floor(math.log10(aim))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= aim * 0.999)
        first, last = math.floor(low / step + 1e-9), max(1, math.ceil(high / step - 1e-9))
        return cls(tuple(round(i * step, 10) for i in range(first, last + 1)))

    @classmethod
    def over_ratios(cls, values: Iterable[float]) -> "Axis":
        """A logarithmic scale over positive `values`, with ticks at 1, 2 and 5 times powers of ten."""
        values = list(values)
        powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
        grid = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        first = bisect.bisect_left(grid, min(values) / 1.3) - 1  # with room for the labels
        last = bisect.bisect_right(grid, max(values) * 1.3)
        return cls(tuple(float(f"{tick:.3g}") for tick in grid[first : last + 1]), logarithmic=True)

    def at(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(100 * (value - low) / (high - low), 2)


# ---------------------------------------------------------------------------------------------------------------------
# what the figures say


def _wer(entry: SetResult) -> dict[str, float]:
    """The WER by role; empty for a set without speech."""
    return {role: scores.wer for role, scores in entry.scores.items() if scores.wer is not None}


def _ends(scores: Scores) -> list[float]:
    """What a plot of the WER must have room for."""
    return [value for value in (scores.wer, *(scores.wer_interval or ())) if value is not None]


def _made_up(entry: SetResult, role: str) -> int:
    """How many clips got text though nobody speaks, of a set without speech or of the clips without a transcript."""
    scores = entry.scores[role]
    return scores.silent_with_text if entry.speech else scores.clips_with_text


@dataclass
class Headline:
    """The WER of all models over the sets that may stand in one mean.

    Attributes:
        sets: one, or several of one method, each with all models.
        wer: by role, percent: the unweighted mean of the sets'.
        verdicts: over `sets`, of the paired intervals: how many are wholly below 0 (`better`: the student is),
            wholly above (`worse`), or neither (`undecided`).
    """

    sets: list[SetResult]
    wer: dict[str, float]
    verdicts: Counter


def headline(results: Results) -> Headline | None:
    """Of the sets of short clips; of the first long-form method where there are none. None without any WER."""
    complete = [entry for entry in results.sets if _wer(entry).keys() >= results.models.keys()]
    if not complete:
        return None
    method = "short" if any(entry.method == "short" for entry in complete) else complete[0].method
    sets = [entry for entry in complete if entry.method == method]
    wer = {role: sum(_wer(entry)[role] for entry in sets) / len(sets) for role in results.models}
    intervals = [entry.paired.interval for entry in sets if entry.paired]
    verdicts = Counter("better" if b < 0 else "worse" if a > 0 else "undecided" for a, b in intervals)
    return Headline(sets, wer, verdicts)


@dataclass
class Trade:
    """Speed against WER.

    Attributes:
        source: the set of the WER; None if it is the headline's mean, as the speed was measured on another set.
        wer: by role, percent.
        rows: by role, by rising speed.
    """

    source: SetResult | None
    wer: dict[str, float]
    rows: dict[str, list[SpeedOfModel]]
    speed_axis: Axis
    wer_axis: Axis


def speed_against_wer(results: Results) -> Trade | None:
    """None unless both were measured, and of greedy decoding, as the speed is."""
    if results.speed is None or results.settings.get("num_beams", 1) != 1:
        return None
    source = next((entry for entry in results.sets if entry.name == results.speed.set and _wer(entry)), None)
    summary = headline(results)
    wer = _wer(source) if source else summary.wer if summary else {}
    rows = {role: sorted((r for r in results.speed.rows if r.role == role), key=lambda r: r.rtfx) for role in wer}
    if not any(rows.values()):
        return None
    speeds = Axis.over_ratios(row.rtfx for of_role in rows.values() for row in of_role)
    ends = [end for role in wer for end in (_ends(source.scores[role]) if source else [wer[role]])]
    return Trade(source, wer, rows, speeds, Axis.over(ends))


@dataclass
class Speakers:
    """The speakers of one set.

    Attributes:
        hardest: for the student, at most `HARDEST_SPEAKERS`.
        whole: whether these are all.
    """

    entry: SetResult
    axis: Axis
    hardest: list[str]
    whole: bool


def _several_speakers(entry: SetResult) -> bool:
    return any(len(scores.wer_by_speaker) > 1 for scores in entry.scores.values())


def by_speaker(entry: SetResult, roles: list[str]) -> Speakers:
    known = {role: entry.scores[role].wer_by_speaker for role in roles if role in entry.scores}
    first = next(rates for rates in known.values() if len(rates) > 1)
    hardest = sorted(first, key=lambda speaker: (-first[speaker], speaker))[:HARDEST_SPEAKERS]
    axis = Axis.over(rate for rates in known.values() for rate in rates.values())
    return Speakers(entry, axis, hardest, whole=len(hardest) == len(first))


# ---------------------------------------------------------------------------------------------------------------------
# text


def _number(value: float | None, digits: int = 0) -> str:
    """Nothing for what wasn't measured."""
    return "" if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def _signed(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:+,.{digits}f}".replace("-", MINUS)  # 0.0 makes +0.00 of -0.001


def _tick(value: float) -> str:
    """As few digits as it needs."""
    return f"{value:g}".replace("-", MINUS)


def _share(value: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * value:.1f} %"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The settings as lines: dictionaries within by names with points, without those that are None."""
    lines: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            lines |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            lines[f"{prefix}{name}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return lines
