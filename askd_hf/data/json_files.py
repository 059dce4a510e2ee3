"""Dataclasses in JSON files, which are written atomically. Files of earlier versions can be read."""

import dataclasses
import json
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

# dataclass -> old name of a field -> current name
OLD_FIELDS = {
    "EvaluatedModel": {"megabytes": "size_mb"},
    "ManifestMetadata": {"facts": "model", "dropped": "excluded", "run": "runtime"},
    "ModelSpeed": {"times_faster": "speedup"},
    "PairedComparison": {
        "difference": "wer_difference",
        "first": "system",
        "interval": "confidence_interval",
        "second": "baseline",
    },
    "Scores": {
        "cer_interval": "cer_confidence_interval",
        "silent_with_text": "no_speech_hallucinations",
        "wer_interval": "wer_confidence_interval",
    },
    "SetResult": {
        "blocks": "bootstrap_unit",
        "broken_words": "has_combining_marks",
        "dropped": "excluded",
        "paired": "comparison",
        "silent_clips": "no_speech_clips",
        "speech": "has_speech",
        "spelling": "spelling_normalizer",
    },
    "Speculative": {"times_faster": "speedup"},
    "TrainingData": {"labelled_by": "transcribed_by"},
    "TrainingSummary": {"negatives": "no_speech_clips", "origin": "provenance"},
}
# old key of a dictionary (a role, an evaluation setting) -> current key
OLD_KEYS = {"student before": "initial student", "resamples": "n_resamples"}


def write_json(path: Path, data: Any) -> None:
    """Write JSON values, or a dataclass of them, atomically: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = dataclasses.asdict(data)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def update_json(path: Path, values: dict[str, Any]) -> None:
    """Set keys of the JSON object in a file. The other keys don't change."""
    write_json(path, read_json(path) | values)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def from_json(kind: Any, data: Any) -> Any:
    """Return JSON values as `kind`: a dataclass, or a list, dictionary or optional of one. Other values are unchanged.

    Raises TypeError or AttributeError for other contents.
    """
    items = [argument for argument in get_args(kind) if argument is not NoneType]
    if data is None:
        return None
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        types, old = get_type_hints(kind), OLD_FIELDS.get(kind.__name__, {})
        named = {old.get(name, name): value for name, value in data.items()}
        return kind(**{name: from_json(types.get(name), value) for name, value in named.items()})
    if get_origin(kind) in (UnionType, Union):
        return from_json(items[0], data)
    if get_origin(kind) is list:
        return [from_json(items[0], item) for item in data]
    if get_origin(kind) is dict:
        return {OLD_KEYS.get(key, key): from_json(items[1], item) for key, item in data.items()}
    return tuple(data) if get_origin(kind) is tuple else data
