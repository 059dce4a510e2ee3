"""examples/slurm: files that start a run on several nodes, and requeue it at the time limit."""

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from processes import launch
from safetensors.torch import load_file
from scripts import DISTILL, ROOT, distill_options, steps_printed
from speech import write_speech

from askd_hf.arguments.parser import parse_args
from askd_hf.commands.options import options_of

SLURM = ROOT / "examples" / "slurm"
JOB = SLURM / "distill.sbatch"
TIMEOUT = 300  # seconds; the processes import everything

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
    "scancel": 'echo "$@" >> scancel; kill -s "${1#--signal=}" $(cat task)',
}
# of two nodes; as soon as the launcher of one fails, all that is left on the other is killed
SRUN_OF_TWO = """
    shift
    for node in 0 1; do SLURM_NODEID=$node "$@" & tasks[node]=$!; done
    echo "${tasks[@]}" > task
    for node in 0 1; do
        wait -n || { status=$?; for task in "${tasks[@]}"; do pkill -KILL -P "$task"; kill -KILL "$task"; done; }
    done 2> /dev/null
    exit "${status:-0}"
"""
# a launcher: it ends with status 1 after SIGTERM, as soon as its processes have saved a checkpoint
STOPS = "trap 'sleep 0.2; touch checkpoint; exit 1' TERM; touch started; for _ in {1..1000}; do sleep 0.02; done"
FINISHES = "trap 'touch signaled' TERM; touch started; until [[ -e signaled ]]; do sleep 0.02; done"


def started(directory: Path, accelerate: str, **programs: str) -> subprocess.Popen:
    """Start the job with programs that stand in for Slurm's and for accelerate."""
    for name, text in (PROGRAMS | programs | {"accelerate": accelerate}).items():
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


def real_launcher(*options) -> str:
    """Accelerate's, with the job's configuration: of two nodes here, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = f"--main_process_ip 127.0.0.1 --main_process_port {port} --num_processes 2"
    command = shlex.join([str(DISTILL), *map(str, options)])
    return f'exec {sys.executable} -m accelerate.commands.launch "${{@:2:4}}" {here} {command} >> log 2>&1'


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.slow
def test_the_launchers_stop_their_processes_with_a_checkpoint_and_the_requeued_job_resumes(teacher_dir, tmp_path):
    """The processes have workers, which get the launcher's signal too, in an epoch of 18 updates."""
    write_speech(tmp_path / "speech" / "train", clips=144, seed=0)
    more = "--save_strategy steps --save_steps 1000 --logging_steps 1 --compare False --resume_from_checkpoint auto"
    options = distill_options(teacher_dir, tmp_path / "speech", "run", *more.split(), "--num_train_epochs", 2)
    whole, job = tmp_path / "whole", tmp_path / "job"
    for folder in (whole, job):
        folder.mkdir()
    ended = launch(2, DISTILL, *options, nodes=[whole])
    assert ended.returncode == 0, ended.stderr[-3000:]
    (job / "examples").symlink_to(ROOT / "examples")
    deadline = time.monotonic() + TIMEOUT

    def start() -> subprocess.Popen:
        launcher = real_launcher(*options, "--dataloader_num_workers", 1)
        return started(job, launcher, srun=SRUN_OF_TWO)

    def printed() -> str:
        return (job / "log").read_text() if (job / "log").exists() else ""

    process = start()
    while 3 not in steps_printed(printed()):
        assert process.poll() is None and time.monotonic() < deadline, printed()[-6000:]
        time.sleep(0.01)
    process.send_signal(signal_before_the_limit()[0])
    process.communicate(timeout=TIMEOUT)
    assert process.returncode and requeues(job) == ["requeue 42"], printed()[-6000:]
    saved = [json.loads(file.read_text()) for file in (job / "run").glob("checkpoint-*/trainer_state.json")]
    assert len(saved) == 1 and 3 <= saved[0]["global_step"] < 18, printed()[-6000:]
    process = start()
    process.communicate(timeout=TIMEOUT)
    assert (process.returncode, requeues(job)) == (0, ["requeue 42"]), printed()[-6000:]
    assert steps_printed(printed()) == [*range(1, 37)]
    assert losses(job / "run") == losses(whole / "run")
    weights, expected = (load_file(folder / "run" / "model.safetensors") for folder in (job, whole))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
