"""An evaluation as one self-contained HTML page, which makes no requests.

Text and plots are in `templates/report.html` and `report_parts.html`, styles in `report.css`, what happens on a click
in `report.js`. This module computes their data. Plots are inline SVG: positions are in percent and text is in pixels,
so plots scale to any screen width and use the colors of the page in light and dark mode.
"""

import base64
import bisect
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import disk_errors
from .clip_audio import MAX_SECONDS
from .metrics import describe_normalizers
from .prepared_sets import PreparedSet
from .report_clips import clip_lists
from .result_tables import (
    COMBINING_MARKS_NOTE,
    HEADINGS,
    PLAIN_TEXT_NOTE,
    RTFX_NOTE,
    interval_note,
    no_speech_share,
    part_table,
    relative_difference,
    size_on_disk,
    speculative_table,
    speculative_verdict,
    speed_conditions,
    speedup,
    token_notes,
    word_time_table,
)
from .results import CONFIDENCE, ModelSpeed, Results, Scores, SetResult

HARDEST_SPEAKERS = 10
MINUS = "\N{MINUS SIGN}"
SHAPES = ("circle", "square", "diamond", "triangle")  # markers of the models; report.css has their colors
METHODS = {"short_form": "short-form", "sequential": "long-form, sequential", "chunked": "long-form, chunked"}


def write_report(results: Results, folder: Path, sets: Sequence[PreparedSet] = ()) -> Path:
    """Write `folder/report.html` from `results`, with single clips from the manifests in `folder`.

    Omits sections without measured values, and the clips of sets without manifests.

    Args:
        sets: the speech of the sets, from which the audio of the clips is saved. The clips of other sets only have the
            audio that an earlier call has saved.

    Returns:
        The path of the page.

    Raises `UserError` if the page or the audio can't be written.
    """
    page = _environment().get_template("report.html").render(_context(results, folder, sets))
    path = folder / "report.html"
    with disk_errors(f"{path} can't be written"):
        path.write_text(page, encoding="utf-8")
    return path


@functools.cache
def _environment() -> jinja2.Environment:
    """Return an environment that escapes all text, because transcripts may contain anything; undefined names raise."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("askd_hf.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "signed": _signed, "share": _share, "tick": _tick, "speedup": speedup}
    return environment


def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _context(results: Results, folder: Path, sets: Sequence[PreparedSet]) -> dict[str, Any]:
    roles = list(results.models)
    speech = {prepared.spec.name: prepared.clips for prepared in sets}
    script = _source("report.js")
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
        "compared": [entry for entry in scored if entry.comparison],
        "wer_axis": Axis.over(end for entry in scored for s in entry.scores.values() for end in _ends(s)),
        "error_axis": Axis.over(s.wer for entry in scored for s in entry.scores.values() if s.wer is not None),
        "difference_axis": Axis.over(
            end for entry in scored if entry.comparison for end in entry.comparison.confidence_interval
        ),
        "seconds_axis": Axis.over(row.encoder.median + row.decoder.median for row in timed),
        "against_teacher": any(row.speedup is not None for row in timed),
        "faster": [row for row in timed if row.role == roles[0] and row.speedup is not None],
        "trade": speed_against_wer(results),
        "speakers": [by_speaker(entry, roles) for entry in scored if _several_speakers(entry)],
        "clips": [
            (entry, lists)
            for entry in results.sets
            if (lists := clip_lists(entry, manifests, roles, speech.get(entry.name)))
        ],
        "max_seconds": MAX_SECONDS,
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "settings": _flat(results.settings),
        "normalizer_note": describe_normalizers({entry.normalizer for entry in scored}),
        "interval_note": interval_note(scored) if scored else None,
        "combining_marks": [entry.name for entry in scored if entry.has_combining_marks],
        "combining_marks_note": COMBINING_MARKS_NOTE,
        "plain_text_note": PLAIN_TEXT_NOTE,
        "rtfx_note": RTFX_NOTE,
        "headings": HEADINGS,
        "no_speech_share": no_speech_share,
        "relative_difference": relative_difference,
        "size_on_disk": size_on_disk,
        "speed_conditions": speed_conditions,
        "token_notes": token_notes,
        "speculative_verdict": None if results.speculative is None else speculative_verdict(results.speculative),
        "speculative_table": None if results.speculative is None else speculative_table(results.speculative),
        "parts": None if results.speed is None else part_table(results.speed),
        "word_times": word_time_table(results.sets),
    }


def _shapes(models: int) -> list[str]:
    """Return the markers: a circle for the student, a square for the teacher, diamonds and triangles for others."""
    others = [SHAPES[2 + i % 2] for i in range(models - 2)]
    return [SHAPES[0], *others, SHAPES[1]][:models]


# ---- axes ----


@dataclass(frozen=True)
class Axis:
    """An axis of a plot."""

    ticks: tuple[float, ...]  # round values, including both ends
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Iterable[float]) -> "Axis":
        """Return a linear axis over `values` and 0, with about five steps of 1, 2 or 5 times a power of ten."""
        values = [0.0, *values]
        low, high = min(values), max(values)
        aim = (high - low) / 5 or 1.0
        power = 10.0 ** math.floor(math.log10(aim))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= aim * 0.999)
        first, last = math.floor(low / step + 1e-9), max(1, math.ceil(high / step - 1e-9))
        return cls(tuple(round(i * step, 10) for i in range(first, last + 1)))

    @classmethod
    def over_ratios(cls, values: Iterable[float]) -> "Axis":
        """Return a logarithmic axis over positive `values`, with ticks at 1, 2 and 5 times powers of ten."""
        values = list(values)
        powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
        grid = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        first = bisect.bisect_left(grid, min(values) / 1.3) - 1  # space for the labels
        last = bisect.bisect_right(grid, max(values) * 1.3)
        return cls(tuple(float(f"{tick:.3g}") for tick in grid[first : last + 1]), logarithmic=True)

    def at(self, value: float) -> float:
        """Return the position of a value in percent of the axis length."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(100 * (value - low) / (high - low), 2)


