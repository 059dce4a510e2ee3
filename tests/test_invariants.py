"""What the trainer's numbers may not depend on, as trajectories of loss and gradient norm over several updates."""

import copy

import pytest
import torch
from training import NAMES, Clips, collate, history, make_trainer, options
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments


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


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="askd"),
        pytest.param(dict(preset="ce"), marks=pytest.mark.slow),
        pytest.param(dict(preset="ps-kd"), marks=pytest.mark.slow),
        dict(hidden_weight=2.0),
    ],
    ids=str,
)
def test_accumulation_does_not_change_the_trajectory(tmp_path, teacher, student, deep_teacher, compressed, options):
    runs, models = [], (deep_teacher, compressed) if "hidden_weight" in options else (teacher, student)
    for size in (8, 2, 1):
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        runs.append(make_trainer(tmp_path, *models, **options, **sizes))
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
