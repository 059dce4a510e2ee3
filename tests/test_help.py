"""`--help` of every script. A bare % in the help of an option ends argparse with a traceback."""

import sys

import pytest
from scripts import ROOT, load_script

SCRIPTS = [
    file for file in sorted((ROOT / "examples").rglob("*.py")) if "def main(" in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_help_lists_the_options(file, monkeypatch, capsys):
    script = load_script(file)
    monkeypatch.setattr(sys, "argv", [file.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert out.startswith("usage: ") and "--help" in out
