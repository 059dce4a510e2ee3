"""What a model made of a set of clips, on disk while it is being made: one JSON object a clip and line.

    DIR/manifests/ROLE/SET.jsonl  a line a clip, appended batch by batch
    DIR/manifests/ROLE/SET.json   what the lines depend on: the model's weights, the clips, how it was decoded

Scores are made from these files alone. A run that was killed goes on where it stopped; lines that other weights, other
clips or other options have made are never mixed with new ones.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, disk_errors
from .results import ModelFacts

FOLDER = "manifests"
# what must agree for lines to stand in one file, and how the message calls it
MUST_AGREE = {
    "set": "the set",
    "weights": "the model's weights",
    "data": "the clips or their transcripts",
    "method": "the method",
    "decoding": "how it is decoded",
}
# of a set: where a dataset lies may change, and `data` has its clips; what is known about them changes no text
MAY_DIFFER = {"dataset", "on_hub", "no_speech"}
ELSEWHERE = "Take another --output_dir, or start this one anew with --overwrite True"


@dataclass
class Settings:
    """The sidecar of a manifest.

    Attributes:
        role: student, teacher...
        facts: of the model, with the name it was loaded by.
        set: its name, dataset, config, split, language, task and `no_speech`, and whether the dataset is on the Hub.
        method: short, sequential or chunked.
        decoding: what the texts depend on besides weights and clips: beams, token limit, dtype, timestamps.
        run: what they don't depend on, up to rounding: batch size, device, versions, date; of an interrupted run that
            went on with others, all of them. And `token_limit`, of a clip, where it is known.
        weights: digest of the weights as they were loaded.
        data: digest of the clips' audio and transcripts, in the order of the manifest.
        rows: how many lines a complete manifest has.
        dropped: clips that were never decoded, by reason.
        complete: whether all lines are there.
    """

    role: str
    facts: ModelFacts
    set: dict[str, Any]
    method: str
    decoding: dict[str, Any]
    run: dict[str, Any]
    weights: str
    data: str
    rows: int
    dropped: dict[str, int]
    complete: bool = False


class Manifest:
    """The lines of one model on one set, and their settings.

    Args:
        folder: `DIR/manifests`.
        role, name: of the model, of the set: they name the files.
    """

    def __init__(self, folder: Path, role: str, name: str):
        self.lines_file = folder / role / f"{name}.jsonl"
        self.settings_file = folder / role / f"{name}.json"

    def begin(self, settings: Settings, batch_size: int, overwrite: bool = False) -> int:
        """Make the files ready to be appended to.

        Half a line at the end is cut off, and what a batch of `batch_size` has begun: so the batches that follow are
        those of a run that was never interrupted, and give the same texts to the last bit, unless the batch size is
        another one now; then the sidecar has both.

        Args:
            settings: of this run.
            overwrite: throw away lines that other settings have made; without it they are refused.

        Returns:
            How many lines are there already.

        Raises:
            UserError: the lines there were made with other settings, or the disk can't be written.
        """
        with disk_errors(f"manifest {self.lines_file}"):
            self.lines_file.parent.mkdir(parents=True, exist_ok=True)
            if not overwrite:
                self.refuse_others(settings)
            then = self.settings() if self.settings_file.exists() else None
            if then is None or _differences(then, settings):  # without a sidecar nobody knows what lines belong to
                self.lines_file.unlink(missing_ok=True)
            complete = self._complete_lines()
            count = min(len(complete), settings.rows)
            if count == settings.rows:
                settings = dataclasses.replace(settings, complete=True, run=settings.run if then is None else then.run)
            else:
                count -= count % batch_size
                if then is not None and count:
                    run = {
                        name: all_values([then.run.get(name, value), value]) for name, value in settings.run.items()
                    }
                    settings = dataclasses.replace(settings, run=run)
            self._write_settings(settings)
            with self.lines_file.open("ab") as file:
                file.truncate(sum(len(line) for line, _ in complete[:count]))
        return count

    def refuse_others(self, settings: Settings) -> None:
        """Raise `UserError` if the lines that are there were made with other settings than these."""
        differences = _differences(self.settings(), settings) if self.settings_file.exists() else []
        if differences:
            what = "; ".join(differences)
            raise UserError(f"{self.lines_file} was made otherwise. What differs: {what}. {ELSEWHERE}")

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add lines; on the disk when this returns."""
        content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with disk_errors(f"manifest {self.lines_file}"), self.lines_file.open("ab") as file:
            file.write(content.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Note that all lines are there."""
        self._write_settings(dataclasses.replace(self.settings(), complete=True))

    def settings(self) -> Settings:
        data = json.loads(self.settings_file.read_text(encoding="utf-8"))
        return Settings(**{**data, "facts": ModelFacts(**data["facts"])})

    def rows(self) -> list[dict[str, Any]]:
        """The complete lines."""
        return [row for _, row in self._complete_lines()]

    def _complete_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """The lines up to the first that isn't whole, as they are in the file and what they say."""
        if not self.lines_file.exists():
            return []
        found = []
        for line in self.lines_file.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # zeros after a power cut
                row = None
            if row is None:
                break
            found.append((line, row))
        return found

    def _write_settings(self, settings: Settings) -> None:
        unfinished = self.settings_file.with_name(f"{self.settings_file.name}.tmp")
        text = json.dumps(dataclasses.asdict(settings), indent=2, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.settings_file)


def _differences(then: Settings, now: Settings) -> list[str]:
    """What of `MUST_AGREE` doesn't, for a message."""
    found = []
    for name, meaning in MUST_AGREE.items():
        old, new = getattr(then, name), getattr(now, name)
        if name == "set":
            old, new = ({key: value for key, value in of.items() if key not in MAY_DIFFER} for of in (old, new))
        if old == new:
            continue
        if isinstance(old, dict):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            meaning += " (" + ", ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in keys) + ")"
        elif name == "method":
            meaning += f" ({old}, now {new})"
        elif name == "weights":
            meaning += f" (of {then.facts.name}, now {now.facts.name})"
        elif then.rows != now.rows:
            meaning += f" ({then.rows} clips, now {now.rows})"
        found.append(meaning)
    return found


