"""Imports all that the scripts of examples/ do."""

import runpy
import sys
from pathlib import Path

import quick_report

import askd_hf.evaluation  # noqa: F401  first: it keeps torchao quiet

EXAMPLES = Path(__file__).parents[2] / "examples"

quick_report.install()  # as in conftest.py

paths = list(sys.path)
sys.path.append(str(EXAMPLES))  # they import one another
for script in sorted(EXAMPLES.glob("*.py")):
    runpy.run_path(str(script), run_name="imported")
sys.path[:] = paths
for name in {file.stem for file in EXAMPLES.glob("*.py")} - {"evaluate"}:
    sys.modules.pop(name, None)  # each script imports its neighbors itself
