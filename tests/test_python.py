"""`askd_hf.distill`, the command as a function."""

import filecmp
import math

import numpy as np
import pytest
from documents import blocks
from scripts import ROOT, run_here
from transformers import pipeline

import askd_hf
from askd_hf import UserError
from askd_hf.data import SAMPLING_RATE
from askd_hf.evaluation import Results

DIGITS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
QUICK = dict(max_steps=2, use_cpu=True, per_device_train_batch_size=2, dataloader_num_workers=0, compare=False)


def test_the_function_trains_as_the_command_does(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    given = dict(teacher=teacher_dir, dataset=speech_dir, decoder_layers=1, learning_rate=1e-3, eval_splits=None)
    arguments = [word for name, value in (given | QUICK).items() if value is not None for word in (f"--{name}", value)]
    status, _, err = run_here(monkeypatch, capsys, *map(str, arguments), "--output_dir", str(tmp_path / "command"))
    assert status == 0, err
    student = askd_hf.distill(**given, **QUICK, output_dir=tmp_path / "function")
    assert student == str(tmp_path / "function")
    assert filecmp.cmp(tmp_path / "function" / "model.safetensors", tmp_path / "command" / "model.safetensors", False)
    transcribe = pipeline("automatic-speech-recognition", model=student)
    silence = {"raw": np.zeros(SAMPLING_RATE, np.float32), "sampling_rate": SAMPLING_RATE}
    assert isinstance(transcribe(silence)["text"], str)


@pytest.mark.slow
def test_the_python_that_the_readme_opens_with_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """In a clone; test_guides.py runs it with two steps."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(ROOT / "README.md", "python")[0], "README.md", "exec"), {"__name__": "example"})
    transcript = capsys.readouterr().out.splitlines()[-1].split()
    assert 2 <= len(transcript) <= 5 and set(transcript) <= DIGITS
    calls, *_ = Results.load(tmp_path / "runs" / "first" / "evaluation" / "results.json").sets
    assert calls.comparison.confidence_interval[1] < 0  # points, student minus teacher


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teecher": "x"}, "--teecher"),
        ({"learning_rate": "fast"}, "--learning_rate"),
        ({"teacher_weight": math.inf}, "teacher_weight"),
        ({}, "--teacher is required"),
    ],
)
def test_mistakes_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        askd_hf.distill(**options)


def test_lists_and_dictionaries_are_options_too(monkeypatch):
    seen = []
    monkeypatch.setattr("askd_hf.commands.distill.distill", lambda *parsed: seen.extend(parsed))
    askd_hf.distill(teacher="t", eval_splits=["a", "b"], lr_scheduler_kwargs={"num_cycles": 2}, output_dir="runs/x")
    _, data, *_, config = seen
    assert data.eval_splits == ["a", "b"] and config.lr_scheduler_kwargs == {"num_cycles": 2}
