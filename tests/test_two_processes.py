"""What a run in two or four processes has in common with one in a single process; interrupted and resumed runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import make_processor
from processes import launch, launch_two
from scripts import ROOT
from speech import write_speech
from training import NAMES, Clips, answer_right, collate, history, make_trainer, on, train_on_speech

from askd_hf.evaluation.metrics import compute_metrics_for
from askd_hf.training.checkpoint_lookup import checkpoints

RUN = ROOT / "tests" / "support" / "distributed_run.py"
HALVED = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
ADAPTIVE = dict(preset="askd", teacher_schedule="adaptive", adaptive_window=2, clips=180)  # 9 are held out
HIDDEN = dict(
    preset="kd", freeze_encoder=False, hidden_weight=2.0, eval_teacher_losses=True, predict_with_generate=False
)
EVALUATED = dict(eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=1, predict_with_generate=False)
OWN_MEANS = dict(preset="ce", average_tokens_across_devices=False, max_steps=1, predict_with_generate=False)
UNEVEN = dict(preset="kd", max_steps=-1, num_train_epochs=2)  # on 13 clips
RUNS = {
    "adaptive": ADAPTIVE | HALVED | dict(save_strategy="steps", save_steps=5),
    "hidden": HIDDEN | HALVED,
    "own_means": OWN_MEANS,
    "interrupted": ADAPTIVE | dict(interrupt_second_process_at=4),
    "abandoned": ADAPTIVE | EVALUATED | dict(interrupt_evaluation_at=4),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The directory of all runs in two processes: one launch, of which imports are the longest part."""
    directory = tmp_path_factory.mktemp("two")
    speech = dict(speech=str(write_speech(directory / "speech", clips=13)))
    own_means = OWN_MEANS | speech | dict(per_device_train_batch_size=3, max_steps=3, learning_rate=1e-30)
    uneven = {
        "of_own_means": own_means,
        "uneven": UNEVEN | HALVED | speech,
        "of_two": UNEVEN | speech | dict(per_device_train_batch_size=1),
    }
    done = launch_two(RUN, directory, json.dumps(RUNS | uneven))
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture(scope="module")
def seen(launched) -> Callable[[str], list[dict]]:
    """What the two processes saw of a run."""
    return lambda name: [json.loads((launched / name / f"{process}.json").read_text()) for process in (0, 1)]


def in_one(tmp_path, teacher, student, **changes):
    processor = make_processor()
    evaluation, metrics = Clips(student.config, clips=7, seed=2), compute_metrics_for(processor, "none")
    changes |= dict(per_device_train_batch_size=8)
    trainer = make_trainer(tmp_path, teacher, student, evaluation, metrics, processor, **changes)
    trainer.train()
    return trainer


def test_two_processes_give_the_trajectory_and_the_evaluation_of_one(tmp_path, teacher, student, seen):
    one, (two, _) = in_one(tmp_path, teacher, student, **ADAPTIVE), seen("adaptive")
    torch.testing.assert_close(torch.tensor(two["history"]), history(one, *NAMES), rtol=1e-4, atol=1e-6)
    # 7 clips over two processes: the 8th, which evens them out, must not count. Three of the seven are right
    answer_right(one, clips=3)
    metrics = one.evaluate()
    for name in ("eval_loss", "eval_wer", "eval_cer"):
        assert two["metrics"][name] == pytest.approx(metrics[name], rel=1e-5), name
    assert metrics["eval_wer"] > 0.0 and metrics["eval_cer"] > 0.0


@pytest.mark.parametrize(("name", "batch"), [("uneven", 8), ("of_two", 2)])
def test_the_last_update_of_an_epoch_has_each_clip_once(tmp_path, teacher, student, seen, launched, name, batch):
    """13 clips of two processes with batches of 2 or 1: the rows that fill the last ones have no labels."""
    one = make_trainer(
        tmp_path, teacher, student, processor=make_processor(), per_device_train_batch_size=batch, **UNEVEN
    )
    train_on_speech(one, launched / "speech")
    one.train()
    for process in seen(name):
        torch.testing.assert_close(torch.tensor(process["history"]), history(one, *NAMES), rtol=1e-4, atol=1e-6)


def test_no_process_is_left_without_labels_where_each_has_the_mean_of_its_own(seen):
    """13 clips in batches of 3: rows without labels would be all of the last batch of the second process."""
    losses = [row[NAMES.index("loss")] for row in seen("of_own_means")[0]["history"]]
    assert len(losses) == 3 and losses[2] > 0.75 * losses[0]  # with the initial weights; it would be half


def test_one_process_resumes_a_run_of_two_to_the_same_trajectory(tmp_path, teacher, student, seen, launched, caplog):
    options = ADAPTIVE | dict(per_device_train_batch_size=8)
    one = make_trainer(tmp_path, teacher, student, processor=make_processor(), **options)
    one.train(resume_from_checkpoint=str(launched / "adaptive" / "checkpoint-5"))
    resumed = history(one, *NAMES)
    assert len(resumed) == 8  # the checkpoint has the first five
    torch.testing.assert_close(resumed, torch.tensor(seen("adaptive")[0]["history"]), rtol=1e-4, atol=1e-6)
    assert "was saved by 2 processes, and now there are 1" in caplog.text


