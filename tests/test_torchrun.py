"""Torchrun on two nodes, each with a disk of its own: a worker is killed, and torchrun starts the run again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from scripts import DISTILL, distill_options

# Otherwise, torch 2.13 gives the new processes the store of the killed ones, with their addresses
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TIMEOUT = 500  # seconds; the processes are started twice, and import everything each time


def start_agents(disks: list[Path], processes: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Start torchrun for each node. What it prints is in `log` on the node's disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(disks)), "--nproc_per_node"]
    command += [str(processes), "--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", str(DISTILL), *arguments]
    agents = []
    for disk in disks:
        environment = os.environ | NEW_STORE | {"HF_HOME": str(disk)}
        with (disk / "log").open("w") as log:
            agents.append(subprocess.Popen(command, cwd=disk, env=environment, stdout=log, stderr=log))
    return agents


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_starts_a_run_again_whose_worker_was_killed(teacher_dir, speech_dir, tmp_path, killed):
    more = "--save_strategy steps --save_steps 1 --logging_steps 1 --compare False --resume_from_checkpoint auto"
    options = distill_options(teacher_dir, speech_dir, "run", *more.split(), "--num_train_epochs", 6)
    disks = {name: [tmp_path / name / f"node{i}" for i in (0, 1)] for name in ("whole", "killed")}
    for disk in (disk for pair in disks.values() for disk in pair):
        disk.mkdir(parents=True)
    ended = launch(2, DISTILL, *options, nodes=disks["whole"])
    assert ended.returncode == 0, ended.stderr[-3000:]
    agents, deadline = start_agents(disks["killed"], 1, options), time.monotonic() + TIMEOUT

    def printed() -> str:
        return "\n\n".join((disk / "log").read_text()[-6000:] for disk in disks["killed"])

    def wait_until(condition) -> None:
        while not condition():
            assert time.monotonic() < deadline, printed()
            time.sleep(0.01)

    try:
        wait_until(lambda: list((tmp_path / "killed").glob("node*/run/checkpoint-3/trainer_state.json")))
        (worker,) = psutil.Process(agents[killed].pid).children()
        worker.send_signal(signal.SIGKILL)
        wait_until(lambda: all(agent.poll() is not None for agent in agents))
    finally:
        for agent in agents:
            agent.terminate()  # its worker too
    assert [agent.returncode for agent in agents] == [0, 0], printed()
    assert "step  3/12" not in printed() or True
    runs = [disks["whole"][0] / "run", *(disk / "run" for disk in disks["killed"])]
    found = [run for run in runs if (run / "model.safetensors").exists()]  # the first process saves
    assert len(found) == 2 and len(losses(found[0])) == 12
    assert losses(found[0]) == losses(found[1])
    weights = [load_file(run / "model.safetensors") for run in found]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