# ---- data of the plots ----


def _wer(entry: SetResult) -> dict[str, float]:
    """Return the WER by role; empty for a set without speech."""
    return {role: scores.wer for role, scores in entry.scores.items() if scores.wer is not None}


def _ends(scores: Scores) -> list[float]:
    """Return the WER and the ends of its interval, which the axis of a plot must include."""
    return [value for value in (scores.wer, *(scores.wer_confidence_interval or ())) if value is not None]


def headline(results: Results) -> dict[str, Any] | None:
    """Return the WER of all models, averaged over the short-form sets, else over those of the first long-form method.

    Returns:
        None if there is no WER, else `sets`, those that all models were evaluated on; `wer` by role, in percent; and
        `significance`, the number of sets on which the student is significantly `better` (interval below 0), `worse`
        (interval above 0), or neither.
    """
    complete = [entry for entry in results.sets if _wer(entry).keys() >= results.models.keys()]
    if not complete:
        return None
    method = "short_form" if any(entry.method == "short_form" for entry in complete) else complete[0].method
    sets = [entry for entry in complete if entry.method == method]
    wer = {role: sum(_wer(entry)[role] for entry in sets) / len(sets) for role in results.models}
    intervals = [entry.comparison.confidence_interval for entry in sets if entry.comparison]
    significance = Counter(
        "better" if high < 0 else "worse" if low > 0 else "no significant difference" for low, high in intervals
    )
    return dict(sets=sets, wer=wer, significance=significance)


@dataclass
class SpeedAccuracy:
    """Data of the plot of speed against WER."""

    # the set of the WER; None for the mean of the headline, if the speed was measured on another set
    source: SetResult | None
    wer: dict[str, float]  # by role, in percent
    rows: dict[str, list[ModelSpeed]]  # speed by role, in increasing order
    speed_axis: Axis
    wer_axis: Axis


def speed_against_wer(results: Results) -> SpeedAccuracy | None:
    """Return the data of the plot; None unless both were measured with greedy decoding, as the speed always is."""
    if results.speed is None or results.settings.get("num_beams", 1) != 1:
        return None
    source = next((entry for entry in results.sets if entry.name == results.speed.set and _wer(entry)), None)
    summary = headline(results)
    wer = _wer(source) if source else summary["wer"] if summary else {}
    rows = {role: sorted((r for r in results.speed.rows if r.role == role), key=lambda r: r.rtfx) for role in wer}
    if not any(rows.values()):
        return None
    speeds = Axis.over_ratios(row.rtfx for of_role in rows.values() for row in of_role)
    ends = [end for role in wer for end in (_ends(source.scores[role]) if source else [wer[role]])]
    return SpeedAccuracy(source, wer, rows, speeds, Axis.over(ends))


def _several_speakers(entry: SetResult) -> bool:
    return any(len(scores.wer_by_speaker) > 1 for scores in entry.scores.values())


def by_speaker(entry: SetResult, roles: list[str]) -> dict[str, Any]:
    """Return the set, the `axis` of the WER, the `hardest` speakers for the student, and whether these are all."""
    known = {role: entry.scores[role].wer_by_speaker for role in roles if role in entry.scores}
    first = next(rates for rates in known.values() if len(rates) > 1)
    hardest = sorted(first, key=lambda speaker: (-first[speaker], speaker))[:HARDEST_SPEAKERS]
    axis = Axis.over(rate for rates in known.values() for rate in rates.values())
    return dict(entry=entry, axis=axis, hardest=hardest, whole=len(hardest) == len(first))


# ---- text ----


def _number(value: float | None, digits: int = 0) -> str:
    """Return a number with thousands separators; "" for None."""
    return "" if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def _signed(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:+,.{digits}f}".replace("-", MINUS)  # adding 0.0 turns -0.00 into +0.00


def _tick(value: float) -> str:
    """Return a number without trailing zeros."""
    return f"{value:g}".replace("-", MINUS)


def _share(value: float) -> str:
    """Return a fraction in percent."""
    return f"{100 * value:.1f} %"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the settings as text, without None values. Keys of nested dictionaries are joined by points."""
    lines: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            lines |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            lines[f"{prefix}{name}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return lines
