"""What a long run tells of itself, and when it ends early."""

import pytest
import torch
from training import Clips, history, make_trainer
from transformers import Trainer

from askd_hf import ASKDConfig, UserError
from askd_hf.hub.training_summary import evaluations_since_best, has_lost_patience


def test_throughput(tmp_path, teacher, student, monkeypatch):
    """By a clock that only these move: a micro-batch takes 1 s, its update waits 0.5 s for both of its batches."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    trainer = make_trainer(tmp_path, teacher, student, max_steps=8, logging_steps=2, gradient_accumulation_steps=2)
    loss, batches = trainer.compute_loss, Trainer.get_batch_samples

    def compute_loss(*args, **kwargs):
        now[0] += 1.0
        return loss(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        now[0] += 0.5
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "get_batch_samples", get_batch_samples)
    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    trainer.train()
    found = history(trainer, "step", "data_time_ratio", "samples_per_second")
    expected = [[step, 0.5 / 2.5, 2 * 4 / 2.5] for step in (2, 4, 6, 8)]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    ("steps", "given", "logged"),
    [
        (4, None, [1, 2, 3, 4]),
        (32, None, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 32]),
        (4, 25, [4]),
        (4, 0.5, [2, 4]),
    ],
)
def test_short_runs_are_logged_by_default(tmp_path, student, steps, given, logged):
    trainer = make_trainer(tmp_path, None, student, preset="ce", max_steps=steps, logging_steps=given)
    assert trainer.args.logging_steps == (given or 25)
    trainer.train()
    assert history(trainer, "step").flatten().tolist() == logged


@pytest.mark.parametrize(
    ("values", "greater", "since"),
    [([3.0], False, 0), ([3.0, 2.0, 2.5, 2.0], False, 2), ([1.0, 4.0, 4.0, 2.0], True, 2), ([5.0, 1.0], True, 1)],
)
def test_evaluations_since_the_best(values, greater, since):
    assert evaluations_since_best(values, greater) == since


def stopping(output_dir, teacher, student, evaluation=None, **changes):
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=30)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="loss", early_stopping_patience=3)
    options |= dict(predict_with_generate=False, preset="ce", save_total_limit=None)
    # of random labels: what fits the training set is soon worse there
    evaluation = evaluation or Clips(student.config, seed=2)
    return make_trainer(output_dir, None, student, evaluation, **(options | changes))


def test_a_run_that_gets_no_better_stops_and_so_does_a_resumed_one(tmp_path, teacher, student):
    trainer = stopping(tmp_path / "a", teacher, student)
    trainer.train()
    stopped = trainer.state.global_step
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = losses.index(min(losses)) + 1
    assert stopped == best + 3 < 30
    assert trainer.state.best_global_step == best
    resumed = stopping(tmp_path / "a", teacher, student)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stopped - 1}"))
    assert resumed.state.global_step == stopped


def test_a_finished_run_is_not_said_to_be_stopped_early(tmp_path, student, caplog):
    """Its patience is lost at its last step."""
    whole = stopping(tmp_path / "whole", None, student, lr_scheduler_type="constant")
    whole.train()
    steps = whole.state.global_step
    for resume in (None, True):
        run = stopping(tmp_path / "run", None, student, lr_scheduler_type="constant", max_steps=steps)
        caplog.clear()
        run.train(resume_from_checkpoint=resume)
        assert has_lost_patience(run.args, run.state) and run.state.global_step == steps < 30
        assert "early" not in caplog.text


def test_a_run_that_was_stopped_early_stays_so_unless_it_gets_more_patience(tmp_path, student):
    def resume(**changes):
        trainer = stopping(tmp_path / "a", None, student, **changes)
        trainer.train(resume_from_checkpoint=True)
        return trainer

    def weights(trainer):
        return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])

    first = stopping(tmp_path / "a", None, student)
    first.train()
    stopped = first.state.global_step
    for _ in range(2):
        again = resume()
        assert again.state.global_step == stopped < 30
        assert torch.equal(weights(again), weights(first))  # those of the best checkpoint
    patient = stopping(tmp_path / "b", None, student, early_stopping_patience=5)
    patient.train()
    assert stopped < patient.state.global_step == resume(early_stopping_patience=5).state.global_step


def test_the_evaluation_before_the_first_step_is_not_a_best_one(tmp_path, student):
    """Trainer doesn't choose it either. This run would have stopped at step 2, as its loss only gets worse."""
    runs = [
        stopping(
            tmp_path / str(on_start),
            None,
            student,
            eval_on_start=on_start,
            early_stopping_patience=2,
            learning_rate=0.5,
        )
        for on_start in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    plain, started = runs
    assert started.state.log_history[0]["step"] == 0 and "eval_loss" in started.state.log_history[0]
    assert started.state.global_step == plain.state.global_step
    assert started.state.best_global_step == plain.state.best_global_step


def test_it_is_said_once_that_a_run_stops_early(tmp_path, student, caplog):
    splits = {name: Clips(student.config, 4, seed=seed) for seed, name in enumerate("abc")}
    trainer = stopping(tmp_path, None, student, metric_for_best_model="a_loss", evaluation=splits)
    trainer.train()
    assert trainer.state.global_step < 30
    assert caplog.text.count("stopping, as a_loss has not improved in 3 evaluations") == 1


def test_patience_needs_a_best_model(tmp_path):
    for changes, message in (
        (dict(load_best_model_at_end=False), "--early_stopping_patience requires --load_best_model_at_end"),
        (dict(early_stopping_patience=0), "--early_stopping_patience must be at least 1, got 0"),
    ):
        options = dict(early_stopping_patience=2, load_best_model_at_end=True, use_cpu=True)
        with pytest.raises(UserError, match=message):
            ASKDConfig(output_dir=str(tmp_path), **(options | changes))


def out_of_memory_above(trainer, clips: int) -> list[int]:
    """Make batches of more than `clips` too large; the sizes that were tried, as a list that grows."""
    loss, sizes = trainer.compute_loss, []

    def limited(model, inputs, *args, **kwargs):
        sizes.append(len(inputs["labels"]))
        if len(inputs["labels"]) > clips:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = limited
    return sizes


def test_out_of_memory_says_what_to_turn_down(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student)
    out_of_memory_above(trainer, 2)
    with pytest.raises(UserError, match=r"out of memory with a batch size of 4\. Halve.*auto_find_batch_size"):
        trainer.train()


def test_a_batch_size_that_fits_is_found(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, auto_find_batch_size=True, max_steps=6)
    sizes = out_of_memory_above(trainer, 2)
    trainer.train()
    assert trainer.state.global_step == 6
    assert sizes[0] == 4 and set(sizes[-6:]) <= {1, 2}
    assert trainer.blend.state.options["total_steps"] == 6
    assert torch.isfinite(history(trainer, "loss")).all()
