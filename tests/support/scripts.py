"""Scripts of examples/ in this process; `processes.py` runs them in processes of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import transformers  # noqa: F401  with it in this process, --help doesn't hide torch from the tests that follow
from processes import Ended

ROOT = Path(__file__).parents[2]
DISTILL = ROOT / "examples" / "distill.py"


def load_script(file: Path) -> ModuleType:
    if str(file.parent) not in sys.path:  # scripts import one another; last, as evaluate.py isn't the library
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    script = importlib.util.module_from_spec(spec)
    if file.stem != "evaluate":  # what is pickled must be found again; but the library of that name as well
        sys.modules[file.stem] = script
    spec.loader.exec_module(script)
    return script


def run_here(monkeypatch, capture, *arguments, file: Path | None = None, script: ModuleType | None = None) -> Ended:
    """A script's `main()` in this process, where starting another one takes longer than all that it does.

    Args:
        capture: capsys or capfd.
        file: that it is loaded from, unless `script` is given; examples/distill.py by default.
    """
    from askd_hf.commands.terminal import readable_terminal

    script = script or load_script(file or ROOT / "examples" / "distill.py")
    monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
    status = 0
    try:
        with script.exit_on_user_error(), readable_terminal():
            script.main()
    except SystemExit as stop:
        status = stop.code
    return Ended(status, *capture.readouterr())


def steps_printed(output: str) -> list[int]:
    """The steps whose metrics a run printed."""
    return [int(step) for step in re.findall(r"^step +(\d+)/\d+  loss ", output, re.MULTILINE)]


def accelerate_launch(script: Path, *arguments) -> subprocess.CompletedProcess:
    """`script` under `accelerate launch` with two processes on the CPU; `launch_two` is 30 seconds faster."""
    # accelerate's own --cpu would start a single process, or ask for MPI; the script chooses the CPU by `use_cpu`
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += f" --dynamo_backend no --main_process_port {29500 + os.getpid() % 2000}"
    command = [sys.executable, "-m", *launch.split(), str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def distill_options(teacher, dataset, output_dir, *more):
    command = f"--teacher {teacher} --dataset {dataset} --output_dir {output_dir} --use_cpu --num_train_epochs 3"
    return [*command.split(), "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", *map(str, more)]
