"""Manifests: the transcripts of one model on one set, appended to disk batch by batch.

    DIR/manifests/ROLE/SET.jsonl  one JSON object per clip: its reference, prediction and duration
    DIR/manifests/ROLE/SET.json   what the lines depend on: the model's weights, the clips, the decoding settings

Scores are computed from these files alone. An interrupted run resumes where it stopped. Lines made with other weights,
clips or settings are never mixed with new ones.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.json_files import from_json, read_json, write_json
from ..errors import UserError, disk_errors
from .results import EvaluatedModel, LongClips

MANIFESTS_DIR = "manifests"
# fields that must be equal for lines to belong to one file, with their names in messages
MUST_MATCH = {
    "set": "the set",
    "weights": "the model's weights",
    "data": "the clips or their transcripts",
    "method": "the method",
    "decoding": "the decoding settings",
    "generation_config": "the model's generation config",
}
# keys of `set` that may differ: a dataset may be moved, and `data` identifies its clips
MAY_DIFFER = {"dataset", "on_hub", "no_speech"}
OVERWRITE_ADVICE = "Use another --output_dir, or decode again with --overwrite True"


@dataclass
class ManifestMetadata:
    """What the lines of a manifest depend on, and how many there are."""

    role: str  # such as `student`
    model: EvaluatedModel
    # name, dataset, config, split, language, task and `no_speech` of the set, and whether its dataset is on the Hub
    set: dict[str, Any]
    method: str
    decoding: dict[str, Any]  # settings that change the texts: beams, token limit, dtype, timestamps
    # settings that change the texts by rounding only: batch size, device, versions, date; if a run was resumed with
    # other values, all of them. Also the command, and `token_limit` per clip, if known.
    runtime: dict[str, Any]
    weights: str  # digest of the weights as they were loaded
    data: str  # digest of audio and transcripts of the clips, in the order of the manifest
    rows: int  # number of lines of a complete manifest
    excluded: dict[str, int]  # number of clips that were never decoded, by reason
    generation_config: str = ""  # digest of the settings that change the texts; "" in manifests of earlier versions
    complete: bool = False
    long_clips: LongClips | None = None  # see `SetResult`

    def __post_init__(self):
        if self.method == "short":  # in manifests of earlier versions
            self.method = "short_form"


class Manifest:
    """The lines and the metadata of one model on one set.

    Args:
        folder: `DIR/manifests`.
        role, name: role of the model and name of the set; they name the files.
        overwrite_advice: what to do about lines made with other settings, the end of the error message.
    """

    def __init__(self, folder: Path, role: str, name: str, overwrite_advice: str = OVERWRITE_ADVICE):
        self.overwrite_advice = overwrite_advice
        self.lines_file = folder / role / f"{name}.jsonl"
        self.metadata_file = folder / role / f"{name}.json"
        self.parts = folder / role / f"{name}.parts"  # of several processes, see `shared_decoding`

    def prepare(self, metadata: ManifestMetadata, batch_size: int, overwrite: bool = False) -> int:
        """Write the metadata and make the file of lines ready for `append`.

        Truncates a partial last line and the last partial batch, so a resumed run decodes the same batches as an
        uninterrupted one and gives the same texts bit by bit. If the batch size has changed, the metadata lists both.

        Args:
            overwrite: delete lines made with other settings instead of raising.

        Returns:
            The number of lines that are kept.

        Raises `UserError` if the existing lines were made with other settings, or the disk can't be written.
        """
        with disk_errors(f"manifest {self.lines_file}"):
            self.lines_file.parent.mkdir(parents=True, exist_ok=True)
            if not overwrite:
                self.check_metadata(metadata)
            then = self.metadata() if self.metadata_file.exists() else None
            if then is None or _differences(then, metadata):  # lines without metadata are of unknown settings
                self.lines_file.unlink(missing_ok=True)
                shutil.rmtree(self.parts, ignore_errors=True)
            lines = self._valid_lines()
            count = min(len(lines), metadata.rows)
            if count == metadata.rows:
                runtime = metadata.runtime if then is None else then.runtime
                metadata = dataclasses.replace(metadata, complete=True, runtime=runtime)
            else:
                count -= count % batch_size
                if then is not None and count:
                    runtime = {
                        name: all_values([then.runtime.get(name, value), value])
                        for name, value in metadata.runtime.items()
                    }
                    metadata = dataclasses.replace(metadata, runtime=runtime)
            self._write_metadata(metadata)
            with self.lines_file.open("ab") as file:
                file.truncate(sum(len(line) for line, _ in lines[:count]))
        return count

    def check_metadata(self, metadata: ManifestMetadata) -> None:
        """Raise `UserError` if the existing lines were made with other settings."""
        differences = _differences(self.metadata(), metadata) if self.metadata_file.exists() else []
        if differences:
            what = "; ".join(differences)
            raise UserError(f"{self.lines_file} was created with different settings: {what}. {self.overwrite_advice}")

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append lines and flush them to disk."""
        append_lines(self.lines_file, rows)

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """Write all lines, and mark the manifest as complete."""
        unfinished = self.lines_file.with_name(f"{self.lines_file.name}.unfinished")
        unfinished.unlink(missing_ok=True)
        append_lines(unfinished, rows)
        os.replace(unfinished, self.lines_file)
        self.finish()

    def finish(self) -> None:
        """Mark the manifest as complete."""
        self._write_metadata(dataclasses.replace(self.metadata(), complete=True))

    def metadata(self) -> ManifestMetadata:
        return from_json(ManifestMetadata, read_json(self.metadata_file))

    def rows(self) -> list[dict[str, Any]]:
        """Return the complete lines. In manifests of earlier versions `transcription_time` is called `seconds`."""
        return [row for _, row in self._valid_lines()]

    def _valid_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the lines before the first invalid one, as bytes and parsed."""
        if not self.lines_file.exists():
            return []
        found = []
        for line in self.lines_file.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # zeros after a power failure
                row = None
            if row is None:
                break
            found.append((line, row))
        return found

    def _write_metadata(self, metadata: ManifestMetadata) -> None:
        write_json(self.metadata_file, metadata)


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append one JSON object per line to a file, and flush it to disk. Raises `UserError` if it can't be written."""
    content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with disk_errors(f"manifest {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())


def _differences(then: ManifestMetadata, now: ManifestMetadata) -> list[str]:
    """Return the fields of `MUST_MATCH` that differ, worded for a message."""
    found = []
    for name, meaning in MUST_MATCH.items():
        old, new = getattr(then, name), getattr(now, name)
        if name == "set":
            old, new = ({key: value for key, value in of.items() if key not in MAY_DIFFER} for of in (old, new))
        if old == new or (name == "generation_config" and "" in (old, new)):
            continue
        if isinstance(old, dict):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            meaning += " (" + ", ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in keys) + ")"
        elif name == "method":
            meaning += f" ({old}, now {new})"
        elif name == "weights":
            meaning += f" (of {then.model.name}, now {now.model.name})"
        elif then.rows != now.rows:
            meaning += f" ({then.rows} clips, now {now.rows})"
        found.append(meaning)
    return found


