"""Evaluation of Whisper models: load sets, write transcripts to manifests, score them, and report the results."""

import warnings
from typing import Any

from .long_form import concatenate_clips, transcribe_long
from .manifest import MANIFESTS_DIR, Manifest
from .options import EvaluationArguments
from .prepared_sets import PreparedSet, prepare_set, spread_clips
from .report import write_report
from .result_tables import format_results
from .results import Results
from .scoring import save_spelling_normalizer, score_directory
from .speculative import check_can_assist, measure_speculative
from .speed import measure_speed
from .suites import DatasetSpec, suite_sets
from .transcribe import Decoding, DecodingJob, plan_jobs, run_job, run_jobs

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
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"askd_hf.evaluation.{name} is called {_RENAMED[name]} now", FutureWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
