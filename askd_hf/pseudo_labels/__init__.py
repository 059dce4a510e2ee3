"""Pseudo-labels: transcribe speech with a teacher, filter the transcripts, concatenate clips, and save a dataset.

Public names are imported on first use: `--help` needs the options alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .concatenation import check_can_concatenate, concatenate_clips
    from .filters import filter_transcripts, known_references, score_transcripts
    from .options import PseudoLabelArguments
    from .result import DATASET, build_dataset, dataset_card, push_dataset, save_dataset
    from .transcription import plan_transcription, transcribe

# module -> its public names
_PUBLIC = {
    "concatenation": ("check_can_concatenate", "concatenate_clips"),
    "filters": ("filter_transcripts", "known_references", "score_transcripts"),
    "options": ("PseudoLabelArguments",),
    "result": ("DATASET", "build_dataset", "dataset_card", "push_dataset", "save_dataset"),
    "transcription": ("plan_transcription", "transcribe"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
