"""`examples/distill.py --encoder_layers`: a student whose encoder is smaller, by evenly spread or probed layers."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from models import by_generate, by_pipeline
from processes import launch_two
from safetensors.torch import load_file
from scripts import DISTILL as SCRIPT
from scripts import distill_options as options
from scripts import run_here


def copied_layers(run) -> tuple[list[int], list[int]]:
    origin = json.loads((run / "training.json").read_text())["provenance"]
    return origin["copied_encoder_layers"], origin["copied_decoder_layers"]


def log_of(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def test_the_student_trains_its_own_encoder_and_loads_anywhere(
    monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir
):
    run = tmp_path / "run"
    more = ["--encoder_layers", 1, "--freeze_encoder", "False", "--eval_splits", "validation", "--logging_steps", 1]
    more += ["--self_weight", 0.3]
    status, _, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, run, *more))
    assert status == 0, err
    student, teacher = load_file(run / "model.safetensors"), load_file(deep_teacher_dir / "model.safetensors")
    layers = {name.split(".")[3] for name in student if ".encoder.layers." in name}
    assert layers == {"0"}
    for name in ("fc1.weight", "self_attn.q_proj.weight"):
        ours, theirs = (f"model.encoder.layers.{i}.{name}" for i in (0, 3))
        assert 0.0 < (student[ours] - teacher[theirs]).abs().max() < 0.2
    hidden = [row["hidden_loss"] for row in log_of(run) if "hidden_loss" in row]
    assert len(hidden) == 10 and hidden[-1] < hidden[0]
    assert copied_layers(run) == ([3], [0, 3])
    card = (run / "README.md").read_text()
    assert "encoder layer 3 and decoder layers 0 and 3 (counted from 0)" in card
    assert " + a·h·Hᵢ + " in card and "h: 10\n" in card and "| `hidden_weight` | 10 |" in card
    assert "| `freeze_encoder`" not in card  # off, as all that's left out
    tone = np.sin(np.arange(8000) / 10).astype(np.float32)
    assert by_pipeline(run, tone) == by_generate(run, tone) != ""


def test_probed_layers_are_those_of_the_whole_run_and_of_its_resumption(
    monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir
):
    run = tmp_path / "run"
    more = [
        "--encoder_layers",
        2,
        "--layer_selection",
        "greedy",
        "--eval_splits",
        "validation",
        "--learning_rate",
        1e-30,
        "--freeze_encoder",
        "False",
    ]
    more += ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4]
    status, out, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, run, *more))
    assert status == 0, err
    assert len(re.findall(r"^encoder with [43] layers, cross-entropy without layer", out, re.MULTILINE)) == 2
    found = re.search(r"^encoder layers (\d),(\d): cross-entropy [\d.]+; spread evenly, 0,3: ", out, re.MULTILINE)
    encoder, decoder = copied_layers(run)
    assert encoder == [int(found[1]), int(found[2])]
    student, teacher = load_file(run / "model.safetensors"), load_file(deep_teacher_dir / "model.safetensors")
    for part, layers in (("encoder", encoder), ("decoder", decoder)):
        for new, old in enumerate(layers):  # nothing was learnt at a rate of 0
            for name in ("fc1.weight", "self_attn.q_proj.weight"):
                ours, theirs = (
                    student[f"model.{part}.layers.{new}.{name}"],
                    teacher[f"model.{part}.layers.{old}.{name}"],
                )
                assert torch.equal(ours, theirs)
    rates = re.findall(r"(student|initial student) +([\d.]+) \[", out)
    assert rates[0][1] == rates[1][1]  # the same model
    shutil.rmtree(run / "checkpoint-4")
    more += ["--resume_from_checkpoint", "last"]
    planned = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, run, *more, "--dry_run"))
    assert planned.returncode == 0, planned.stderr  # with the default --hidden_weight of the checkpoint
    status, out, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, run, *more))
    assert status == 0 and "cross-entropy without" not in out, err
    assert copied_layers(run) == (encoder, decoder)
    assert re.findall(r"(student|initial student) +([\d.]+) \[", out) == rates


def test_of_two_processes_one_probes_for_both(tmp_path, deep_teacher_dir, speech_dir):
    more = ["--encoder_layers", 2, "--layer_selection", "greedy", "--max_steps", 2]
    done = launch_two(SCRIPT, *options(deep_teacher_dir, speech_dir, tmp_path / "run", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^encoder layers ", done.stdout, re.MULTILINE)) == 1
    assert len(copied_layers(tmp_path / "run")[0]) == 2


def test_cached_labels_go_without_hidden_states(monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir):
    more = ["--encoder_layers", 2, "--teacher_cache_dir", tmp_path / "labels", "--teacher_top_k", 5]
    more += ["--max_steps", 2, "--logging_steps", 1, "--freeze_encoder", "False"]
    status, _, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, tmp_path / "run", *more))
    assert status == 0, err
    logged = {name for row in log_of(tmp_path / "run") for name in row}
    assert "teacher_loss" in logged and "hidden_loss" not in logged
    facts = json.loads((tmp_path / "run" / "training.json").read_text())["arguments"]
    assert (facts["freeze_encoder"], facts["hidden_weight"]) == (False, None)


def test_what_cannot_be_is_said_before_any_work(monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir):
    layers, labels = ["--encoder_layers", 2], ["--teacher_cache_dir", tmp_path / "labels", "--teacher_top_k", 5]
    for more, message in (
        (
            [*layers, "--freeze_encoder", "True", "--encoder_recovery_epochs", 0],
            "a pruned encoder must be trained",
        ),
        (
            [*layers, "--encoder_cache_dir", tmp_path / "cache", "--freeze_encoder", "False"],
            "--encoder_cache_dir requires a frozen encoder",
        ),
        ([*layers, *labels, "--hidden_weight", 1], "--hidden_weight 1 is not supported with --teacher_cache_dir"),
        (["--encoder_recovery_epochs", 2], "--encoder_recovery_epochs requires --encoder_layers with fewer"),
        (
            [*layers, "--encoder_recovery_epochs", 0, "--encoder_recovery_dataset", speech_dir],
            "--encoder_recovery_dataset has no effect",
        ),
        ([*layers, "--encoder_recovery_epochs", -1], "--encoder_recovery_epochs must be at least 0"),
        (["--hidden_weight", 1], "--hidden_weight 1 requires a trained encoder"),
        (["--student", deep_teacher_dir, "--layer_selection", "greedy"], "is not supported with --student"),
        (
            ["--encoder_layers", 5, "--layer_selection", "greedy"],
            "--encoder_layers must be between 1 and 4, the number of the teacher's layers, got 5",
        ),
    ):
        status, _, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, tmp_path / "run", *more))
        assert status == 2 and message in err, err
        assert "Checking" not in err and not list(tmp_path.iterdir())
