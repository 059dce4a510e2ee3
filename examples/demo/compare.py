"""Evaluate the demo's student of labels only, and compare both students with their teacher in a table and a picture.

python examples/demo/compare.py --askd runs/demo/askd --labels_only runs/demo/labels_only --picture runs/demo/demo.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import numpy as np
from matplotlib import pyplot as plt

from askd_hf.commands.evaluate import main as evaluate
from askd_hf.evaluation import Results
from askd_hf.evaluation.bootstrap import bootstrap_units, confidence_interval, resampled_rates
from askd_hf.evaluation.result_tables import Table, interval_note, with_interval
from askd_hf.evaluation.results import PartLatency, Scores
from askd_hf.evaluation.study import SetErrors, set_errors

DATA = Path(__file__).parent / "data"
DOMAIN = "calls"  # the set of the students' domain
MODELS = ("teacher", "ASKD student", "student, labels only")
TITLES = {"calls": "calls: 2 new voices on a noisy line", "studio": "studio: what the teacher was made for"}
PARTS = {"features": "0.75", "encoder": "0.5", "decoder": "0.25"}  # shades of gray


def read(askd: Path, labels_only: Path) -> tuple[Results, dict[str, list[Scores]]]:
    """Return the evaluation of the ASKD student, and for each set the scores of `MODELS`."""
    first = Results.load(askd / "evaluation" / "results.json")
    second = Results.load(labels_only / "evaluation" / "results.json")
    others = {entry.split: entry.scores["student"] for entry in second.sets}
    scores = {e.name: [e.scores["teacher"], e.scores["student"], others[e.split]] for e in first.sets}
    return first, scores


def parts_of(results: Results) -> list[PartLatency]:
    """Return the latency by part at batch size 1 of `MODELS`. Both students have the same shape."""
    of = {row.role: row for row in results.speed.parts if row.batch_size == 1}
    return [of["teacher"], of["student"], of["student"]]


def milliseconds(row: PartLatency) -> list[float]:
    """Return the latency of `PARTS` per clip; the decoder's with the output projection."""
    return [1000 * seconds for seconds in (row.features, row.encoder, row.decoder + row.projection)]


def errors_of(evaluation: Path, split: str) -> SetErrors:
    """Return the errors of a student on a split. An evaluation may name its sets by dataset and split."""
    (name,) = (entry.name for entry in Results.load(evaluation / "results.json").sets if entry.split == split)
    return set_errors(evaluation, name, split, "basic")


def difference(askd: Path, labels_only: Path, split: str) -> str:
    """Return the WER of the ASKD student minus that of the student trained on labels only, with its interval."""
    ours, theirs = (errors_of(run / "evaluation", split) for run in (askd, labels_only))
    words = np.array(ours.words)
    _, units = bootstrap_units(ours.speakers)
    first, second = resampled_rates(np.array([ours.errors, theirs.errors]), words, units)
    points = 100 * (sum(ours.errors) - sum(theirs.errors)) / words.sum()
    return with_interval(points, confidence_interval(first - second), signed=True)


def summary(results: Results, scores: dict[str, list[Scores]], askd: Path, labels_only: Path) -> Table:
    sizes = [results.models[role].parameters for role in ("teacher", "student", "student")]
    parts = parts_of(results)
    rows = []
    for number, name in enumerate(MODELS):
        rates = [
            with_interval(of_set[number].wer, of_set[number].wer_confidence_interval) for of_set in scores.values()
        ]
        faster = parts[0].total / parts[number].total
        times = [f"{time:.1f}" for time in milliseconds(parts[number])]
        rows.append([name, *rates, f"{sizes[number] / 1e6:.2f} M", f"{faster:.1f}x", *times])
    notes = [interval_note(results.sets)]
    for entry in results.sets:
        to_teacher = entry.comparison
        points = with_interval(to_teacher.wer_difference, to_teacher.confidence_interval, signed=True)
        notes.append(f"{entry.name}, ASKD student - teacher: {points} points, {entry.reference_words} words")
        notes.append(f"{entry.name}, ASKD student - labels only: {difference(askd, labels_only, entry.split)} points")
    conditions = f"{results.speed.device}, {results.speed.threads} thread" + "s" * (results.speed.threads > 1)
    notes.append(f"One clip at a time. features, encoder, decoder: ms per clip; {conditions}")
    notes.append("Both students have the same shape: the time is that of the ASKD student")
    header = ["model", *(f"{name}: WER, %" for name in scores), "size", "as fast", *PARTS]
    return Table("The demo", header, rows, 1, notes)


def draw(results: Results, scores: dict[str, list[Scores]], path: Path) -> None:
    """Plot the WER on both sets with its intervals, and the latency by part."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    axes[1].sharey(axes[0])
    colors = ("tab:gray", "tab:blue", "tab:orange")
    for ax, (name, of_set) in zip(axes, scores.items(), strict=False):
        rates = [entry.wer for entry in of_set]
        intervals = [entry.wer_confidence_interval for entry in of_set]
        ends = [
            [abs(end - rate) for end, rate in zip(side, rates, strict=True)] for side in zip(*intervals, strict=True)
        ]
        ax.bar(
            [model.replace("student, ", "student,\n") for model in MODELS], rates, yerr=ends, capsize=4, color=colors
        )
        ax.set(title=TITLES.get(name, name), ylabel="WER, %, with 95 % interval")
    left = [0.0] * len(MODELS)
    for part, times in zip(PARTS, zip(*map(milliseconds, parts_of(results)), strict=True), strict=True):
        axes[-1].barh(MODELS, times, left=left, label=part, color=PARTS[part])
        left = [start + time for start, time in zip(left, times, strict=True)]
    axes[-1].set(title="time per clip, one at a time", xlabel="ms")
    axes[-1].legend(fontsize="small")
    axes[-1].invert_yaxis()
    for ax in axes[:-1]:
        ax.tick_params(axis="x", labelsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--askd", type=Path, required=True, help="output directory of a run, with its evaluation")
    parser.add_argument("--labels_only", type=Path, required=True, help="output directory of a run with --preset ce")
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    words = f"--eval_splits {' '.join(TITLES)} --normalizer basic --batch_size 40".split()
    words += ["--model", str(args.labels_only), "--output_dir", str(args.labels_only / "evaluation")]
    evaluate([*words, "--dataset", str(DATA)])
    results, scores = read(args.askd, args.labels_only)
    draw(results, scores, args.picture)
    print(summary(results, scores, args.askd, args.labels_only).text())
    print(f"\nThe picture: {args.picture}")
    print(f"The report, with audio: {args.askd / 'evaluation' / 'report.html'}")
    print(f"The model card: {args.askd / 'README.md'}")


if __name__ == "__main__":
    main()
