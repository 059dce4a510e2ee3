"""Two nodes, each with a disk of its own: distilling with both caches, killed and resumed; the other commands."""

import json
import shutil
import signal
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
def test_nodes_without_a_shared_disk_fill_a_cache_each_and_resume(
    monkeypatch, teacher_dir, speech_dir, tmp_path, processes
):
    """Resumed with the option, or by the same command where torchrun has started the processes again."""
    script, whole, nodes = SCRIPTS / "distill.py", disks(tmp_path / "whole"), disks(tmp_path / "killed")
    options = distill_options(teacher_dir, speech_dir, "run", *CACHES.split(), *EVERY_STEP.split())
    options += ["--per_device_train_batch_size", str(8 // processes)]
    options += ["--layer_selection", "greedy", "--decoder_layers", "1"]  # the first node has the selected layers
    ended = launch(processes, script, *options, nodes=whole)
    assert ended.returncode == 0, ended.stderr[-3000:]
    if processes == 2:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    saved = nodes[0] / "run" / "checkpoint-2" / "trainer_state.json"
    killed = launch(processes, script, *options, nodes=nodes, until=saved.exists)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not list(nodes[1].glob("run/checkpoint-*/model.safetensors"))  # the first process saves
    if processes == 2:
        # with the other node as the first one, it would start anew
        refused = launch(2, script, *options, "--resume_from_checkpoint", "auto", nodes=nodes[::-1])
        assert refused.returncode == 2 and "process 1 has a checkpoint in run, and the first" in refused.stderr
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    else:
        options += ["--resume_from_checkpoint", "last"]
    ended = launch(processes, script, *options, "--compare", "True", nodes=nodes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count(" WER, % ") == 1  # the first process compares the models, alone
    keys = [cached_keys(disk) for disk in (*whole, *nodes)]
    assert len(keys[0]) == 16 + 6 and all(sorted({*of_disk}) == of_disk == keys[0] for of_disk in keys)
    assert list(nodes[1].glob("run/checkpoint-*/model.safetensors"))  # a copy
    assert_equal(whole[0], nodes[0])


def test_all_nodes_end_with_the_weights_of_the_best_checkpoint(tmp_path):
    nodes = disks(tmp_path)
    ended = launch(2, ROOT / "tests" / "support" / "best_on_nodes.py", nodes=nodes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = (json.loads((node / f"{process}.json").read_text()) for process, node in enumerate(nodes))
    for name, file in (("whole", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        assert first[name]["best"] != f"{name}/checkpoint-8"  # the last one
        assert first[name] == second[name]
        saved = load_file(nodes[0] / first[name]["best"] / file)
        assert not (nodes[1] / first[name]["best"] / file).exists()
        for parameter, weights in first[name]["weights"].items():
            key = f"base_model.model.{parameter.replace('.default', '')}" if name == "lora" else parameter
            assert saved[key].flatten().tolist() == weights, parameter


@pytest.mark.slow
def test_a_node_waits_for_one_that_takes_longer_than_the_timeout(teacher_dir, speech_dir, tmp_path):
    """As one does whose disk is new, with everything to compute that the others have."""
    options = f"--teacher {teacher_dir} --dataset {speech_dir} --language en --use_cpu --teacher_top_k 5"
    options += " --encoder_cache_dir cache/encoder --teacher_cache_dir cache/labels"
    script = ROOT / "tests" / "support" / "slow_passes.py"
    done = launch(2, script, *options.split(), nodes=disks(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    slow = [line.removeprefix("slow: ") for line in done.stdout.splitlines() if line.startswith("slow: ")]
    assert sorted(slow) == ["_compute_parts", "add_files", "audio_infos", "cache_encoder"]
    assert done.stdout.count("16 labeled clips: --dataset") == 1


@pytest.mark.slow
def test_a_node_with_an_empty_disk_joins_a_run_whose_encoder_was_recovered(teacher_dir, speech_dir, tmp_path):
    script, nodes = SCRIPTS / "distill.py", disks(tmp_path / "nodes")
    more = ("--encoder_layers", "0,", "--encoder_recovery_epochs", "1", "--per_device_train_batch_size", "4")
    options = distill_options(teacher_dir, speech_dir, "run", *EVERY_STEP.split(), *more)
    saved = nodes[0] / "run" / "checkpoint-2" / "trainer_state.json"
    killed = launch(2, script, *options, nodes=nodes, until=saved.exists)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    shutil.rmtree(nodes[1])
    nodes[1].mkdir()
    ended = launch(2, script, *options, "--resume_from_checkpoint", "last", nodes=nodes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    # in a new run, the recovered encoder that is left on the second node isn't taken
    options[options.index("run")] = "again"
    shutil.copytree(nodes[1] / "run" / "encoder_recovery", nodes[1] / "again" / "encoder_recovery")
    ended = launch(2, script, *options, nodes=nodes)
    assert ended.returncode == 0, ended.stderr[-3000:]
