"""The processes that tests start are forked from one that has imported everything; that must make no difference."""

import json
import os
import subprocess
import sys

import pytest
from hub_settings import LIBRARIES
from processes import run_there

# All plain values of the modules that know of the Hub
VALUES = f"""
import json, sys
from pathlib import Path
import preloaded, hub_settings
from huggingface_hub import hf_api, hf_file_system

values = {{"api": hf_api.api.endpoint, "files": hf_file_system.hffs.endpoint}}
for module in [name for name in sys.modules if name.partition(".")[0] in {LIBRARIES}]:
    for name, value in vars(sys.modules[module]).items():
        if not name.startswith("__") and isinstance(value, (str, bool, int, float, Path)):
            values[f"{{module}}.{{name}}"] = str(value)
print(json.dumps(values))
"""
# random numbers, and what a loop over a set has left
CHANCE = {"transformers.utils.hub.SESSION_ID", "transformers.models.auto.tokenization_auto.model_type"}


@pytest.mark.slow  # imports everything in a fresh interpreter
def test_a_process_with_another_hub_knows_of_it_what_a_fresh_interpreter_knows(tmp_path):
    (tmp_path / "values.py").write_text(VALUES)
    other = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **other, "HF_HUB_DISABLE_XET": "1"}
    paths = [path for path in sys.path if path.endswith("support")]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    forked = run_there(tmp_path / "values.py", environment=environment)
    command = [sys.executable, str(tmp_path / "values.py")]
    fresh = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert fresh.returncode == forked.returncode == 0, fresh.stderr + forked.stderr
    forked, fresh = json.loads(forked.stdout), json.loads(fresh.stdout)
    assert fresh["api"] == fresh["files"] == other["HF_ENDPOINT"]
    differing = {name: (value, forked[name]) for name, value in fresh.items() if forked.get(name, value) != value}
    assert differing.keys() <= CHANCE
    assert len(set(fresh) & set(forked)) > 1000
