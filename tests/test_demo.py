"""What `make demo` ships and does."""

import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
from manifests import write as write_manifest
from report_page import results, speech_set, speed_row
from scripts import ROOT, load_script
from transformers import pipeline

from askd_hf.data import SAMPLING_RATE, decode_audio
from askd_hf.evaluation import Results
from askd_hf.evaluation.metrics import error_rates
from askd_hf.evaluation.results import PairedComparison, PartLatency

DEMO = ROOT / "examples" / "demo"
SPLITS = ("train", "validation", "calls", "studio")


def strings(split: str) -> list[dict[str, str]]:
    with (DEMO / "data" / split / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def commands_of(*targets: str) -> list[list[str]]:
    """Return the Python commands of targets of the Makefile, as words."""
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=True)
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


def test_the_strings_are_those_that_the_script_composes_of_the_digits(tmp_path, monkeypatch):
    script = load_script(DEMO / "make_strings.py")
    monkeypatch.setattr(sys, "argv", ["make_strings.py", "--output_dir", str(tmp_path)])
    script.main()
    files = {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")}
    assert files == {file.relative_to(DEMO / "data") for file in (DEMO / "data").rglob("*.*")}
    for file in files:
        if file.suffix == ".ogg":  # each has a random number of its stream
            assert (soundfile.read(tmp_path / file)[0] == soundfile.read(DEMO / "data" / file)[0]).all(), file
        else:
            assert (tmp_path / file).read_bytes() == (DEMO / "data" / file).read_bytes(), file


def test_it_is_small():
    files = [file for file in DEMO.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 15e6


def test_each_seed_runs_the_commands_of_the_demo():
    *commands, table = commands_of("demo", "demo-seeds")
    demo, commands = commands[:3], commands[3:]
    runs = [commands[i : i + len(demo)] for i in range(0, len(commands), len(demo))]
    assert len(runs) == 3 and all("demo-seeds" not in word for words in demo for word in words)
    for seed, run in enumerate(runs, start=1):
        there = [[word.replace(f"runs/demo-seeds/{seed}", "runs/demo") for word in words] for words in run]
        more = ["--seed", str(seed), "--encoder_cache_dir", "runs/demo-seeds/encoder"]
        assert there == [words + more * ("--config" in words) for words in demo]
    assert table[1:] == ["examples/demo/seeds.py", "runs/demo-seeds"]


def write_runs(seed: Path, interval: tuple[float, float], parts: float, generate: float, ours: list[str]) -> None:
    """Write the evaluations of both students of a seed: a set with three clips of two words, and one of `studio`."""
    texts = {"calls": ["one two", "three four", "five six"], "studio": ["one two"] * 3}
    both = {"askd": {"calls": ours, "studio": texts["studio"]}, "labels_only": texts | {"calls": ["one"] * 3}}
    for run, transcripts in both.items():
        sets = []
        for name, references in texts.items():
            rows = [("theo", *row) for row in zip(references, transcripts[name], strict=True)]
            write_manifest(seed / run / "evaluation", "student", rows, name, set=dict(split=name))
            found = speech_set(name, split=name, normalizer="basic", bootstrap_unit="clip")
            sets.append(
                replace(found, comparison=PairedComparison("student", "teacher", sum(interval) / 2, interval, 0))
            )
        both_parts = [
            PartLatency(role, 1, 2, 4, 0.0, 0.0, 0.01 * times, 0.0)
            for role, times in (("student", 1), ("teacher", parts))
        ]
        speed = replace(results().speed, parts=both_parts, rows=[speed_row("student", 1, 9.0, generate)])
        results(sets=sets, speed=speed).save(seed / run / "evaluation" / "results.json")


def test_the_table_of_the_seeds_counts_for_how_many_the_claim_holds(tmp_path, monkeypatch, capsys):
    write_runs(tmp_path / "1", (-9.0, -5.0), 6.0, 5.0, ["one two", "three four", "five"])
    write_runs(tmp_path / "2", (-8.0, 0.5), 6.0, 3.9, ["one two", "three", "five"])
    write_runs(tmp_path / "10", (-7.0, -1.0), 3.9, 5.0, ["one two", "three", "five"])
    seeds = load_script(DEMO / "seeds.py")
    monkeypatch.setattr(sys, "argv", ["seeds.py", str(tmp_path)])
    seeds.main()
    printed = capsys.readouterr().out
    rows = [re.split(" {2,}", line) for line in printed.splitlines() if re.match(r"\d+ +(calls|studio) ", line)]
    assert [row[0] for row in rows] == ["1", "1", "2", "2", "10", "10"]
    assert rows[0][5] == "-7.00 [-9.00, -5.00]" and rows[0][7:] == ["6.0x", "5.0x"]
    # errors of 6 words: 1, and 5 with "one" for each clip
    assert rows[0][6].startswith("-66.67 [") and rows[1][6].startswith("+0.00 [")
    assert "interval below zero: 2 of 3 seeds." in printed and "one clip at a time: 1 of 3 seeds." in printed


@pytest.mark.slow
def test_the_demo_ends_with_a_student_that_beats_its_teacher_in_calls(tmp_path):
    """With the directory of a finished `make demo` in DEMO_RUN only its comparison runs again."""
    commands, demo = commands_of("demo"), Path(os.environ.get("DEMO_RUN", tmp_path / "demo")).absolute()
    for words in commands[-1:] if "DEMO_RUN" in os.environ else commands:
        command = [sys.executable, *(word.replace("runs/demo", str(demo)) for word in words[1:])]
        if "--config" in command:  # the file also has directories below runs/demo
            command += ["--encoder_cache_dir", str(demo / "encoder")]
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
