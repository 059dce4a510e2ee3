"""Split an audiofolder by speaker into training, validation and test sets.

    python examples/benchmarks/split_by_speaker.py --source my_speech --target my_speech_split

Every fifth speaker (0, 5, 10, ... in sorted order) goes to `test`, and every twentieth (1, 21, ...) to `validation`,
so no speaker is in two sets. The result is an audiofolder with the directories train, validation and test.
"""

import csv
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from askd_hf.arguments.parser import parse_args
from askd_hf.errors import UserError, exit_on_user_error


@dataclass
class Arguments:
    """Options of the split."""

    source: str = field(metadata={"help": "Audiofolder whose metadata.csv has a column `speaker`."})
    target: str = field(metadata={"help": "Directory to write."})
    test_every: int = field(default=5, metadata={"help": "One of this many speakers is for testing."})
    validation_every: int = field(default=20, metadata={"help": "One of this many speakers is for validation."})
    max_seconds: float = field(
        default=math.inf, metadata={"help": "Leave out clips longer than this, by the column `duration`."}
    )


def split_of(number: int, arguments: Arguments) -> str:
    """Return the split of a speaker by its number in sorted order."""
    if number % arguments.test_every == 0:
        return "test"
    return "validation" if number % arguments.validation_every == 1 else "train"


def main() -> None:
    (arguments,) = parse_args((Arguments,))
    source, target = Path(arguments.source), Path(arguments.target)
    if target.exists():
        raise UserError(f"{target} already exists. Use another directory, or remove it first")
    with (source / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "speaker" not in rows[0]:
        raise UserError(f"{source / 'metadata.csv'} has no column `speaker`")
    rows = [row for row in rows if float(row.get("duration") or 0.0) <= arguments.max_seconds]
    numbers = {speaker: number for number, speaker in enumerate(sorted({row["speaker"] for row in rows}))}
    for name in ("train", "validation", "test"):
        chosen = [row for row in rows if split_of(numbers[row["speaker"]], arguments) == name]
        for row in chosen:
            file = target / name / row["file_name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / row["file_name"], file)
        with (target / name / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(chosen)
        speakers = len({row["speaker"] for row in chosen})
        words = sum(len(row["transcription"].split()) for row in chosen)
        print(f"{name}: {len(chosen)} clips of {speakers} speakers, {words} words")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
