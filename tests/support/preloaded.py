"""Imports all that the commands and the scripts of examples/ do."""

import importlib
import runpy
import sys
from pathlib import Path

import quick_report

from askd_hf.commands.main import COMMANDS

EXAMPLES = Path(__file__).parents[2] / "examples"

quick_report.install()  # as in conftest.py

for command in COMMANDS:
    importlib.import_module(f"askd_hf.commands.{command.replace('-', '_')}")  # their scripts do it later
paths = list(sys.path)
sys.path.append(str(EXAMPLES))  # they import one another
for script in sorted(EXAMPLES.glob("*.py")):
    runpy.run_path(str(script), run_name="imported")
sys.path[:] = paths
for name in {file.stem for file in EXAMPLES.glob("*.py")} - {"evaluate"}:
    sys.modules.pop(name, None)  # each script imports its neighbors itself
