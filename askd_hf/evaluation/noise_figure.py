"""Plot of the WER against the signal-to-noise ratio, of the sets that examples/noisy_sets.py makes."""

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .results import CLIP_CONTEXT, Results, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLEAN = "clean"
OTHERS = ("reverb", "codec")
SNR = re.compile(r"snr(-?\d+(?:\.\d+)?)")

# scores by split: clean, snr20, ..., reverb, codec
Conditions = dict[str, Scores]


def scores_by_condition(evaluations: list[Results]) -> dict[str, Conditions]:
    """Return the scores of each model by its name, without the directories that all names have in common.

    The conditions of a model may be in several evaluations, as those of a study are.

    Raises `UserError` if a model has no noisy set, if two models have the same name, or if two evaluations of a model
    have a condition on different clips.
    """
    found: dict[str, Conditions] = {}
    sets: dict[tuple[str, str], tuple[str, int]] = {}  # what each condition of a model was measured on
    weights: dict[str, str | None] = {}
    for results in evaluations:
        for role, model in results.models.items():
            name = f"{model.name}, context of the clips" if role == CLIP_CONTEXT else model.name
            if weights.setdefault(name, model.weights) != model.weights:
                raise UserError(f"{name}: two evaluations are of different weights: give the models other names")
            for one in results.sets:
                if role not in one.scores or not one.has_speech:
                    continue
                conditions = found.setdefault(name, {})
                if not _is_condition(one.split):
                    continue
                source = (one.name, one.reference_words)
                if sets.setdefault((name, one.split), source) != source:
                    raise UserError(
                        f"{name}: two evaluations have a split {one.split} of different clips: leave one out"
                    )
                conditions.setdefault(one.split, one.scores[role])
    for name, conditions in found.items():
        if not any(SNR.fullmatch(split) for split in conditions):
            raise UserError(
                f"{name}: the evaluation has no sets of signal-to-noise ratios: make them with "
                "examples/noisy_sets.py, and give --eval_splits clean snr20 ..."
            )
    if len(found) == 1:
        return found
    directories = zip(*(Path(name).parts[:-1] for name in found), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda parts: len({*parts}) == 1, directories))
    return {str(Path(*Path(name).parts[shared:])): conditions for name, conditions in found.items()}


def _is_condition(split: str) -> bool:
    return split in (CLEAN, *OTHERS) or SNR.fullmatch(split) is not None


def write_noise_figure(models: dict[str, Conditions], path: Path) -> None:
    """Plot the WER of models with its 95 % intervals: against the SNR, and in rooms and through a codec.

    Args:
        models: by the name in the legend.
        path: file to write; the suffix selects the format.
    """
    from matplotlib.figure import Figure  # takes a second, and few processes draw

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    against_snr, others = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    ratios = sorted({float(SNR.fullmatch(name)[1]) for one in models.values() for name in one if SNR.fullmatch(name)})
    places = {f"snr{ratio:g}": ratio for ratio in ratios}
    places[CLEAN] = ratios[-1] + max(5.0, ratios[-1] - ratios[-2] if len(ratios) > 1 else 5.0)
    _draw(against_snr, models, places, "-")
    against_snr.set(xlabel="SNR, dB", ylabel="WER, %", xticks=list(places.values()))
    against_snr.set_xticklabels([*(f"{ratio:g}" for ratio in ratios), CLEAN])
    against_snr.legend()
    _draw(others, models, {name: float(place) for place, name in enumerate(OTHERS)}, "")
    others.set(xticks=range(len(OTHERS)), xlim=(-0.5, len(OTHERS) - 0.5))
    others.set_xticklabels(OTHERS)
    for axes in (against_snr, others):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def _draw(axes: "Axes", models: dict[str, Conditions], places: dict[str, float], linestyle: str) -> None:
    """Draw a point with its interval for each model and condition, beside each other."""
    step = (max(places.values()) - min(places.values())) * 0.01
    for number, (name, conditions) in enumerate(models.items()):
        points = [(place, conditions[split]) for split, place in places.items() if split in conditions]
        x = [place + step * (number - (len(models) - 1) / 2) for place, _ in points]
        wer = [scores.wer for _, scores in points]
        intervals = [scores.wer_confidence_interval or (scores.wer, scores.wer) for _, scores in points]
        errors = [[w - low for w, (low, _) in zip(wer, intervals, strict=True)]]
        errors += [[high - w for w, (_, high) in zip(wer, intervals, strict=True)]]
        axes.errorbar(x, wer, errors, marker="o", linestyle=linestyle, capsize=3, label=name)
