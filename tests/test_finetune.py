"""`examples/finetune.py` as a user runs it on a student of their own."""

import json
from pathlib import Path

import pytest
import torch
from models import by_generate, by_pipeline, make_processor, make_whisper
from processes import Ended, run_there
from safetensors.torch import load_file
from scripts import ROOT, steps_printed

from askd_hf.data import decode_audio, load_speech_dataset
from askd_hf.models.student import init_student


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory with a student, and a teacher that has another encoder."""
    folder = tmp_path_factory.mktemp("models")
    processor = make_processor()
    for name, model in {
        "student": init_student(make_whisper(processor, seed=5), 2),
        "teacher": make_whisper(processor),
    }.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def finetune(folder: Path, speech: Path, output_dir: Path, *more: str) -> Ended:
    command = f"--student student --dataset {speech} --eval_splits validation --output_dir {output_dir}"
    command += " --max_steps 6 --logging_steps 1 --use_cpu"
    return run_there(ROOT / "examples" / "finetune.py", *command.split(), *more, directory=folder)


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["--teacher", "teacher", "--preset", "askd"], marks=pytest.mark.slow),
        pytest.param(["--lora_r", "4", "--learning_rate", "1e-2"], marks=pytest.mark.slow),
        pytest.param(
            ["--teacher", "teacher", "--preset", "askd", "--lora_r", "4", "--use_dora", "--learning_rate", "1e-2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["labels and itself", "with a teacher", "LoRA", "DoRA with a teacher"],
)
def test_a_student_of_ones_own(models, speech_dir, tmp_path, more):
    done = finetune(models, speech_dir, tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(d / "model.safetensors") for d in (models / "student", tmp_path / "run"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(".encoder." in name for name in changed)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    measured = {name for row in history for name in row}
    assert "self_loss" in measured and ("teacher_loss" in measured) == ("--teacher" in more)
    embeddings = "model.decoder.embed_tokens.weight"
    assert (embeddings in changed) == ("--lora_r" not in more)
    clip = load_speech_dataset(str(speech_dir), None, "validation")[0]
    wave = decode_audio(clip["audio"])
    assert by_pipeline(tmp_path / "run", wave) == by_generate(tmp_path / "run", wave) != ""


@pytest.mark.slow
def test_a_killed_run_with_lora_goes_on(models, speech_dir, tmp_path):
    more = ["--lora_r", "4", "--learning_rate", "1e-2", "--save_strategy", "steps", "--save_steps", "2"]
    more += ["--compare", "False"]
    whole = finetune(models, speech_dir, tmp_path / "whole", *more)
    assert whole.returncode == 0, whole.stderr
    started = finetune(models, speech_dir, tmp_path / "run", *more)
    assert started.returncode == 0, started.stderr
    run = tmp_path / "run"
    for finished in (run / "model.safetensors", run / "checkpoint-6" / "trainer_state.json"):
        finished.unlink()  # as if it had been killed after step 4
    resumed = finetune(models, speech_dir, run, *more, "--resume_from_checkpoint", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert [steps_printed(ended.stdout) for ended in (whole, resumed)] == [[1, 2, 3, 4, 5, 6], [5, 6]]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--teacher", "teacher"],
            "--teacher has no effect: --preset ps-kd has no teacher phase; choose --preset askd",
        ),
        (["--preset", "askd"], "--preset askd requires --teacher"),
        (["--lora_r", "0"], "--lora_r must be at least 1, got 0"),
        (["--use_dora"], "--use_dora requires --lora_r"),
        (["--lora_r", "4", "--lora_target_modules", "nothing"], "--lora_target_modules must"),
    ],
)
def test_options_that_make_no_sense_are_refused(models, speech_dir, tmp_path, more, message):
    done = finetune(models, speech_dir, tmp_path / "run", *more)
    assert done.returncode == 2 and f"error: {message}" in done.stderr, done.stderr