@pytest.mark.slow
def test_four_processes_give_the_trajectory_and_the_evaluation_of_one(tmp_path, teacher, student):
    runs = {"adaptive": ADAPTIVE | dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)}
    runs["hidden"] = HIDDEN | dict(per_device_train_batch_size=2)
    done = launch(4, RUN, tmp_path / "four", json.dumps(runs))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, changes in dict(adaptive=ADAPTIVE, hidden=HIDDEN).items():
        one = in_one(tmp_path / name, teacher, student, **changes)
        answer_right(one, clips=3)
        metrics = one.evaluate()
        for process in range(4):
            seen = json.loads((tmp_path / "four" / name / f"{process}.json").read_text())
            torch.testing.assert_close(torch.tensor(seen["history"]), history(one, *NAMES), rtol=1e-4, atol=1e-6)
            same = {key for key in metrics if key.endswith(("loss", "_wer", "_cer"))}
            assert len(same) >= (3 if name == "adaptive" else 2)
            assert {key: seen["metrics"][key] for key in same} == pytest.approx(
                {key: metrics[key] for key in same}, rel=1e-4
            )


def number_of_cards() -> int:
    """Of a new process: this one may have counted them before."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("device", "processes"),
    [
        pytest.param("cpu", 2, marks=pytest.mark.slow),
        pytest.param("cuda", 1, marks=pytest.mark.gpu),
        pytest.param("cuda", 2, marks=pytest.mark.gpu),
    ],
)
def test_processes_on_a_device_each_have_the_steps_of_one_on_the_cpu(
    tmp_path, teacher, student, device, processes, monkeypatch
):
    """On cards they exchange gradients by NCCL. A single process does so with itself."""
    options = HIDDEN | dict(max_steps=3)
    run = options | dict(per_device_train_batch_size=8 // processes) | on(device)
    with monkeypatch.context() as patched:  # this process, whose trainers take one card, may see one only
        patched.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("TEST_CARDS", "0,1"))
        if device == "cuda" and (cards := number_of_cards()) < processes:
            pytest.skip(f"CUDA cards: {cards}, needed: {processes}")
        done = launch(processes, RUN, tmp_path, json.dumps({"run": run}))
    assert done.returncode == 0, done.stderr[-3000:]
    one = in_one(tmp_path / "one", teacher, student, **options)
    answer_right(one, clips=3)
    metrics = one.evaluate()
    for process in range(processes):
        seen = json.loads((tmp_path / "run" / f"{process}.json").read_text())
        assert seen["backend"] == ("nccl" if device == "cuda" else "gloo")
        assert seen["wrapped"] == "DistributedDataParallel"
        torch.testing.assert_close(torch.tensor(seen["history"]), history(one, *NAMES), rtol=1e-2, atol=1e-4)
        assert seen["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-2)


def test_two_processes_have_the_hidden_state_loss_of_one(tmp_path, teacher, student, seen):
    one, (two, _) = in_one(tmp_path, teacher, student, **HIDDEN), seen("hidden")
    torch.testing.assert_close(torch.tensor(two["history"]), history(one, *NAMES), rtol=1e-4, atol=1e-6)
    answer_right(one, clips=3)
    assert two["metrics"]["eval_hidden_loss"] == pytest.approx(one.evaluate()["eval_hidden_loss"], rel=1e-4)


def test_without_averaging_over_devices_each_process_has_the_mean_of_its_own_tokens(student, seen):
    rows = {row["clip"]: row for row in Clips(student.config)}
    losses, tokens = [], []
    for process in seen("own_means"):
        batch = collate([rows[clip] for clip in process["clips"]])
        with torch.no_grad():
            losses.append(student(input_features=batch["input_features"], labels=batch["labels"]).loss.item())
        tokens.append((batch["labels"] != -100).sum().item())
    logged = seen("own_means")[0]["history"][0][0]
    of_all = (losses[0] * tokens[0] + losses[1] * tokens[1]) / sum(tokens)
    assert logged == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert abs(of_all - logged) > 1e-4 * logged


def test_an_interrupt_of_one_process_in_an_evaluation_ends_that_of_both(launched, seen):
    for process in seen("abandoned"):
        assert (process["step"], process["stopped"]) == (4, True)
        assert process["equal"] and process["masked_then"] == process["masked"][4:]
    assert checkpoints(launched / "abandoned")[-1].name == "checkpoint-4"


def test_an_interrupt_of_one_process_stops_both_and_both_resume_from_there(launched, seen):
    """In step with each other, each with random numbers of its own."""
    for process in seen("interrupted"):
        assert (process["step"], process["stopped"]) == (5, True)
        assert process["equal"] and process["masked_then"] == process["masked"][5:]
        assert process["upheld"] not in (0.5, 1.0)  # it has measured
    first, second = (process["masked"] for process in seen("interrupted"))
    assert all(a != b for a, b in zip(first, second, strict=True))
    checkpoint = launched / "interrupted" / "checkpoint-5"
    assert checkpoints(checkpoint.parent)[-1] == checkpoint
    # a process killed while it saved its random state, here a second long, leaves a checkpoint that isn't whole
    saved = [checkpoint / name for name in ("rng_state_1.pth", "trainer_state.json")]
    assert saved[0].stat().st_mtime_ns < saved[1].stat().st_mtime_ns
    saved[0].rename(checkpoint / "aside")
    assert checkpoints(checkpoint.parent) == []
    (checkpoint / "aside").rename(saved[0])
