"""Imports all that the scripts of examples/ do, and what transformers imports only when it is asked for."""

import runpy
import sys
from pathlib import Path

from askd_hf.evaluation import comparison  # first: it keeps torchao quiet

EXAMPLES = Path(__file__).parents[2] / "examples"

comparison.SPEED_CLIPS, comparison.REPETITIONS = 2, 1  # as scripts.py has it

paths = list(sys.path)
sys.path.append(str(EXAMPLES))  # they import one another
for script in sorted(EXAMPLES.glob("*.py")):
    runpy.run_path(str(script), run_name="imported")
sys.path[:] = paths
for name in {file.stem for file in EXAMPLES.glob("*.py")} - {"evaluate"}:
    sys.modules.pop(name, None)  # each script imports its neighbors itself

from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline  # noqa: E402, F401
from transformers.models.whisper import modeling_whisper, processing_whisper  # noqa: E402, F401
