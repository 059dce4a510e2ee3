r"""What the teacher's schedules make of clean and of wrong labels: the demo's distillation, with words replaced.

    python examples/benchmarks/schedules.py --schedules linear adaptive --noises 0 0.3 --seeds 1 2 3

Of the training transcripts of examples/demo a share of the words (`--noises`) is replaced by other digits, the same in
all runs; evaluation has the right ones. Each run adds a line to FOLDER/results.jsonl; the runs that have one aren't
repeated, so an interrupted benchmark goes on where it was. Then a table: cross-entropy on the labels of `calls` and
`studio`, and WER, each at its best evaluation and at the end, as the mean over seeds (and the lowest and highest).

Other options are those of askd-hf distill: --teacher DIR, --learning_rate 5e-4. A run takes 2 minutes on one core.
"""

import argparse
import csv
import json
import random
import shutil
from pathlib import Path
from statistics import mean

from askd_hf.arguments.parser import parse_args
from askd_hf.commands.distill import OPTIONS, distill
from askd_hf.errors import exit_on_user_error

DEMO = Path(__file__).parents[1] / "demo"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("calls", "studio")
RUN = "--compare False --eval_strategy steps --eval_steps 0.125 --save_strategy no --disable_tqdm True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=["linear", "adaptive"], help="values of --teacher_schedule")
    parser.add_argument("--noises", nargs="+", type=float, default=[0.0, 0.3], help="shares of the words replaced")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs/schedules"))
    args, options = parser.parse_known_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "results.jsonl"
    for seed in args.seeds:
        for noise in args.noises:
            for schedule in args.schedules:
                setting = dict(schedule=schedule, noise=noise, seed=seed, options=options)
                if all(result["setting"] != setting for result in read(results)):
                    run(setting, args.folder, results)
    print(table([result for result in read(results) if result["setting"]["options"] == options]))


def read(results: Path) -> list[dict]:
    lines = results.read_text().splitlines() if results.is_file() else []
    return [json.loads(line.replace('_ce_loss":', '_loss":')) for line in lines]  # its name in earlier versions


def run(setting: dict, folder: Path, results: Path) -> None:
    """Distill once, and add to `results` what evaluation said at each of its steps."""
    output_dir = folder / f"{setting['schedule']}-{setting['noise']:g}-{setting['seed']}"
    shutil.rmtree(output_dir, ignore_errors=True)  # of a run that was interrupted
    arguments = ["--config", str(DEMO / "demo.yaml"), "--dataset", str(demo_with_noise(setting["noise"], folder))]
    arguments += ["--output_dir", str(output_dir), "--encoder_cache_dir", str(folder / "encoder"), *RUN.split()]
    arguments += ["--teacher_schedule", setting["schedule"], "--seed", str(setting["seed"]), *setting["options"]]
    distill(*parse_args(OPTIONS, arguments))
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    names = [f"eval_{split}_{metric}" for split in SPLITS for metric in ("loss", "wer")]
    measured = {name.removeprefix("eval_"): [row[name] for row in log if name in row] for name in names}
    weights = [row["teacher_weight"] for row in log if "teacher_weight" in row]
    with results.open("a") as file:
        file.write(json.dumps(dict(setting=setting, **measured, teacher_weight=weights)) + "\n")


def demo_with_noise(noise: float, folder: Path) -> Path:
    """The demo's speech with so many of the training words replaced by other digits."""
    data = folder / f"data-{noise:g}"
    if data.is_dir():
        return data
    making = data.with_suffix(".unfinished")
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(DEMO / "data", making)
    metadata = making / "train" / "metadata.csv"
    with metadata.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(0)
    for row in rows:
        row["transcription"] = " ".join(
            draw.choice([other for other in WORDS if other != word]) if draw.random() < noise else word
            for word in row["transcription"].split()
        )
    with metadata.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return making.rename(data)


def table(results: list[dict]) -> str:
    """Markdown: a row for each noise and schedule."""
    heads = [f"{name} `{split}`, {when}" for split in SPLITS for name in ("CE", "WER") for when in ("best", "end")]
    lines = ["| words replaced | schedule | seeds | " + " | ".join(heads) + " |", "|---" * (3 + len(heads)) + "|"]
    settings = [(result["setting"]["noise"], result["setting"]["schedule"]) for result in results]
    for noise, schedule in sorted(set(settings)):
        runs = [result for result, setting in zip(results, settings, strict=True) if setting == (noise, schedule)]
        cells = []
        for split in SPLITS:
            for metric, digits in (("loss", 3), ("wer", 1)):
                for at in (min, lambda values: values[-1]):
                    values = [at(one[f"{split}_{metric}"]) for one in runs]
                    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
                    cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append(f"| {noise:.0%} | {schedule} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
