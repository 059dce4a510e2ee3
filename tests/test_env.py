"""`askd-hf env`: what it prints, also where packages are broken or missing."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from scripts import ROOT

import askd_hf

MAIN = ("-m", "askd_hf.commands.main", "env")
SECRET = "hf_aSecretThatMustNotBeThere"
# what it doesn't wait for; torch it does if that is built for GPUs
HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft", "librosa", "matplotlib", "torchao", "pyarrow"}


def run(*options, path: tuple = (), python: tuple = MAIN, **variables) -> str:
    """What a process with `path` before the checkout prints."""
    dropped = ("PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))} | variables
    there = dict(env=environment, cwd=path[0] if path else ROOT)  # -m finds what is there first
    done = subprocess.run([sys.executable, *python, *options], capture_output=True, text=True, timeout=300, **there)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def rows(printed: str) -> dict[str, str]:
    """The values by the name before them, which starts a line. Lines of the same value are joined."""
    lines = printed.splitlines()
    assert lines[0] == "```text" and lines[-1] == "```"
    found: dict[str, str] = {}
    for line in filter(None, lines[1:-1]):
        name, value = line[:25].strip(), line[25:]
        assert len(line) < 25 or line[24] == " ", line  # aligned
        if name or not value:
            found[name or line.strip()] = value
            last = name
        else:
            found[last] += f"\n{value}"
    return found


def package(directory: Path, name: str, number: str, code: str = "", metadata: str = "") -> None:
    """An installed package, as pip leaves it."""
    information = directory / f"{name.replace('-', '_')}-{number}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{metadata}")
    (information / "top_level.txt").write_text(name)
    (directory / f"{name}.py").write_text(code)


def torch_package(directory: Path, version: str, code: str) -> None:
    """A torch in place of the installed one."""
    (directory / "torch").mkdir(parents=True)
    (directory / "torch" / "__init__.py").write_text(code)
    (directory / "torch" / "version.py").write_text(version)


def test_it_has_the_required_packages_and_those_of_the_extras():
    printed = rows(run())
    lines = [line for line in requires("askd-hf") if not line.startswith("askd-hf")]
    assert len(lines) > 20
    for line in lines:
        name, extra = re.match(r"[\w-]+", line)[0], re.search(r'extra == "([\w-]+)"', line)
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        if extra is None:
            assert printed[name] == found
        else:
            assert f"{name} {found}" in printed[extra[1]].partition(":")[0].split(", ")
    assert printed["askd_hf"].startswith(askd_hf.__version__)
    assert printed["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.search(r"\d+ cores", printed["CPU"]) and re.fullmatch(r"\d+\.\d GiB", printed["memory"])
    assert re.match(r"\d+\.\d+\S* in av; ", printed["FFmpeg"]) and re.match(r"\d+\.\d+", printed["libsndfile"])


def test_it_shows_settings_without_secrets_and_the_name_of_the_user(tmp_path):
    config = tmp_path / "huggingface" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: bf16\nprofile: {SECRET}\n")
    tokens = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), SECRET)
    variables = dict(HOME=str(tmp_path), HF_HOME=str(tmp_path / "huggingface"), OMP_NUM_THREADS="3")
    text = run(HF_ENDPOINT=f"https://me:{SECRET}@mirror.example/hub?token={SECRET}", **tokens, **variables)
    printed = rows(text)
    assert SECRET not in text and str(tmp_path) not in text
    assert printed["HF_HOME"] == "~/huggingface" and printed["HF_ENDPOINT"] == "https://mirror.example/hub"
    assert printed["OMP_NUM_THREADS"] == "3" and printed["HF_HUB_OFFLINE"] == "not set"
    assert printed["accelerate config"] == "distributed_type MULTI_GPU, num_processes 2, mixed_precision bf16"


def test_without_a_gpu_build_it_imports_no_large_library(tmp_path):
    torch_package(tmp_path, "__version__ = '9.9+cpu'\ncuda = None\nhip = None\n", "raise AssertionError('imported')")
    code = "import sys; from askd_hf.commands.main import main; main(['env']); print(*sys.modules)"
    *lines, modules = run(python=("-c", code), path=(tmp_path,)).splitlines()
    assert HEAVY.isdisjoint(modules.split()) and "askd_hf.commands.env" in modules
    assert rows("\n".join(lines))["GPU"] == "none: torch 9.9+cpu is built for CPUs"


def test_a_broken_torch_is_a_line(tmp_path):
    code = "raise ImportError('libcudart.so.13: cannot open shared object file')"
    torch_package(tmp_path, "__version__ = '9.9'\ncuda = '13.0'\n", code)
    printed = rows(run(path=(tmp_path,)))
    assert printed["GPU"] == "ImportError: libcudart.so.13: cannot open shared object file"
    assert printed["CUDA"].startswith("CUDA 13.0")


CARDS = """
import contextlib
import warnings
from types import SimpleNamespace as Names

cards = [Names(name="NVIDIA H200", total_memory=150 * 2**30, major=9, minor=0)]
cards += [Names(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5)]
current = 0


@contextlib.contextmanager
def device(index):
    global current
    current = index
    yield


def is_available():
    if not available:
        warnings.warn("The NVIDIA driver on your system is too old\\n(found version 11040).")
    return available


