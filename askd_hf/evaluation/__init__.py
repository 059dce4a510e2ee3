"""How good and how fast models are: sets of speech -> manifests -> scores -> results, table and report."""

from .long_form import join_clips, transcribe_long
from .manifest import FOLDER, Manifest
from .options import EvaluationArguments
from .report import write_report
from .results import Results
from .scoring import save_spelling, score_directory
from .speculative import check_can_assist, measure_speculative
from .speed import measure_speed
from .suites import EvalSet, suite_sets
from .table import tables
from .transcribe import Decoding, PreparedSet, complete, plan_manifests, prepare_set, spread_clips

__all__ = [
    "FOLDER",
    "Decoding",
    "EvalSet",
    "EvaluationArguments",
    "Manifest",
    "PreparedSet",
    "Results",
    "check_can_assist",
    "complete",
    "join_clips",
    "measure_speculative",
    "measure_speed",
    "plan_manifests",
    "prepare_set",
    "save_spelling",
    "score_directory",
    "spread_clips",
    "suite_sets",
    "tables",
    "transcribe_long",
    "write_report",
]
