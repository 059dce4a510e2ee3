"""What `make demo` ships and does."""

import csv
import json
import re
import subprocess
import sys

import pytest
from scripts import ROOT
from transformers import pipeline

from askd_hf.data import SAMPLING_RATE, decode_audio
from askd_hf.evaluation import Results
from askd_hf.evaluation.metrics import error_rates

DEMO = ROOT / "examples" / "demo"


def strings(split: str) -> list[dict[str, str]]:
    with (DEMO / "data" / split / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_shipped_teacher_makes_at_most_5_percent_errors_on_unseen_recordings():
    rows = strings("known")
    clips = [decode_audio({"path": DEMO / "data" / "known" / row["file_name"]}) for row in rows]
    transcribe = pipeline("automatic-speech-recognition", model=str(DEMO / "teacher"), batch_size=40)
    heard = transcribe(
        [{"raw": clip, "sampling_rate": SAMPLING_RATE} for clip in clips], generate_kwargs={"num_beams": 1}
    )
    texts = [row["transcription"] for row in rows]
    assert error_rates([result["text"].strip() for result in heard], texts, str)["wer"] <= 5.0


def test_no_speaker_of_the_unseen_split_is_trained_on():
    speakers = {split: {row["speaker"] for row in strings(split)} for split in ("train", "known", "unseen")}
    assert speakers["known"] == speakers["train"] and len(speakers["train"]) == 4
    assert len(speakers["unseen"]) == 2 and not speakers["unseen"] & speakers["train"]


@pytest.mark.slow
def test_the_demo_ends_with_its_table_and_a_student_close_to_its_teacher(tmp_path):
    command = [sys.executable, "examples/distill.py", "--config", "examples/demo/demo.yaml"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "demo")], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = Results.load(tmp_path / "demo" / "evaluation" / "results.json")
    assert [entry.name for entry in results.sets] == ["known", "unseen"]
    wer = {role: score.wer for role, score in results.sets[0].scores.items()}
    assert wer["teacher"] <= 5.0
    assert wer["initial student"] > 50.0
    assert wer["student"] <= wer["teacher"] + 5.0
    for role, value in wer.items():
        assert re.search(rf"known +{role} +{value:.2f} \[", done.stdout, re.MULTILINE), role
    assert (tmp_path / "demo" / "model.safetensors").is_file()
    # the golden cards are made of facts and results that were kept: today's have the same names
    for kept, written in (("summary", "training.json"), ("results", "evaluation/results.json")):
        old = json.loads((ROOT / "tests" / "cards" / f"demo-{kept}.json").read_text())
        assert old.keys() == json.loads((tmp_path / "demo" / written).read_text()).keys(), kept
