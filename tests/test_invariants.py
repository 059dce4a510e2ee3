"""What the trainer's numbers may not depend on, as trajectories of loss and gradient norm over several updates."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import Clips, collate, history, launch_two, make_trainer, options
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from askd_hf.training.checkpoint_lookup import checkpoints


def collate_without_names(rows):
    batch = collate(rows)
    del batch["clip"]
    return batch


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_without_soft_targets_it_is_seq2seq_trainer(tmp_path, teacher, student, freeze_encoder):
    ours = make_trainer(tmp_path, teacher, student, preset="ce", freeze_encoder=freeze_encoder)
    ours.train()
    plain = copy.deepcopy(student)
    if freeze_encoder:
        plain.model.encoder.requires_grad_(False)
    theirs = Seq2SeqTrainer(
        model=plain,
        args=Seq2SeqTrainingArguments(**options(tmp_path, remove_unused_columns=False)),
        train_dataset=Clips(student.config),
        data_collator=collate_without_names,
    )
    theirs.train()
    torch.testing.assert_close(
        history(ours, "loss", "grad_norm"), history(theirs, "loss", "grad_norm"), rtol=2e-5, atol=1e-6
    )
    for (name, a), (_, b) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


NAMES = ["loss", "grad_norm", "ce_loss", "teacher_weight", "self_weight"]


@pytest.mark.parametrize("preset", ["askd", "ce", "ps-kd"])
def test_accumulation_does_not_change_the_trajectory(tmp_path, teacher, student, preset):
    runs = []
    for size in (8, 2, 1):
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        runs.append(make_trainer(tmp_path, teacher, student, preset=preset, **sizes))
        runs[-1].train()
    for other in runs[1:]:
        torch.testing.assert_close(history(other, *NAMES), history(runs[0], *NAMES), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", ["askd", "ps-kd"])
def test_padding_changes_nothing(tmp_path, teacher, student, preset):
    """Labels padded to the longest of the batch, and to three times that: the same loss and the same gradients."""
    trainer = make_trainer(tmp_path, teacher, student, preset=preset, max_steps=2)
    trainer.train()  # so that there is a self-teacher
    batch = collate(Clips(student.config, clips=6, seed=4).rows)
    labels = batch["labels"]
    more = torch.full((len(labels), 2 * labels.shape[1]), -100)
    results = []
    for padded in (labels, torch.cat([labels, more], dim=1)):
        trainer.model.zero_grad()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, {"input_features": batch["input_features"], "labels": padded})
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(long, short, rtol=1e-5, atol=1e-7)


def two_process_run(tmp_path: Path, **changes) -> dict:
    """`distributed_run.py` with two CPU processes: its history and evaluation."""
    result = tmp_path / "result.json"
    done = launch_two(Path(__file__).with_name("distributed_run.py"), result, json.dumps(changes))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def test_two_processes_give_the_trajectory_of_one(tmp_path, teacher, student):
    changes = dict(preset="askd", teacher_schedule="adaptive", adaptive_window=2, clips=180)  # 9 are held out
    one = make_trainer(
        tmp_path, teacher, student, Clips(student.config, clips=7, seed=2), per_device_train_batch_size=8, **changes
    )
    one.train()
    two = two_process_run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **changes)
    torch.testing.assert_close(torch.tensor(two["history"]), history(one, *NAMES), rtol=1e-4, atol=1e-6)
    # 7 clips over two processes: the 8th, which evens them out, must not count
    metrics = one.evaluate()
    assert two["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_an_interrupt_of_one_process_stops_both_and_both_go_on_from_there(tmp_path, teacher, student):
    """In step with each other, each with random numbers of its own."""
    first = two_process_run(tmp_path, preset="askd", interrupt_second_process_at=4)
    second = json.loads((tmp_path / "result.second").read_text())
    for process in (first, second):
        assert (process["step"], process["stopped"]) == (5, True)
        assert process["equal"] and process["masked_then"] == process["masked"][5:]
    assert all(a != b for a, b in zip(first["masked"], second["masked"], strict=True))
    assert checkpoints(tmp_path)[-1].name == "checkpoint-5"
    # a process killed while it saved its random state, here a second long, leaves a checkpoint that isn't whole
    saved = [tmp_path / "checkpoint-5" / name for name in ("rng_state_1.pth", "trainer_state.json")]
    assert saved[0].stat().st_mtime_ns < saved[1].stat().st_mtime_ns
    saved[0].unlink()
    assert checkpoints(tmp_path) == []
