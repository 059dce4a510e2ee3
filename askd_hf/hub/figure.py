"""Plot of a run: loss weights, losses, and the WER of evaluations during training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("labels", "teacher", "self")  # of the weights
LOSSES = {"ce_loss": "labels (cross-entropy)", "teacher_loss": "teacher (T²·D)", "self_loss": "self (T²·D)"}


def wer_names(log_history: list[dict[str, Any]]) -> list[str]:
    """Return the keys of the word error rates in the logs, without the capped ones, in the order of the logs."""
    names = dict.fromkeys(key for row in log_history for key in row if key.startswith("eval_"))
    return [name for name in names if name.endswith("wer") and not name.endswith("capped_wer")]


def write_run_figure(log_history: list[dict[str, Any]], path: Path) -> None:
    """Plot a run and save the figure.

    Args:
        log_history: from `trainer_state.json`. Without evaluations there is no plot of the WER.
        path: file to write; the suffix selects the format.
    """
    from matplotlib.figure import Figure  # takes a second, and few processes draw

    training = [row for row in log_history if "teacher_weight" in row]
    names = sorted(wer_names(log_history))
    panels = 3 if names else 2
    # not pyplot, which has global state that the training process may use itself
    figure = Figure(figsize=(8, 2.5 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True)
    _draw_weights(axes[0], training)
    _draw_losses(axes[1], training)
    if names:
        _draw_error_rates(axes[2], log_history, names)
    axes[-1].set(xlabel="step")
    figure.savefig(path, dpi=110)


def _draw_weights(axes: "Axes", training: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in training]
    teacher, own = ([row[name] for row in training] for name in ("teacher_weight", "self_weight"))
    labels = [1 - a - b for a, b in zip(teacher, own, strict=True)]
    if len(steps) == 1:  # an area needs two
        for name, value, below in zip(NAMES, (labels, teacher, own), (0, labels[0], 1 - own[0]), strict=True):
            axes.bar(steps, value, bottom=below, label=name, alpha=0.8)
    else:
        axes.stackplot(steps, labels, teacher, own, labels=NAMES, alpha=0.8)
    axes.set(ylabel="weight", ylim=(0, 1))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _draw_losses(axes: "Axes", training: list[dict[str, Any]]) -> None:
    for name, label in LOSSES.items():
        points = [(row["step"], row[name]) for row in training if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None, label=label)
    axes.set(ylabel="loss per token", yscale="log")
    if training:
        axes.legend()
    axes.grid(alpha=0.3, which="both")


def _draw_error_rates(axes: "Axes", log_history: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        points = [(row["step"], row[name]) for row in log_history if name in row]
        label = name.removeprefix("eval_").removesuffix("wer").strip("_") or "evaluation"
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    # a logarithm shows no zeros
    positive = all(row[name] > 0 for row in log_history for name in names if name in row)
    axes.set(ylabel="WER, %", yscale="log" if positive else "linear")
    from matplotlib.ticker import LogFormatter

    if positive:
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # 30 and 40 within a decade
    axes.legend()
    axes.grid(alpha=0.3, which="both")
