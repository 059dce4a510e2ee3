"""What TensorBoard and trackio have of a run, read from their own files."""

import json
import math
import os
import sqlite3
from pathlib import Path

import pytest
from documents import first_column
from processes import run_there
from scripts import DISTILL, distill_options
from speech import write_speech

from askd_hf import ASKDConfig
from askd_hf.arguments.parser import parse_args

# the text below the table of the guide names these
EVALUATED = ["eval_loss", "eval_wer", "eval_cer", "eval_total_loss"]
Curves = dict[tuple[str, int], float]  # value by name and step


@pytest.fixture(scope="module")
def many_clips(tmp_path_factory) -> Path:
    """As many as it takes to hold some out."""
    return write_speech(tmp_path_factory.mktemp("many-clips"), clips=160)


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory) -> Path:
    """With a clip that is no audio."""
    folder = write_speech(tmp_path_factory.mktemp("corrupt"), clips=6)
    (folder / "audio" / "003.wav").write_text("none")
    return folder


def tensorboard_curves(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def trackio_curves(folder: Path, project: str) -> Curves:
    with sqlite3.connect(folder / f"{project}.db") as database:
        rows = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics")]
    return {(name, row["train/global_step"]): value for row in rows for name, value in row.items()}


def logged_curves(run: Path) -> Curves:
    """The values of trainer_state.json, with the names that the guide gives for trackers."""
    found = {}
    for row in json.loads((run / "trainer_state.json").read_text())["log_history"]:
        if "train_runtime" in row:  # no curve
            continue
        for name, value in row.items():
            prefix, _, rest = name.partition("_")
            found[f"eval/{rest}" if prefix == "eval" else f"train/{name}", row["step"]] = value
    return {key: value for key, value in found.items() if key[0] != "train/step"}


@pytest.mark.slow
def test_the_documented_values_are_curves_in_both(tmp_path, deep_teacher_dir, speech_dir, many_clips, corrupt):
    # every term of the objective, the schedule that measures labels, and evaluation with all terms
    joint = ["--encoder_layers", 2, "--freeze_encoder", "False", "--eval_teacher_losses", "True"]
    joint += ["--eval_dataset", speech_dir, "--eval_splits", "validation", "--teacher_phase_ratio", 0.6]
    joint += ["--eval_strategy", "steps", "--eval_steps", 4, "--save_strategy", "no", "--max_steps", 8]
    joint += ["--self_weight", 0.3]
    stream = ["--streaming", "True", "--max_steps", 4, "--on_bad_audio", "skip"]
    documented = {f"train/{key}" for key in first_column("method.md", "key")}
    documented |= {key.replace("_", "/", 1) for key in EVALUATED}
    seen = set()
    for name, speech, more in (("joint", many_clips, joint), ("stream", corrupt, stream)):
        trackers = ["--report_to", "tensorboard", "trackio", "--project", name, "--logging_steps", 2]
        arguments = distill_options(deep_teacher_dir, speech, tmp_path / name, *trackers, *more, "--compare", "False")
        database = tmp_path / f"trackio-{name}"
        ended = run_there(DISTILL, *arguments, environment=os.environ | {"TRACKIO_DIR": str(database)})
        assert ended.returncode == 0, ended.stderr
        logged = logged_curves(tmp_path / name)
        in_tensorboard, in_trackio = tensorboard_curves(tmp_path / name), trackio_curves(database, name)
        assert len({step for _, step in logged}) >= 2 and all(map(math.isfinite, logged.values()))
        for key, value in logged.items():
            assert in_tensorboard[key] == pytest.approx(value, rel=1e-6), key  # it stores float32
            assert in_trackio[key] == value, key
        seen |= {key for key, _ in logged}
    assert documented <= seen, documented - seen


def test_no_space_is_made_of_the_word_false():
    """Trainer takes text as the name of one."""
    (config,) = parse_args((ASKDConfig,), ["--use_cpu", "--trackio_static_space_id", "False"])
    assert config.trackio_static_space_id is False
