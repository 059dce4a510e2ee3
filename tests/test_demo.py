"""What `make demo` ships and does."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import pipeline

from askd_hf.data import SAMPLING_RATE, decode_audio
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
    number = r"(\d+\.\d) %"
    known = {
        name: float(re.search(rf"^{name} +{number} +{number} ", done.stdout, re.MULTILINE)[1])
        for name in ("teacher", "student before", "student after")
    }
    assert known["teacher"] <= 5.0
    assert known["student before"] > 50.0
    assert known["student after"] <= known["teacher"] + 5.0
    assert "reference: " in done.stdout and "The student: pipeline(" in done.stdout
    assert (Path(tmp_path) / "demo" / "model.safetensors").is_file()
