"""Compare the demo's students with their teacher over several seeds: errors, paired differences and speed.

python examples/demo/seeds.py runs/demo-seeds

The directory has one of each seed, with the runs that compare.py has compared: `make demo-seeds`.
"""

import argparse
from pathlib import Path

from compare import DOMAIN, difference, milliseconds, parts_of, read

from askd_hf.evaluation import Results
from askd_hf.evaluation.result_tables import Table, interval_note, with_interval

TIMES = 4  # as fast as the teacher: what the demo claims


def speedups(results: Results) -> tuple[float, float]:
    """Return how many times as fast as the teacher the student is at batch size 1: by parts, and in `generate`."""
    teacher, student, _ = (sum(milliseconds(row)) for row in parts_of(results))
    (whole,) = (row.speedup for row in results.speed.rows if (row.role, row.batch_size) == ("student", 1))
    return teacher / student, whole


def summary(directories: list[Path]) -> Table:
    """Return the table of the seeds, a row for each set. The name of a directory is its seed."""
    rows, better, fast = [], 0, 0
    for directory in directories:
        askd, labels_only = directory / "askd", directory / "labels_only"
        results, scores = read(askd, labels_only)
        by_parts, whole = speedups(results)
        fast += min(by_parts, whole) >= TIMES
        times = [f"{by_parts:.1f}x", f"{whole:.1f}x"]
        for entry in results.sets:
            low_high = entry.comparison.confidence_interval
            to_teacher = with_interval(entry.comparison.wer_difference, low_high, signed=True)
            rates = [f"{of_model.wer:.2f}" for of_model in scores[entry.name]]
            to_other = difference(askd, labels_only, entry.split)
            rows.append([directory.name, entry.name, *rates, to_teacher, to_other, *times])
            better += entry.split == DOMAIN and low_high[1] < 0
    number = len(directories)
    notes = [
        "WER, %, and differences in points",
        interval_note(results.sets),
        f"{DOMAIN}: fewer errors than the teacher, with the interval below zero: {better} of {number} seeds",
        f"At least {TIMES} times as fast as the teacher, one clip at a time: {fast} of {number} seeds",
        "parts: as fast in features, encoder and decoder; generate: in encoder and decoder of whole transcriptions",
        f"{results.speed.device}, {results.speed.threads} thread" + "s" * (results.speed.threads > 1),
    ]
    header = ["seed", "set", "teacher", "ASKD", "labels only", "ASKD - teacher", "ASKD - labels only"]
    return Table("Seeds", [*header, "parts", "generate"], rows, 2, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="with a directory for each seed")
    args = parser.parse_args()
    runs = sorted(args.directory.glob("*/askd"), key=lambda run: int(run.parent.name))
    if not runs:
        parser.error(f"{args.directory} has no runs: make demo-seeds")
    print(summary([run.parent for run in runs]).text())


if __name__ == "__main__":
    main()
