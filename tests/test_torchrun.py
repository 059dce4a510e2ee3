"""Torchrun on two nodes, each with a disk of its own: a worker or a node is killed, and the run starts again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from scripts import DISTILL, distill_options, steps_printed

# without it the new processes of torch 2.13 often find the addresses of the killed ones, and don't connect
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TIMEOUT = 900  # seconds; the processes import everything twice


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_agent(disk: Path, is_host: bool, port: int, processes: int, arguments: list[str]) -> subprocess.Popen:
    """Start torchrun on one of two nodes, with some processes. What it prints is in `log` on the node's disk."""
    agent = f"torch.distributed.run --nnodes 2 --nproc_per_node {processes} --max-restarts 1 --rdzv-id run"
    agent += f" --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --rdzv-conf is_host={int(is_host)}"
    command = [sys.executable, "-m", *agent.split(), "--local-addr", "127.0.0.1", str(DISTILL), *arguments]
    environment = os.environ | NEW_STORE | {"HF_HOME": str(disk)}
    with (disk / "log").open("a") as log:
        return subprocess.Popen(command, cwd=disk, env=environment, stdout=log, stderr=log)


def kill_node(agent: subprocess.Popen) -> None:
    """Kill an agent with its workers."""
    for process in (psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)):
        process.kill()
    agent.wait()


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "killed"), [(1, "worker"), (2, "worker"), (1, "node")])  # processes of a node
def test_torchrun_starts_a_run_again(teacher_dir, speech_dir, tmp_path, processes, killed):
    """Of which a worker was killed, or a node, on which torchrun is then started again."""
    more = "--save_strategy steps --save_steps 1 --logging_steps 1 --compare False --resume_from_checkpoint auto"
    options = distill_options(teacher_dir, speech_dir, "run", *more.split(), "--num_train_epochs", 6)
    options += ["--per_device_train_batch_size", str(4 // processes)]
    whole, disks = ([tmp_path / name / f"node{i}" for i in (0, 1)] for name in ("whole", "killed"))
    for disk in (*whole, *disks):
        disk.mkdir(parents=True)
    ended = launch(2 * processes, DISTILL, *options, nodes=whole)
    assert ended.returncode == 0, ended.stderr[-3000:]
    port, deadline = free_port(), time.monotonic() + TIMEOUT
    agents = [start_agent(disk, disk == disks[0], port, processes, options) for disk in disks]

    def wait_until(condition: Callable[[], object]) -> None:
        while not condition():
            ended = any(agent.poll() for agent in agents)
            assert not ended and time.monotonic() < deadline, [(disk / "log").read_text()[-6000:] for disk in disks]
            time.sleep(0.01)

    try:
        wait_until(lambda: any((disk / "run" / "checkpoint-3" / "trainer_state.json").exists() for disk in disks))
        if killed == "node":
            kill_node(agents[1])
            agents[1] = start_agent(disks[1], False, port, processes, options)
        else:
            worker = psutil.Process(agents[0].pid).children()[-1]
            worker.send_signal(signal.SIGKILL)
        wait_until(lambda: [agent.poll() for agent in agents] == [0, 0])
    finally:
        for agent in agents:
            agent.terminate()  # its workers too
    printed = [step for disk in disks for step in steps_printed((disk / "log").read_text())]  # by the first process
    assert printed.count(1) == printed.count(12) == 1  # the second start went on from a checkpoint
    (run,) = (disk / "run" for disk in disks if (disk / "run" / "model.safetensors").exists())  # one process saves
    assert len(losses(run)) == 12 and losses(run) == losses(whole[0] / "run")
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, whole[0] / "run"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