def is_bf16_supported(including_emulation):
    assert not including_emulation
    return cards[current].major >= 8


cuda = Names(device=device, is_available=is_available, device_count=lambda: 2, is_bf16_supported=is_bf16_supported)
cuda.get_device_properties = cards.__getitem__
accelerator = Names(is_available=lambda: available)
"""


def test_each_gpu_is_a_line(tmp_path):
    """As torch describes cards; test_the_card_of_this_machine asks a real one."""
    torch_package(tmp_path, "__version__ = '9.9'\ncuda = '13.0'\n", f"{CARDS}\navailable = True")
    first, second = rows(run(path=(tmp_path,)))["GPU"].splitlines()
    assert first == "NVIDIA H200, 150.0 GiB, compute capability 9.0, bf16"
    assert second == "Tesla T4, 15.0 GiB, compute capability 7.5, bf16 only emulated"


def test_a_driver_that_torch_cannot_use_is_the_reason(tmp_path):
    torch_package(tmp_path, "__version__ = '9.9'\ncuda = '13.0'\n", f"{CARDS}\navailable = False")
    reason = "The NVIDIA driver on your system is too old (found version 11040)."
    assert rows(run(path=(tmp_path,)))["GPU"] == f"none that torch can use: {reason}"


@pytest.mark.gpu
def test_the_card_of_this_machine(card):
    import torch

    printed = rows(run())
    assert printed["GPU"].startswith(torch.cuda.get_device_name(0)) and "GiB" in printed["GPU"]
    assert printed["CUDA"].startswith(f"CUDA {torch.version.cuda}")


@pytest.fixture
def installed(tmp_path) -> Path:
    """Where askd-hf requires other packages: good, old, damaged and broken ones, and one that is missing."""
    needs = ("good>=2", "old>=2,<3", "damaged", 'broken; extra == "int8"', 'good; extra == "export"')
    needs += ('absent>=1; extra == "export"', 'askd-hf[int8]; extra == "dev"', 'never; python_version < "3"')
    lines = [f"Requires-Dist: {need}\n" for need in needs]
    lines += [f"Provides-Extra: {extra}\n" for extra in ("int8", "export", "dev")]
    package(tmp_path, "askd-hf", "0.1.0", metadata="".join(lines))
    package(tmp_path, "good", "2.1.0+cpu")
    package(tmp_path, "old", "1.0")
    package(tmp_path, "broken", "0.5", "raise ImportError('no kernels\\nfor this machine')")
    (tmp_path / "damaged-1.0.dist-info").mkdir()
    return tmp_path


def test_a_package_is_missing_too_old_or_damaged(installed):
    printed = rows(run(path=(installed,)))
    assert printed["good"] == "2.1.0+cpu"
    assert printed["old"] == "1.0 (required: <3,>=2)"
    assert not re.match(r"\d", printed["damaged"])  # Python 3.12 raises for it
    assert printed["export"] == "good 2.1.0+cpu, absent missing: pip install 'askd-hf[export]'"
    assert printed["int8"] == "broken 0.5"  # it isn't imported
    assert printed["dev"] == "" and "never" not in printed


def test_a_package_that_cannot_be_imported_is_a_line(installed):
    printed = rows(run("--imports", path=(installed,)))
    assert printed["int8"] == "broken 0.5 (import broken: ImportError: no kernels for this machine)"
    assert printed["good"] == "2.1.0+cpu"


def test_it_needs_no_package():
    """Without site-packages even what reads the requirements is missing."""
    printed = rows(run(python=("-S", *MAIN)))
    assert printed["GPU"] == printed["CUDA"] == "ModuleNotFoundError: torch is missing"
    assert printed["FFmpeg"].startswith("ModuleNotFoundError: No module named 'av' in av; ")
    assert printed["packages"] == "ModuleNotFoundError: No module named 'packaging'"
    assert "OMP_NUM_THREADS" in printed


def test_a_clone_has_its_commit(tmp_path):
    def git(*words) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-C", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    sources = [ROOT / "askd_hf" / name for name in ("__init__.py", "errors.py")]
    sources += [ROOT / "askd_hf" / "models" / name for name in ("__init__.py", "torchao_warnings.py")]
    sources += [ROOT / "askd_hf" / "evaluation" / name for name in ("__init__.py", "cpu.py")]
    sources += (ROOT / "askd_hf" / "commands").glob("*.py")
    for source in sources:
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    assert rows(run(path=(tmp_path,)))["askd_hf"] == askd_hf.__version__
    git("init", "--quiet")
    git("add", "askd_hf")
    git("commit", "--quiet", "--message", "first")
    commit = f"{askd_hf.__version__}, commit {git('rev-parse', '--short', 'HEAD')}"
    assert rows(run(path=(tmp_path,)))["askd_hf"] == commit
    (tmp_path / "askd_hf" / "errors.py").open("a").write("\n")
    assert rows(run(path=(tmp_path,)))["askd_hf"] == f"{commit} with uncommitted changes"
    assert rows(run(path=(tmp_path,), PATH="/nowhere"))["askd_hf"] == askd_hf.__version__


def test_an_unknown_option_is_one_line():
    command = [sys.executable, *MAIN, "--import"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "\nerror: unrecognized arguments: --import\n")
