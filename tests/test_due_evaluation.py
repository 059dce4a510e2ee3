"""A run that a signal stops at an evaluation goes on as if it had made it: nothing of it is lost."""

import json
import signal

import pytest
import torch
from models import make_processor, make_whisper
from training import Clips, history, make_trainer
from transformers import TrainerCallback

from askd_hf import ASKDTrainer
from askd_hf.models.student import init_student

STEPS = dict(max_steps=10, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
EPOCHS = dict(max_steps=-1, num_train_epochs=4, eval_strategy="epoch", save_strategy="epoch")  # of 4 steps
SELF_TEACHER = dict(preset="ps-kd", eval_teacher_losses=True)
ASKD = dict(preset="askd", teacher_schedule="linear", eval_teacher_losses=True)


@pytest.fixture(scope="module")
def models():
    processor = make_processor()
    # dropout: the evaluation draws random numbers, and the updates after it must draw the same as ever
    return make_whisper(processor).eval(), init_student(make_whisper(processor, seed=5, dropout=0.2), 2)


class SignalAt(TrainerCallback):
    """Stops the run after the update `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGTERM)


class SignalInEvaluation(TrainerCallback):
    """Stops the run in the evaluation after the update `step`, at its second batch."""

    def __init__(self, step: int):
        self.step = step
        self.batches = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += state.global_step == self.step
        if self.batches == 1 and state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def run_of(directory, models, **changes) -> ASKDTrainer:
    """A run on random labels, which soon gets worse on others."""
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=None)
    teacher = models[0] if changes.get("preset") == "askd" else None
    defaults = dict(preset="ce", predict_with_generate=False, learning_rate=0.05)
    return make_trainer(directory, teacher, models[1], Clips(models[1].config, 8, seed=5), **defaults | best | changes)


def evaluations(trainer: ASKDTrainer) -> list[dict[str, float]]:
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    return [{name: value for name, value in row.items() if name not in speed} for row in rows]


def assert_same(resumed: ASKDTrainer, whole: ASKDTrainer) -> None:
    assert evaluations(resumed) == evaluations(whole)
    names = ("step", "loss", "learning_rate")
    assert torch.equal(history(resumed, *names), history(whole, *names))
    assert resumed.state.best_metric == whole.state.best_metric
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert resumed.state.best_model_checkpoint.endswith(f"checkpoint-{whole.state.best_global_step}")
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        (STEPS, (2, 4, 5)),
        (EPOCHS, (4, 8, 7)),
        (EPOCHS | SELF_TEACHER, (8,)),  # its snapshot is renewed before step 9, and not before the evaluation
        pytest.param(STEPS | ASKD, (6,), marks=pytest.mark.slow),  # the last step of the teacher phase
        (STEPS | dict(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs=dict(patience=0)), (6,)),
        (STEPS | dict(save_strategy="best", save_steps=None), (2,)),
        (EPOCHS | dict(eval_delay=2), (4, 8)),  # the first epoch isn't evaluated
    ],
    ids=["steps", "epochs", "self-teacher", "teacher", "plateau", "best", "delay"],
)
def test_the_evaluation_is_made_when_the_run_is_resumed(tmp_path, models, changes, stops):
    whole = run_of(tmp_path / "whole", models, **changes)
    whole.train()
    for stop in stops:
        stopped = run_of(tmp_path / str(stop), models, **changes)
        stopped.add_callback(SignalAt(stop))
        stopped.train()
        assert stopped.state.global_step == stop and all(row["step"] < stop for row in evaluations(stopped))
        saved = json.loads((tmp_path / str(stop) / f"checkpoint-{stop}" / "blend_state.json").read_text())
        assert saved["evaluation_due"] == (stop in [row["step"] for row in evaluations(whole)])
        for _ in range(2):  # the checkpoint isn't changed
            resumed = run_of(tmp_path / str(stop), models, **changes)
            resumed.train(resume_from_checkpoint=str(tmp_path / str(stop) / f"checkpoint-{stop}"))
            assert_same(resumed, whole)


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        (STEPS, (4, 10)),
        (EPOCHS, (8, 16)),
        (STEPS | dict(save_strategy="best", save_steps=None), (4,)),
        (STEPS | ASKD, (6,)),
    ],
    ids=["steps", "epochs", "best", "teacher"],
)
def test_an_evaluation_is_abandoned_and_made_when_the_run_is_resumed(tmp_path, models, changes, stops):
    """Also that of the last step, after which the resumed run has nothing left to train."""
    changes = changes | dict(per_device_eval_batch_size=2)
    whole = run_of(tmp_path / "whole", models, **changes)
    whole.train()
    for stop in stops:
        stopped = run_of(tmp_path / str(stop), models, **changes)
        stopped.add_callback(signals := SignalInEvaluation(stop))
        stopped.train()
        assert signals.batches == 1 and stopped.stop.stopped  # of four
        assert stopped.state.global_step == stop and all(row["step"] < stop for row in evaluations(stopped))
        again = run_of(tmp_path / str(stop), models, **changes)  # and stopped in the evaluation that is due
        again.add_callback(signals := SignalInEvaluation(stop))
        again.train(resume_from_checkpoint=True)
        assert signals.batches == 1 and again.stop.stopped and again.state.global_step == stop
        resumed = run_of(tmp_path / str(stop), models, **changes)
        resumed.train(resume_from_checkpoint=True)
        assert_same(resumed, whole)


def test_the_checkpoint_to_resume_from_is_kept_beside_the_best(tmp_path, models):
    """With a limit of one, Trainer deletes all but the best at the end of training, and a signal ends it too."""
    changes = STEPS | dict(save_total_limit=1, learning_rate=0.3)
    whole = run_of(tmp_path / "whole", models, **changes)
    whole.train()
    best = whole.state.best_global_step
    assert {file.name for file in (tmp_path / "whole").glob("checkpoint-*")} == {f"checkpoint-{best}"}
    stopped = run_of(tmp_path / "stopped", models, **changes)
    stopped.add_callback(SignalAt(best + 3))
    stopped.train()
    kept = {file.name for file in (tmp_path / "stopped").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{best + 3}"}
    resumed = run_of(tmp_path / "stopped", models, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_early_stopping_counts_it(tmp_path, models):
    """Without it the run would train longer."""
    changes = STEPS | dict(max_steps=30, early_stopping_patience=2, learning_rate=0.3)
    whole = run_of(tmp_path / "whole", models, **changes)
    whole.train()
    stop = whole.state.global_step
    assert stop < 30
    stopped = run_of(tmp_path / "stopped", models, **changes)
    stopped.add_callback(SignalAt(stop))
    stopped.train()
    resumed = run_of(tmp_path / "stopped", models, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == stop
    assert_same(resumed, whole)


def test_a_checkpoint_of_an_earlier_version_has_none_due(tmp_path, models):
    run_of(tmp_path, models, **STEPS).train()
    file = tmp_path / "checkpoint-4" / "blend_state.json"
    state = json.loads(file.read_text())
    del state["evaluation_due"]
    file.write_text(json.dumps(state))
    resumed = run_of(tmp_path, models, **STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [row["step"] for row in evaluations(resumed)] == [2, 4, 6, 8, 10]
