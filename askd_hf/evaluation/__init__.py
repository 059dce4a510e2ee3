"""Evaluation of Whisper models: load sets, write transcripts to manifests, score them, and report the results.

Public names are imported on first use: `--help` needs the options alone.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .long_form import concatenate_clips, transcribe_long
    from .manifest import MANIFESTS_DIR, Manifest
    from .options import EvaluationArguments
    from .prepared_sets import PreparedSet, prepare_set, spread_clips
    from .report import write_report
    from .result_tables import format_results, format_speed
    from .results import Results
    from .scoring import check_references, save_spelling_normalizer, score_directory
    from .speculative import check_can_assist, measure_speculative, save_draft_length
    from .speed import measure_speed
    from .suites import DatasetSpec, suite_sets
    from .transcribe import Decoding, DecodingJob, plan_jobs, run_job, run_jobs

# module -> its public names
_PUBLIC = {
    "long_form": ("concatenate_clips", "transcribe_long"),
    "manifest": ("MANIFESTS_DIR", "Manifest"),
    "options": ("EvaluationArguments",),
    "prepared_sets": ("PreparedSet", "prepare_set", "spread_clips"),
    "report": ("write_report",),
    "result_tables": ("format_results", "format_speed"),
    "results": ("Results",),
    "scoring": ("check_references", "save_spelling_normalizer", "score_directory"),
    "speculative": ("check_can_assist", "measure_speculative", "save_draft_length"),
    "speed": ("measure_speed",),
    "suites": ("DatasetSpec", "suite_sets"),
    "transcribe": ("Decoding", "DecodingJob", "plan_jobs", "run_job", "run_jobs"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

# old name -> current name
_RENAMED = {
    "EvalSet": "DatasetSpec",
    "FOLDER": "MANIFESTS_DIR",
    "complete": "run_job",
    "join_clips": "concatenate_clips",
    "plan_manifests": "plan_jobs",
    "save_spelling": "save_spelling_normalizer",
    "tables": "format_results",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"askd_hf.evaluation.{name} is called {_RENAMED[name]} now", FutureWarning, stacklevel=2)
    current = _RENAMED.get(name, name)
    if current not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[current]}", __name__), current)