def read_manifests(folder: Path) -> dict[str, dict[str, Manifest]]:
    """Return the manifests in `DIR/manifests` by set and role: sets sorted by name, student first, teacher last."""
    found: dict[str, dict[str, Manifest]] = {}
    for file in sorted(folder.glob("*/*.json"), key=lambda file: (file.stem, role_order(file.parent.name))):
        role, name = file.parent.name, file.name.removesuffix(".json")
        found.setdefault(name, {})[role] = Manifest(folder, role, name)
    return found


def check_comparable(folder: Path, metadata: dict[str, dict[str, ManifestMetadata]]) -> None:
    """Raise `UserError` unless all manifests are complete, with one model per role and the same clips per set.

    Args:
        metadata: by set and role.
    """
    first_of_role: dict[str, ManifestMetadata] = {}
    decoding = next(iter(next(iter(metadata.values())).values())).decoding
    for name, roles in metadata.items():
        first = next(iter(roles.values()))
        for role, one in roles.items():
            file = folder / role / f"{name}.jsonl"
            if not one.complete:
                raise UserError(
                    f"{file} is incomplete. Run that evaluation again to resume it, remove the file and the .json "
                    "beside it, or use another --output_dir"
                )
            same_role = first_of_role.setdefault(role, one)
            if same_role.weights != one.weights:
                raise UserError(
                    f"{file} is of another model ({one.model.name}) than the manifests of the other sets "
                    f"({same_role.model.name}). Evaluate that set again with --overwrite True, remove the file and "
                    "the .json beside it, or use another --output_dir"
                )
            if one.decoding != decoding:
                raise UserError(
                    f"{file} was decoded with {one.decoding}, other manifests in {folder} with {decoding}: they are "
                    "not comparable. Use another --output_dir, or evaluate all sets again with --overwrite True"
                )
            if one.data != first.data:
                raise UserError(
                    f"{file} has other clips or transcripts than the manifest of the {first.role}: they are not "
                    "comparable. Use another --output_dir, or evaluate both again with --overwrite True"
                )


def all_values(values: Iterable[Any]) -> Any:
    """Return the value if all are equal; else the distinct values as one string, separated by commas."""
    found: dict[str, Any] = {}
    for value in values:
        found |= {part: part for part in value.split(", ")} if isinstance(value, str) else {str(value): value}
    return next(iter(found.values())) if len(found) == 1 else ", ".join(found)


def role_order(role: str) -> tuple[int, str]:
    """Return a sort key: student first, teacher last, other roles by name between them."""
    return {"student": 0, "teacher": 2}.get(role, 1), role