def read_manifests(folder: Path) -> dict[str, dict[str, Manifest]]:
    """The manifests in `DIR/manifests`, by the name of their files and by role, both in a fixed order.

    Roles are in that of a comparison: the student first, the teacher last.
    """
    found: dict[str, dict[str, Manifest]] = {}
    for file in sorted(folder.glob("*/*.json"), key=lambda file: (file.stem, role_order(file.parent.name))):
        role, name = file.parent.name, file.name.removesuffix(".json")
        found.setdefault(name, {})[role] = Manifest(folder, role, name)
    return found


def check_comparable(folder: Path, sidecars: dict[str, dict[str, Settings]]) -> None:
    """Raise `UserError` unless all manifests are complete, of one model a role, and of the same clips a set.

    Args:
        folder: of the manifests, for the messages.
        sidecars: by set and role.
    """
    weights: dict[str, Settings] = {}
    decoding = next(iter(next(iter(sidecars.values())).values())).decoding
    for name, roles in sidecars.items():
        first = next(iter(roles.values()))
        for role, settings in roles.items():
            file = folder / role / f"{name}.jsonl"
            if not settings.complete:
                raise UserError(
                    f"{file} is incomplete: run that evaluation again, it goes on where it stopped; or remove the "
                    "file and the .json beside it, or take another --output_dir"
                )
            if weights.setdefault(role, settings).weights != settings.weights:
                raise UserError(
                    f"{file} is of another model ({settings.facts.name}) than the manifests of the other sets "
                    f"({weights[role].facts.name}). Evaluate that set again with --overwrite True, remove the file "
                    "and the .json beside it, or take another --output_dir"
                )
            if settings.decoding != decoding:
                raise UserError(
                    f"{file} was decoded with {settings.decoding}, others in {folder} with {decoding}: they can't be "
                    "compared. Take another --output_dir, or evaluate all again with --overwrite True"
                )
            if settings.data != first.data:
                raise UserError(
                    f"{file} is of other clips or transcripts than that of the {first.role}: they can't be compared. "
                    "Take another --output_dir, or evaluate both again with --overwrite True"
                )


def all_values(values: Iterable[Any]) -> Any:
    """The value if it is one; else all of them as text, each once."""
    found: dict[str, Any] = {}
    for value in values:
        found |= {part: part for part in value.split(", ")} if isinstance(value, str) else {str(value): value}
    return next(iter(found.values())) if len(found) == 1 else ", ".join(found)


def role_order(role: str) -> tuple[int, str]:
    return {"student": 0, "teacher": 2}.get(role, 1), role
