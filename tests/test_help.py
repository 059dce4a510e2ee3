"""`--help` of every command and script: it lists the options, at once.

A bare % in the help of an option ends argparse with a traceback.
"""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from documents import GUIDES
from scripts import ROOT, load_script
from transformers import Seq2SeqTrainingArguments

from askd_hf.commands.main import COMMANDS, main
from askd_hf.commands.options import options_of
from askd_hf.config import ASKDConfig
from askd_hf.objective import DIVERGENCES

SCRIPTS = [
    file for file in sorted((ROOT / "examples").rglob("*.py")) if "def main(" in file.read_text(encoding="utf-8")
]
# benchmarks and the demo's scripts aren't for users
QUICK = sorted((ROOT / "examples").glob("*.py"))
# each takes a second or more, or imports what does
HEAVY = {"torch", "accelerate", "datasets", "peft", "pyarrow", "pandas", "scipy", "librosa", "jiwer", "matplotlib"}
# run what follows as `python` does, and print what it has imported
CODE = """
import atexit, runpy, sys

atexit.register(lambda: print("imported:", *[name for name, module in sys.modules.items() if module], file=sys.stderr))
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_help_lists_the_options(file, monkeypatch, capsys):
    script = load_script(file)
    monkeypatch.setattr(sys, "argv", [file.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert out.startswith("usage: ") and "--help" in out


def quick_help(*arguments) -> str:
    """The help that a process of its own prints. Fails if that has imported a heavy library, or prints anything else.

    The time depends on the machine. On two cores in use by others, a process takes 1.0 to 1.6 s of CPU time; one that
    imports torch 2 s more, and one that imports the models of transformers 5 s more than that.
    """
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    other, _, imported = done.stderr.rpartition("imported: ")
    assert (done.returncode, other) == (0, "")
    assert HEAVY & set(imported.split()) == set() and "askd_hf" in imported
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_the_same_without_the_libraries(command, monkeypatch, capsys):
    """Here transformers has torch, so that all defaults are those of a run."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert quick_help("-m", "askd_hf.commands.main", command, "--help") == printed
    assert printed.startswith(f"usage: askd-hf {command} [OPTIONS]\n") and f"\n    askd-hf {command}" in printed


@pytest.mark.parametrize("file", QUICK, ids=lambda file: file.stem)
def test_help_of_a_script_imports_no_heavy_library(file):
    printed = quick_help(file, "--help")
    assert printed.startswith("usage: ") and "--help" in printed


def test_the_help_names_every_divergence():
    """It can't be made of `DIVERGENCES`, whose module imports torch."""
    (field,) = (field for field in dataclasses.fields(ASKDConfig) if field.name == "divergence")
    expected = f"Divergence from the soft targets: {', '.join(DIVERGENCES)}."
    assert field.metadata["help"] == expected, "name it in the help of `divergence` in askd_hf/config.py"


def test_the_guide_names_every_divergence():
    (row,) = re.findall(r"^\| `--divergence` .*", (GUIDES / "method.md").read_text(), re.MULTILINE)
    assert set(DIVERGENCES) <= set(re.findall(r"`(\w+)`", row)), "name it in the table of options in method.md"


def test_help_describes_our_options_and_help_all_also_those_of_the_trainer():
    short, long = (quick_help("-m", "askd_hf.commands.main", "distill", option) for option in ("--help", "--help_all"))
    options = {
        option: set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) for option, text in (("h", short), ("a", long))
    }
    training = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    assert options["a"] == {
        field.name for one in options_of("distill") for field in dataclasses.fields(one) if field.init
    } | {"config", "help_all"}
    left_out = options["a"] - options["h"]
    assert left_out < training and {"adam_beta1", "fsdp"} < left_out
    assert not left_out & set(ASKDConfig.__annotations__)
    names = short[short.index("other options of Seq2SeqTrainingArguments") :].partition(":")[2]
    assert set(re.findall(r"\w+", names)) == left_out
    assert len(short.splitlines()) < 450


@pytest.mark.parametrize("command", ["evaluate", "prepare"])
def test_help_all_is_help_without_options_of_the_trainer(command):
    asked = [quick_help("-m", "askd_hf.commands.main", command, option) for option in ("--help", "--help_all")]
    assert asked[0] == asked[1] and "--help_all" not in asked[0]


def test_h_is_help():
    assert quick_help("-m", "askd_hf.commands.main", "plan", "-h").startswith("usage: askd-hf plan")


def test_the_list_of_commands_imports_nothing():
    assert "  distill " in quick_help("-m", "askd_hf.commands.main", "--help")


@pytest.mark.slow
def test_help_in_a_process_that_goes_on_leaves_torch_as_it_is():
    code = "import transformers\nfrom askd_hf.commands.main import main\n"
    code += "try: main(['distill', '--help'])\nexcept SystemExit: pass\nimport torch; print(torch.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1][0].isdigit()
