"""Two nodes, each with a disk of its own: distilling with both caches, killed and resumed; the other commands."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from scripts import ROOT, distill_options

SCRIPTS = ROOT / "examples"
CACHES = "--encoder_cache_dir cache/encoder --teacher_cache_dir cache/labels --teacher_top_k 5 --compare False"
EVERY_STEP = "--save_strategy steps --save_steps 1 --optim sgd --eval_splits validation"


def disks(folder: Path) -> list[Path]:
    """The disks of two nodes. The speech and the teacher are on a third one, which both have."""
    made = [folder / "node0", folder / "node1"]
    for disk in made:
        disk.mkdir(parents=True)
    return made


def assert_equal(one: Path, other: Path) -> None:
    """The students of two runs have the same weights, bit for bit."""
    weights, others = (load_file(disk / "run" / "model.safetensors") for disk in (one, other))
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def cached_keys(disk: Path) -> list[str]:
    return sorted(key for file in disk.glob("cache/encoder/*/*.keys") for key in file.read_text().splitlines())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nodes_without_a_shared_disk_fill_a_cache_each_and_resume(teacher_dir, speech_dir, tmp_path, processes):
    script, whole, nodes = SCRIPTS / "distill.py", disks(tmp_path / "whole"), disks(tmp_path / "killed")
    options = distill_options(teacher_dir, speech_dir, "run", *CACHES.split(), *EVERY_STEP.split())
    options += ["--per_device_train_batch_size", str(8 // processes)]
    ended = launch(processes, script, *options, nodes=whole)
    assert ended.returncode == 0, ended.stderr[-3000:]
    saved = nodes[0] / "run" / "checkpoint-2" / "trainer_state.json"
    killed = launch(processes, script, *options, nodes=nodes, until=saved.exists)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not list(nodes[1].glob("run/checkpoint-*/model.safetensors"))  # the first process saves
    ended = launch(processes, script, *options, "--resume_from_checkpoint", "last", nodes=nodes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    keys = [cached_keys(disk) for disk in (*whole, *nodes)]
    assert len(keys[0]) == 16 + 6 and all(sorted({*of_disk}) == of_disk == keys[0] for of_disk in keys)
    assert list(nodes[1].glob("run/checkpoint-*/model.safetensors"))  # a copy
    assert_equal(whole[0], nodes[0])


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_a_killed_node_again(teacher_dir, speech_dir, tmp_path):
    """Two agents on the loopback. All processes of the second node are killed; the run goes on where it was."""
    whole, nodes = disks(tmp_path / "whole"), disks(tmp_path / "killed")
    options = distill_options(teacher_dir, speech_dir, "run", *CACHES.split(), *EVERY_STEP.split())
    options += ["--per_device_train_batch_size", "1", "--num_train_epochs", "10"]
    ended = launch(4, SCRIPTS / "distill.py", *options, nodes=whole)
    assert ended.returncode == 0, ended.stderr[-3000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run"]
    agents, log = [], tmp_path / "log"
    with log.open("w") as opened:
        for rank, node in enumerate(nodes):
            command = [*TORCHRUN, *rendezvous, "--node-rank", str(rank), "--max-restarts", "3"]
            environment = os.environ | {"HF_HOME": str(node), "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
            command += [str(SCRIPTS / "distill.py"), *map(str, options)]
            agents.append(subprocess.Popen(command, cwd=node, env=environment, stdout=opened, stderr=opened))
    try:
        wait_for((nodes[0] / "run" / "checkpoint-5" / "trainer_state.json").exists, agents)
        children = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True, check=True)
        for child in children.stdout.split():
            os.kill(int(child), signal.SIGKILL)
        assert [agent.wait(timeout=400) for agent in agents] == [0, 0], log.read_text()[-5000:]
    finally:
        for agent in agents:
            agent.kill()
    assert "resumed at step" in log.read_text()
    assert_equal(whole[0], nodes[0])


def wait_for(condition: Callable[[], bool], agents: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents)
        time.sleep(0.05)
