"""Draw the weights of the blend and the WER over a run, from the `trainer_state.json` that it leaves.

    python examples/plot_run.py runs/demo picture.png

The WER needs evaluations in the run: --eval_strategy steps --eval_steps 50 --eval_on_start.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(run: Path, picture: Path) -> None:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    training = [row for row in history if "teacher_weight" in row]
    figure, (weights, rates) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")

    steps = [row["step"] for row in training]
    teacher, student = ([row[name] for row in training] for name in ("teacher_weight", "self_weight"))
    labels = [1 - a - b for a, b in zip(teacher, student, strict=True)]
    weights.stackplot(steps, labels, teacher, student, labels=["labels", "teacher", "self"], alpha=0.8)
    weights.set(ylabel="weight", ylim=(0, 1))
    weights.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    for name in sorted({key for row in history for key in row if key.endswith("wer")}):
        points = [(row["step"], row[name]) for row in history if name in row]
        label = name.removeprefix("eval_").removesuffix("wer").strip("_") or "evaluation"
        rates.plot(*zip(*points, strict=True), marker="o", label=label)
    rates.set(xlabel="step", ylabel="WER, %", yscale="log")
    rates.yaxis.set_major_formatter("{x:g}")
    rates.legend()
    rates.grid(alpha=0.3, which="both")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
