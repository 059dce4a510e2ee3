"""Clips without speech in training: their labels alone are learnt, whatever the teacher makes up there."""

import pytest
import torch
from training import collate, history, make_trainer

from askd_hf.objective import distillation_loss

WITHOUT_SPEECH = ("clip-1", "clip-2")


def with_flags(names: tuple[str, ...]):
    """`collate`, which says of the clips so named that there is no speech in them."""
    return lambda rows: collate(rows) | {"no_speech": torch.tensor([row["clip"] in names for row in rows])}


def train(output_dir, teacher, student, collator, **changes):
    """Four steps on the same four clips; the teacher's weight stays as it is."""
    options = dict(
        max_steps=4, teacher_phase_ratio=1.0, teacher_schedule="constant", self_weight=0.0, max_grad_norm=0.0
    )
    trainer = make_trainer(output_dir, teacher, student, **(options | changes))
    trainer.train_dataset.rows = trainer.train_dataset.rows[:4]
    trainer.data_collator = collator
    trainer.train()
    return trainer


@pytest.mark.parametrize("weight_teacher_by_label_prob", [False, True])
def test_where_no_clip_has_speech_the_teacher_changes_nothing(
    tmp_path, teacher, student, weight_teacher_by_label_prob
):
    options = dict(teacher_weight=1.0, weight_teacher_by_label_prob=weight_teacher_by_label_prob)
    nowhere = with_flags(tuple(f"clip-{i}" for i in range(4)))
    taught = train(tmp_path / "a", teacher, student, nowhere, **options)
    alone = train(tmp_path / "b", None, student, collate, preset="ce", teacher_weight=0.0, teacher_phase_ratio=0.0)
    assert torch.equal(history(taught, "loss", "grad_norm"), history(alone, "loss", "grad_norm"))
    for name, weight in taught.model.state_dict().items():
        assert torch.equal(weight, alone.model.state_dict()[name]), name
    # with speech it would
    speech = train(tmp_path / "c", teacher, student, with_flags(()), **options)
    assert (history(speech, "loss") - history(alone, "loss")).abs().min() > 1e-3


def test_in_a_mixed_batch_the_teacher_counts_on_the_clips_with_speech(tmp_path, teacher, student):
    trainer = train(tmp_path, teacher, student, with_flags(WITHOUT_SPEECH), max_steps=1, teacher_weight=0.8)
    totals = []
    for row in trainer.train_dataset:
        labels = row["labels"]
        inputs = {"input_features": row["input_features"][None], "labels": labels[None]}
        with torch.no_grad():
            logits, teacher_logits = student.eval()(**inputs).logits[0], teacher(**inputs).logits[0]
        weight = 0.0 if row["clip"] in WITHOUT_SPEECH else 0.8
        totals.append(
            distillation_loss(logits, labels, teacher=teacher_logits, teacher_weight=weight, temperature=2.0).total
        )
    assert history(trainer, "loss").item() == pytest.approx(torch.cat(totals).mean().item(), rel=1e-5)
