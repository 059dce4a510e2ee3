"""Print versions, devices and settings, to paste into a bug report.

    askd-hf env

prints a block of text for GitHub: askd_hf and its commit in a clone, Python, the machine and its GPUs, the versions of
the required packages, the installed and missing packages of each extra, FFmpeg and libsndfile, the default config of
accelerate, and environment variables. It needs no network and shows no token.

The versions are those of the packages' metadata. A package that is installed but broken is only found by --imports.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..errors import UserError
from ..evaluation.cpu import cpu_model

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "askd-hf"
WIDTH = 25  # of the first column
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# of the config of accelerate; others may hold names of accounts
CONFIG_KEYS = ("distributed_type", "num_machines", "num_processes", "gpu_ids", "use_cpu", "mixed_precision")
NVIDIA_DRIVER = Path("/sys/module/nvidia/version")


class _Parser(argparse.ArgumentParser):
    """argparse alone: the parser of the other commands is in transformers, which may be what is broken."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser("askd-hf env", "askd-hf env [OPTIONS]", __doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        "--imports",
        action="store_true",
        help="Also import every package, which takes some 10 s, and show the error of each that is broken.",
    )
    env(parser.parse_args(argv).imports)


def env(imports: bool = False) -> None:
    """Print the block. Whatever fails is a line with its error.

    Each line is printed as soon as it is known: if a library crashes the process, the earlier ones are there.

    Args:
        imports: whether to import every package.
    """
    print("```text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, find in FACTS.items():
            print_row(name, find)
        print_packages(imports)
        print("\nenvironment variables")
        for name in VARIABLES:
            print_row(f"  {name}", variable, name)
    print("```")


def print_row(name: str, find: Callable[..., str], *arguments: Any) -> None:
    """Print a name and what `find` returns for the arguments. Further lines are indented."""
    value = or_error(find, *arguments).replace("\n", "\n" + " " * WIDTH)
    print(f"{name:{WIDTH}}{value}", flush=True)


def or_error(find: Callable[..., str], *arguments: Any) -> str:
    """Return what `find` returns for the arguments, or its error in one line: a broken package may raise any."""
    try:
        return find(*arguments)
    except Exception as error:
        return in_one_line(error)


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ---- the machine ----


def own_version() -> str:
    """Return the version, and for a clone of the repository its commit."""
    root = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return __version__
    commit = output_of(git, "-C", root, "rev-parse", "--short", "HEAD")
    changed = output_of(git, "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{__version__}, commit {commit}{' with uncommitted changes' if changed else ''}"


def output_of(*command: str | Path) -> str:
    """Return what a program prints. Raises if it fails."""
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=10, check=True)
    return run.stdout.strip()


def cpu() -> str:
    """Return the model of the CPU and its logical cores."""
    cores = f"{os.cpu_count()} cores"
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) != os.cpu_count():
        cores += f", {len(os.sched_getaffinity(0))} of them for this process"
    return f"{cpu_model()}, {cores}"


def memory() -> str:
    if not hasattr(os, "sysconf"):  # Windows
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def gpus() -> str:
    """Return a line for each GPU that torch can use, or why there is none.

    A torch that is built for CPUs isn't imported: the import takes seconds.
    """
    build = torch_build()
    if not any(build.get(kind) for kind in ("cuda", "hip", "xpu")) and sys.platform != "darwin":
        return f"none: torch {build['__version__']} is built for CPUs"
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return "\n".join(map(gpu, range(torch.cuda.device_count())))
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    reason = "; ".join(" ".join(str(warning.message).split()) for warning in caught)
    return f"none that torch can use{': ' if reason else ''}{reason}"[:500]


def torch_build() -> dict[str, Any]:
    """Return what torch/version.py says of the version, CUDA, ROCm and XPU, without the import of torch."""
    installed = importlib.util.find_spec("torch")
    if installed is None or installed.origin is None:
        raise ModuleNotFoundError("torch is missing")
    return runpy.run_path(str(Path(installed.origin).with_name("version.py")))


def gpu(index: int) -> str:
    import torch

    card = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "bf16 only emulated"
    return f"{card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}, {bf16}"


def cuda() -> str:
    """Return the CUDA or ROCm that torch is built for, and the version of the NVIDIA driver."""
    build = torch_build()
    known = [f"CUDA {build['cuda']}"] if build.get("cuda") else []
    known += [f"ROCm {build['hip']}"] if build.get("hip") else []
    known += [f"NVIDIA driver {NVIDIA_DRIVER.read_text().strip()}"] if NVIDIA_DRIVER.exists() else []
    return ", ".join(known) or "none"


