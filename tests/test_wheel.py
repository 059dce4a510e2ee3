"""What a user installs: the wheel has everything that it needs, the source distribution can run its own tests."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from scripts import ROOT

import askd_hf

CHILD = """
import sys
from importlib.metadata import version
from pathlib import Path

import askd_hf

installed = Path(sys.argv[1])
assert Path(askd_hf.__file__).parent == installed / "askd_hf", askd_hf.__file__
assert version("askd-hf") == askd_hf.__version__

import make_cards
from askd_hf.evaluation import write_report

for card, inputs in make_cards.CARDS.items():
    assert str(make_cards.render(*inputs)).encode() == card.read_bytes(), card
page = write_report(make_cards.read_results("demo-results"), Path.cwd())
assert "</html>" in page.read_text(encoding="utf-8")
"""


def run(*command, cwd, **environment) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    ended = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with the source distribution and the wheel that was built from it.

    From a copy, as setuptools builds in place and takes along what an earlier build has left there.
    """
    directory = tmp_path_factory.mktemp("distribution")
    source = directory / "source"
    for name in (".github", "askd_hf", "examples", "model_cards", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    run("-m", "build", "--no-isolation", "--outdir", directory / "dist", source, cwd=directory)
    return directory / "dist"


def test_the_source_distribution_has_its_tests_and_the_demo_with_its_license(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names >= {
        ".github/ISSUE_TEMPLATE/bug_report.yml",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "examples/demo/LICENSE",
        "examples/demo/data/studio/metadata.csv",
        "examples/distill.py",
        "model_cards/demo-student.md",
        "tests/conftest.py",
        "tests/cards/demo-summary.json",
        "tests/test_wheel.py",
    }
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_works_alone(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.split("-")[:2] == ["askd_hf", askd_hf.__version__]
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.partition("/")[0] for name in names} == {"askd_hf", f"askd_hf-{askd_hf.__version__}.dist-info"}
    assert "askd_hf/py.typed" in names

    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", installed]
    run(*pip, wheel, cwd=empty, PIP_DISABLE_PIP_VERSION_CHECK="1")
    paths = os.pathsep.join(map(str, (installed, ROOT / "tests" / "support")))
    run("-c", CHILD, installed, cwd=empty, PYTHONPATH=paths)


@pytest.mark.slow
def test_the_readmes_installation_has_all_that_a_run_needs(tmp_path):
    """The command of the README, in a clone and a new environment, without the packages of development."""
    command = "pip install -c constraints.txt ."
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    clone, environment = tmp_path / "askd-hf", tmp_path / "venv"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    paths = dict(PATH=f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", PYTHONPATH="")

    def there(command: str) -> str:
        done = subprocess.run(shlex.split(command), cwd=clone, env=os.environ | paths, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    there(command)
    assert "askd_hf" in there("askd-hf env")
    assert "steps" in there("python examples/distill.py --config examples/demo/demo.yaml --dry_run True")
    assert "pytest" not in there("pip list")  # for development only
