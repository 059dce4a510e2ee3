"""Log of the skipped rows of a stream. Its count is saved in checkpoints."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import ASKDConfig
from ..data import SpeechStream
from ..errors import UserError

SKIPPED_FILE = "skipped_rows.json"
MOST_EMPTY_UPDATES = 5  # without a label token, one after the other


class SkippedRows:
    """Append the rows that training skips to a CSV file with the columns clip and reason.

    Args:
        file: the CSV file of this process.
        on_bad_audio: "error" to raise an error for an invalid row, "skip" to skip it. Rows that the filters exclude
            are always skipped.
    """

    def __init__(self, file: Path, on_bad_audio: str):
        self.file, self.on_bad_audio = file, on_bad_audio
        self.count = 0

    @classmethod
    def of_run(cls, args: ASKDConfig, train_dataset: Any) -> "SkippedRows":
        """Return the log of this process, in the run's directory."""
        rank = f"-{args.process_index}" if args.process_index else ""
        on_bad_audio = train_dataset.on_bad_audio if isinstance(train_dataset, SpeechStream) else "error"
        return cls(Path(args.output_dir) / f"skipped-stream{rank}.csv", on_bad_audio)

    def counts(self, accelerator: Accelerator) -> list[int]:
        """Return the number of rows that each process has skipped so far."""
        return accelerator.gather(torch.tensor([self.count], device=accelerator.device)).tolist()

    def check_empty(self, state: TrainerState, first_step: int) -> None:
        """Raise `UserError` if many updates had no label token, or all updates of the run.

        Args:
            state: its log has rows for updates with label tokens only.
            first_step: the step at which training began or was resumed.
        """
        logged = [row["step"] for row in state.log_history if "loss" in row and row["step"] > first_step]
        empty = state.global_step - max(logged, default=first_step)
        ended_without = first_step == 0 and not logged and state.global_step >= state.max_steps
        if empty >= MOST_EMPTY_UPDATES or ended_without:
            raise UserError(
                f"step {state.global_step}: every clip of the last {empty} updates was invalid or filtered out; see "
                f"{self.file}"
            )

    def add(self, rows: list[tuple[str, str, bool]], step: int) -> None:
        """Log skipped rows. Raises `UserError` for an invalid row with `on_bad_audio="error"`.

        Args:
            rows: clip, reason, and True if the row is invalid, False if a filter excludes it.
        """
        for clip, reason, invalid in rows:
            if invalid and self.on_bad_audio == "error":
                saved = any(self.file.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
                raise UserError(
                    f"step {step}, {clip}: {reason}. Fix the file, or skip invalid clips with --on_bad_audio skip"
                    + (" and --resume_from_checkpoint last" if saved else "")
                )
        if not rows:
            return
        if self.count == 0 or not self.file.is_file():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("clip,reason\n", encoding="utf-8")
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(row[:2] for row in rows)
        self.count += len(rows)

    @staticmethod
    def save(directory: Path, counts: list[int]) -> None:
        """Write the counts of all processes into a checkpoint."""
        (directory / SKIPPED_FILE).write_text(json.dumps(counts))

    def load(self, directory: Path, process: int) -> None:
        """Restore the count of a checkpoint, and drop the later rows, which training will skip again."""
        file = directory / SKIPPED_FILE
        counts = json.loads(file.read_text()) if file.is_file() else []
        self.count = counts[process] if process < len(counts) else 0
        if self.count and self.file.is_file():
            with self.file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))[: self.count + 1]
            with self.file.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(rows)
