"""examples/slurm: files that start a run on several nodes, and requeue it at the time limit."""

import os
import re
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from scripts import ROOT

from askd_hf.arguments.parser import parse_args
from askd_hf.commands.options import options_of

SLURM = ROOT / "examples" / "slurm"
JOB = SLURM / "distill.sbatch"

# As Slurm's: srun gives the task its own environment, and kills it when it gets SIGTERM itself; scancel with --signal
# signals the task that srun started, and neither srun nor the script; scontrol also lists the nodes
PROGRAMS = {
    "scontrol": 'echo "$@" >> scontrol; if [[ $1 = show ]]; then echo node7; echo node8; fi',
    "srun": """
        shift
        SLURM_NODEID=1 "$@" & task=$!
        echo $task > task.new; mv task.new task
        trap 'kill -KILL $task' TERM
        wait $task""",
    "scancel": 'echo "$@" >> scancel; kill -s "${1#--signal=}" "$(cat task)"',
}
# a launcher: it ends with status 1 after SIGTERM, as soon as its processes have saved a checkpoint
STOPS = "trap 'sleep 0.2; touch checkpoint; exit 1' TERM; touch started; for _ in {1..1000}; do sleep 0.02; done"
FINISHES = "trap 'touch signaled' TERM; touch started; until [[ -e signaled ]]; do sleep 0.02; done"


def started(directory: Path, accelerate: str) -> subprocess.Popen:
    """Start the job with programs that stand in for Slurm's and for accelerate."""
    for name, text in (PROGRAMS | {"accelerate": accelerate}).items():
        file = directory / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "42"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(["bash", str(JOB)], cwd=directory, env=environment, **pipes)


def requeues(directory: Path) -> list[str]:
    return [line for line in (directory / "scontrol").read_text().splitlines() if line.startswith("requeue")]


def signal_before_the_limit() -> tuple[signal.Signals, int]:
    """What Slurm sends to the script alone (B:), and how many seconds before the time limit."""
    name, seconds = re.search(r"^#SBATCH --signal=B:(\w+)@(\d+)", JOB.read_text(), re.MULTILINE).groups()
    return signal.Signals[f"SIG{name}"], int(seconds)


def test_accelerate_reads_the_configuration():
    config = load_config_from_file(str(SLURM / "accelerate.yaml"))
    assert (config.num_machines, config.num_processes, config.distributed_type.value) == (2, 16, "MULTI_GPU")


def test_the_job_starts_a_launcher_per_node_and_resumes(tmp_path):
    output, _ = (process := started(tmp_path, 'echo "$@"')).communicate(timeout=30)
    assert process.returncode == 0 and not requeues(tmp_path)
    words = shlex.split(output)
    assert words[:3] == ["launch", "--config_file", "examples/slurm/accelerate.yaml"]
    assert words[3:9] == ["--machine_rank", "1", "--main_process_ip", "node7", "--main_process_port", "29500"]
    assert words[9:12] == ["-m", "askd_hf.commands.main", "distill"]
    *_, config = parse_args(options_of("distill"), words[12:])
    assert config.resume_from_checkpoint == "auto"
    assert config.output_dir == "runs/large-v3"


@pytest.mark.parametrize(
    ("accelerate", "requeued"), [(STOPS, ["requeue 42"]), (FINISHES, [])], ids=["stops", "finishes"]
)
def test_before_the_time_limit_the_run_saves_a_checkpoint_and_the_job_is_requeued(tmp_path, accelerate, requeued):
    """Unless the run finishes after all, with status 0."""
    process = started(tmp_path, accelerate)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() or not (tmp_path / "task").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal_before_the_limit()[0])
    _, errors = process.communicate(timeout=30)
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 42\n", errors
    assert (tmp_path / "checkpoint").exists() == bool(requeued)
    assert (process.returncode, requeues(tmp_path)) == (len(requeued), requeued)


def test_a_run_that_fails_is_not_requeued(tmp_path):
    process = started(tmp_path, "exit 2")
    process.communicate(timeout=30)
    assert process.returncode == 2 and not requeues(tmp_path)


def test_the_launcher_has_the_time_that_the_job_has():
    """30 s is torchrun's default. Slurm's signal is exact to a minute, and early."""
    seconds = int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", JOB.read_text(), re.MULTILINE)[1])
    assert 30 < seconds < signal_before_the_limit()[1]
