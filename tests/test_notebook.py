"""The notebook of examples/, executed by a Jupyter kernel, with a Hub on the loopback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from fake_hub import serve_hub
from hub import hub_environment
from nbclient import NotebookClient
from scripts import ROOT

NOTEBOOK = ROOT / "examples" / "askd_whisper.ipynb"
TOKEN = "hf_tokenThatMayWrite"
SETTINGS = """TEACHER, SPEECH, REPO = {teacher!r}, {speech!r}, "me/x"
OPTIONS = dict(decoder_layers=1, max_steps=2, teacher_top_k=8, per_device_train_batch_size=2, use_cpu=True)
"""


def stored() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_goes_from_clips_to_a_published_student(tmp_path, monkeypatch, teacher_dir, speech_dir):
    notebook = stored()
    (settings,) = (cell for cell in notebook.cells if cell.cell_type == "code" and "OPTIONS = " in cell.source)
    settings.source = SETTINGS.format(teacher=str(teacher_dir), speech=str(speech_dir))
    with serve_hub(tmp_path / "hub", {TOKEN: "write"}) as hub:
        environment = hub_environment(hub, tmp_path / "home", TOKEN) | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute(env=environment)
        assert "model.safetensors" in hub.commits["models/me/x"][-1].written
    kinds = [kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert kinds.count("image/png") == 1 and kinds.count("text/markdown") == 3
    assert (tmp_path / "runs" / "notebook" / "model.safetensors").is_file()


@pytest.mark.slow
def test_it_installs_itself_where_askd_hf_is_missing(tmp_path, monkeypatch):
    """As in Colab: an environment with Jupyter's kernel, an empty directory, and the address of the repository."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    monkeypatch.setenv("PIP_CONSTRAINT", str(ROOT / "constraints.txt"))
    subprocess.run([python, "-m", "pip", "install", "-q", "ipykernel"], check=True)
    kernel = ["install", "--prefix", python.parents[1], "--name", "bare"]
    subprocess.run([python, "-m", "ipykernel", *kernel], check=True, capture_output=True)
    monkeypatch.setenv("JUPYTER_PATH", str(python.parents[1] / "share" / "jupyter"))
    (tmp_path / "gitconfig").write_text(f'[url "file://{ROOT}"]\n\tinsteadOf = https://github.com/askd-hf/askd-hf\n')
    notebook = stored()
    (settings,) = (cell for cell in notebook.cells if cell.cell_type == "code" and "OPTIONS = " in cell.source)
    settings.source += "\nOPTIONS |= dict(max_steps=2, num_train_epochs=1, teacher_weight=0.5, teacher_top_k=8)\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    path = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": tmp_path / "gitconfig"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | path
    client = NotebookClient(notebook, timeout=900, kernel_name="bare", resources={"metadata": {"path": str(empty)}})
    client.execute(env={name: str(value) for name, value in environment.items()})
    assert (empty / "askd-hf" / "runs" / "notebook" / "model.safetensors").is_file()


def test_it_installs_with_the_line_of_the_readme():
    """Without the constraint: Colab has a torch for its GPU, which the tested versions would replace."""
    (install,) = re.findall(r"%(pip install .+?)  #", "\n".join(cell.source for cell in stored().cells))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert install.replace("--quiet", "-c constraints.txt") in readme
    assert "without -c constraints.txt the newest" in readme


def test_its_stored_outputs_are_those_of_one_run_from_top_to_bottom():
    cells = [cell for cell in stored().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    tables = [out["data"]["text/markdown"] for out in outputs if "text/markdown" in out.get("data", {})]
    assert re.search(r"\| validation \| student \| \d+\.\d\d \[", tables[0])
    assert not re.search(r"/(home|root|tmp|work)/", str(outputs)), "a path of the machine it ran on"


@pytest.mark.parametrize("name", ["README.md", "examples/README.md"])
def test_it_is_listed(name):
    assert NOTEBOOK.name in (ROOT / name).read_text(encoding="utf-8")
    assert Path(NOTEBOOK).stat().st_size < 1e6
