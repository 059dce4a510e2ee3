"""Runs that are killed anywhere, again and again, and runs that share their caches: nothing is lost or changed."""

import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from processes import Ended, Process, launch, start
from safetensors.torch import load_file
from scripts import ROOT, distill_options
from speech import write_speech

from askd_hf.data.encoder_store import EncoderCache
from askd_hf.data.json_files import read_json

pytestmark = pytest.mark.slow

RUN = ROOT / "tests" / "support" / "killed_run.py"
KILLS, KILLS_OF_TWO = 20, 8
OPTIONS = """--encoder_cache_dir cache/encoder --teacher_cache_dir cache/labels --teacher_top_k 5
--eval_splits validation --eval_strategy steps --eval_steps 12 --save_strategy steps --save_steps 4
--save_total_limit 2 --logging_steps 1 --per_device_eval_batch_size 4 --resume_from_checkpoint auto"""


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder / "train", clips=48, seed=0)
    write_speech(folder / "validation", clips=6, seed=1)
    return folder


def options(teacher: Path, speech: Path, run: str = "run") -> list[str]:
    """The command, which is always the same."""
    return distill_options(teacher, speech, run, *OPTIONS.split())


def started(disk: Path, *arguments, last_change: int = 0) -> Process:
    """Start a run that has all its files on a disk."""
    disk.mkdir(exist_ok=True)
    environment = os.environ | {"HF_HOME": str(disk / "home"), "OMP_NUM_THREADS": "1"}
    return start(RUN, last_change, *arguments, directory=disk, environment=environment)


def finished(disk: Path, *arguments) -> Ended:
    ended = started(disk, *arguments).ended()
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


@pytest.fixture(scope="module")
def whole(teacher_dir, speech, tmp_path_factory) -> tuple[Path, int, float]:
    """The disk of a run that nobody kills, the number of changes of files, and the seconds it took."""
    disk = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    finished(disk, *options(teacher_dir, speech))
    return disk, int((disk / "changes").read_text()), time.monotonic() - began


def encoder_rows(disk: Path) -> dict[str, bytes]:
    """Return the cached outputs by key."""
    (folder,) = (disk / "cache" / "encoder").iterdir()
    keys = [key for file in sorted(folder.glob("*.keys")) for key in file.read_text().split()]
    return {key: EncoderCache(folder, 50, 16).read([key]).numpy().tobytes() for key in keys}


def label_rows(disk: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the teacher cache by key, each of which is there once."""
    rows = load_from_disk(disk / "cache" / "labels").to_list()
    found = {row["teacher_key"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def losses(disk: Path, run: str = "run") -> list[tuple[int, float]]:
    history = read_json(disk / run / "trainer_state.json")["log_history"]
    return [(row["step"], row["loss"]) for row in history if "loss" in row]


def assert_equal(disk: Path, whole: Path, run: str = "run") -> None:
    """A run has the weights, the losses and the caches of the whole one, bit for bit."""
    weights, expected = (load_file(place / "model.safetensors") for place in (disk / run, whole / "run"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert losses(disk, run) == losses(whole) and len(losses(whole)) == 36
    assert encoder_rows(disk) == encoder_rows(whole) and len(encoder_rows(whole)) == 54
    assert label_rows(disk) == label_rows(whole) and len(label_rows(whole)) == 48


def test_a_run_killed_anywhere_ends_as_one_that_nobody_killed(teacher_dir, speech, whole, tmp_path):
    """By itself when it is about to change a file, or from outside at any time. It may end in between."""
    whole, changes, seconds = whole
    command, chance, kills, disks = options(teacher_dir, speech), random.Random(0), 0, 0
    while kills < KILLS:
        disk = tmp_path / str(disks)
        disks += 1
        while kills < KILLS:
            by_itself = chance.random() < 0.5
            process = started(disk, *command, last_change=chance.randint(1, changes) if by_itself else 0)
            deadline = time.monotonic() + chance.uniform(0, seconds)
            while process.poll() is None and (by_itself or time.monotonic() < deadline):
                time.sleep(0.002)
            process.kill()
            ended = process.ended()
            if ended.returncode == 0:
                break
            assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
            kills += 1
        finished(disk, *command)
        assert_equal(disk, whole)


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_killed_at_any_time_end_as_two_that_nobody_killed(teacher_dir, speech, tmp_path, nodes):
    """On one disk, or on a disk each."""
    command = [0, *options(teacher_dir, speech), "--per_device_train_batch_size", "2"]

    def disks(name: str) -> list[Path]:
        made = [tmp_path / name / str(node) for node in range(nodes)]
        for disk in made:
            disk.mkdir(parents=True)
        return made

    def launched(disks: list[Path], seconds: float = math.inf) -> bool:
        """Return whether the run has ended before it is killed after some seconds."""
        deadline = time.monotonic() + seconds
        ended = launch(2, RUN, *command, nodes=disks, until=lambda: time.monotonic() > deadline)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr[-3000:]
        return ended.returncode == 0

    whole, began = disks("whole"), time.monotonic()
    assert launched(whole)
    seconds, chance, kills, runs = time.monotonic() - began, random.Random(nodes), 0, 0
    while kills < KILLS_OF_TWO:
        killed = disks(f"killed {runs}")
        runs += 1
        while kills < KILLS_OF_TWO and not launched(killed, chance.uniform(0, seconds)):
            kills += 1
        assert launched(killed)
        assert_equal(killed[0], whole[0])
        for disk in killed:
            assert encoder_rows(disk) == encoder_rows(whole[0]) and label_rows(disk) == label_rows(whole[0])


def test_a_second_run_on_the_same_caches_does_not_disturb_the_first(teacher_dir, speech, whole, tmp_path):
    """It is killed and started again until the first has ended. Each may wait for the other."""
    command, second = (options(teacher_dir, speech, run) for run in ("run", "other"))
    chance, ends = random.Random(2), []
    first = started(tmp_path, *command)
    while first.poll() is None:
        other = started(tmp_path, *second)
        deadline = time.monotonic() + chance.uniform(0, whole[2])
        while first.poll() is None and other.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        other.kill()
        ends.append(other.ended())
    ended = first.ended()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_equal(tmp_path, whole[0])
    for other in ends:
        assert other.returncode in (0, -signal.SIGKILL), other.stderr[-3000:]
    finished(tmp_path, *second)
    assert_equal(tmp_path, whole[0], "other")
