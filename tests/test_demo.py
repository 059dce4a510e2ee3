"""What `make demo` ships and does."""

import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT
from transformers import pipeline

from askd_hf.data import SAMPLING_RATE, decode_audio
from askd_hf.evaluation import Results
from askd_hf.evaluation.metrics import error_rates

DEMO = ROOT / "examples" / "demo"
SPLITS = ("train", "validation", "calls", "studio")


def strings(split: str) -> list[dict[str, str]]:
    with (DEMO / "data" / split / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def demo_commands() -> list[list[str]]:
    """Return the Python commands of the Makefile's target, as words."""
    done = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if "examples/" in line]


def test_the_shipped_teacher_makes_at_most_8_percent_errors_in_the_studio_and_more_than_25_in_calls():
    transcribe = pipeline("automatic-speech-recognition", model=str(DEMO / "teacher"), batch_size=20)
    wer = {}
    for split in ("studio", "calls"):
        rows = strings(split)[::5]  # a window of 30 s takes long
        clips = [decode_audio({"path": DEMO / "data" / split / row["file_name"]}) for row in rows]
        sounds = [{"raw": clip, "sampling_rate": SAMPLING_RATE} for clip in clips]
        texts = [heard["text"].strip() for heard in transcribe(sounds, generate_kwargs={"num_beams": 1})]
        wer[split] = error_rates(texts, [row["transcription"] for row in rows], str)["wer"]
    assert wer["studio"] <= 8.0 and wer["calls"] > 25.0


def test_calls_have_voices_that_the_teacher_was_not_trained_on():
    speakers = {split: {row["speaker"] for row in strings(split)} for split in SPLITS}
    assert speakers["train"] == speakers["validation"] == speakers["calls"] and len(speakers["calls"]) == 2
    assert len(speakers["studio"]) == 4 and not speakers["studio"] & speakers["calls"]


def test_the_splits_share_no_recording():
    splits = runpy.run_path(str(DEMO / "digits.py"))["SPLITS"]
    takes = {name: {(s, p) for s in speakers for p in positions} for name, (speakers, positions) in splits.items()}
    assert {*SPLITS, "teacher"} == takes.keys()
    assert sum(map(len, takes.values())) == len(set.union(*takes.values()))


def test_it_is_small():
    files = [file for file in DEMO.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 15e6


@pytest.mark.slow
def test_the_demo_ends_with_a_student_that_beats_its_teacher_in_calls(tmp_path):
    """With the directory of a finished `make demo` in DEMO_RUN only its comparison runs again."""
    commands, demo = demo_commands(), Path(os.environ.get("DEMO_RUN", tmp_path / "demo")).absolute()
    for words in commands[-1:] if "DEMO_RUN" in os.environ else commands:
        command = [sys.executable, *(word.replace("runs/demo", str(demo)) for word in words[1:])]
        if "--config" in command:  # the file also has directories below runs/demo
            command += ["--encoder_cache_dir", str(demo / "encoder")]
            if "--output_dir" not in command:
                command += ["--output_dir", str(demo / "askd")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
    results = Results.load(demo / "askd" / "evaluation" / "results.json")
    calls, studio = results.sets
    assert (calls.name, studio.name) == ("calls", "studio")
    assert calls.comparison.confidence_interval[1] < 0  # points, student minus teacher
    labels_only = Results.load(demo / "labels_only" / "evaluation" / "results.json")
    for role, scores in (
        ("teacher", calls.scores["teacher"]),
        ("ASKD student", calls.scores["student"]),
        ("student, labels only", labels_only.sets[0].scores["student"]),
    ):
        assert re.search(rf"^{role} +{scores.wer:.2f} \[", done.stdout, re.MULTILINE), role
    between_students = calls.scores["student"].wer - labels_only.sets[0].scores["student"].wer
    assert f"calls, ASKD student - labels only: {between_students:+.2f} [" in done.stdout
    assert (demo / "demo.png").stat().st_size > 10_000
    assert (demo / "askd" / "model.safetensors").is_file()