# ---- decoders and accelerate ----


def ffmpeg() -> str:
    """Return the FFmpeg that decodes MP3 and m4a, which is part of av, and the program that `pipeline` starts."""
    return f"{or_error(av_ffmpeg)} in av; {or_error(ffmpeg_program)}"


def av_ffmpeg() -> str:
    import av

    return av.ffmpeg_version_info


def ffmpeg_program() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        return "no program ffmpeg, which pipeline needs to read files"
    return f"program {' '.join(output_of(program, '-version').split()[:3])}"


def libsndfile() -> str:
    import soundfile

    return soundfile.__libsndfile_version__


def accelerate_config() -> str:
    """Return the main values of the file that `accelerate config` writes and `accelerate launch` reads."""
    import yaml

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    file = Path(os.environ.get("HF_HOME", cache)).expanduser() / "accelerate" / "default_config.yaml"
    if not file.is_file():
        return "none"
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return ", ".join(f"{key} {config[key]}" for key in CONFIG_KEYS if config.get(key) not in (None, {}))


FACTS: dict[str, Callable[[], str]] = {
    "askd_hf": own_version,
    "Python": platform.python_version,
    "platform": platform.platform,
    "CPU": cpu,
    "memory": memory,
    "GPU": gpus,
    "CUDA": cuda,
    "FFmpeg": ffmpeg,
    "libsndfile": libsndfile,
    "accelerate config": accelerate_config,
}


# ---- packages ----


def print_packages(imports: bool) -> None:
    """Print the versions of the required packages, and a line for each extra."""
    try:
        needed = requirements()
        modules = modules_by_package() if imports else {}
    except Exception as error:  # not installed, but run from a clone; or packaging is broken
        print(f"\n{'packages':{WIDTH}}{in_one_line(error)}")
        return
    print("\nrequired packages")
    for requirement in needed.pop(""):
        print_row(f"  {requirement.name}", state, requirement, modules)
    print("\nextras")
    for extra, packages in needed.items():
        print_row(f"  {extra}", extra_state, extra, packages, modules)


def requirements() -> dict[str, list["Requirement"]]:
    """Return the packages that askd_hf requires by extra, from its metadata; "" has those that are always required."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    always = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {"": always}
    for extra in importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []:
        more = [one for one in parsed if one not in always and one.marker.evaluate({"extra": extra})]
        found[extra] = [one for one in more if one.name != PACKAGE]  # an extra may take in others
    return found


def state(requirement: "Requirement", modules: dict[str, list[str]]) -> str:
    """Return the installed version of a package, or that it is missing, and what is wrong with it.

    Args:
        modules: its modules are imported; {} for none.
    """
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
    if version is None:  # up to Python 3.11, of a directory without METADATA
        return "broken: its metadata has no version"
    problems = []
    if not requirement.specifier.contains(version, prereleases=True):
        problems.append(f"required: {requirement.specifier}")
    for module in modules.get(requirement.name.lower().replace("_", "-"), []):
        try:
            importlib.import_module(module)
        except Exception as error:
            problems.append(f"import {module}: {in_one_line(error)}")
    return f"{version} ({'; '.join(problems)})" if problems else version


def extra_state(extra: str, packages: list["Requirement"], modules: dict[str, list[str]]) -> str:
    """Return the states of the packages of an extra, and if one is missing the command that installs it."""
    states = [(package.name, or_error(state, package, modules)) for package in packages]
    line = ", ".join(" ".join(one) for one in states)
    return f"{line}: pip install '{PACKAGE}[{extra}]'" if "missing" in dict(states).values() else line


def modules_by_package() -> dict[str, list[str]]:
    """Return the modules of the installed packages, by the package's name in lower case and with hyphens.

    A package has the module of its own name, or all that aren't private.
    """
    found: dict[str, list[str]] = {}
    for module, packages in importlib.metadata.packages_distributions().items():
        for package in set(packages) if module.isidentifier() and not module.startswith("_") else ():
            found.setdefault(package.lower().replace("_", "-"), []).append(module)
    named = {package: [m for m in modules if m.replace("_", "-") == package] for package, modules in found.items()}
    return {package: named[package] or modules for package, modules in found.items()}


def variable(name: str) -> str:
    """Return an environment variable without passwords and the name of the user."""
    value = os.environ.get(name)
    if value is None:
        return "not set"
    if "://" in value:
        value = re.sub(r"://[^/]*@", "://", value).partition("?")[0]
    home = str(Path.home())
    return f"~{value.removeprefix(home)}" if value == home or value.startswith(home + os.sep) else value
