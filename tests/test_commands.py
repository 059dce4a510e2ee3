"""`askd-hf`: its commands, their options, and what it says to a command that doesn't exist."""

import importlib
import re
import subprocess
import sys
import tomllib

import pytest
from scripts import ROOT, load_script

from askd_hf.commands import main as askd_hf_command
from askd_hf.commands.main import ALIASES, COMMANDS, main


def options_of(run, capsys) -> set[str]:
    """The options that `--help` lists."""
    with pytest.raises(SystemExit) as stop:
        run()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert out.startswith("usage: ")
    return set(re.findall(r"^  (?:-h, )?(--\w+)", out, re.MULTILINE))


def test_help_lists_the_commands():
    command = [sys.executable, "-m", "askd_hf.commands.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  ([\w-]+)  +\S", done.stdout, re.MULTILINE)
    assert listed == list(COMMANDS) and len(listed) == 11


def test_the_package_has_the_entry_point():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"askd-hf": "askd_hf.commands.main:main"}


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"env"}))  # env has no steps to read and to change
def test_a_command_has_the_options_of_its_script(name, monkeypatch, capsys):
    module = name.replace("-", "_")
    script = load_script(ROOT / "examples" / f"{module}.py")
    monkeypatch.setattr(sys, "argv", [f"{module}.py", "--help"])
    expected = options_of(script.main, capsys)
    assert options_of(lambda: main([name, "--help"]), capsys) == expected and len(expected) > 6
    assert callable(getattr(importlib.import_module(f"askd_hf.commands.{module}"), module))


def test_help_of_a_command_shows_how_to_use_it(capsys):
    for name in ("distill", *ALIASES):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        out = capsys.readouterr().out
        assert out.startswith("usage: askd-hf distill [OPTIONS]\n")
        assert "\n    askd-hf distill --teacher openai/whisper-large-v3\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"), [(["distl"], "unknown command 'distl'"), ([], "a command is missing")]
)
def test_an_unknown_command_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: {message}; choose from {', '.join(COMMANDS)}\n"


def test_a_users_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distill"])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: --teacher is required") and "\n" not in line


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"askd-hf {askd_hf_command.__version__}\n"
