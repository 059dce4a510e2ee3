"""Clips without speech in training: their labels alone are learnt, whatever the teacher makes up there."""

import copy

import pytest
import torch
from conftest import collate, history, make_trainer

from askd_hf.objective import blend

NO_SPEECH = torch.tensor([False, True, True, False])


def batches(no_speech: torch.Tensor | None):
    def with_flags(rows: list[dict]) -> dict:
        batch = collate(rows)
        return batch if no_speech is None else batch | {"no_speech": no_speech}

    return with_flags


def train(output_dir, teacher, student, no_speech, **changes):
    """Four steps on the same four clips; the teacher's weight stays as it is."""
    options = dict(max_steps=4, teacher_phase=1.0, teacher_schedule="constant", self_weight=0.0, max_grad_norm=0.0)
    trainer = make_trainer(output_dir, teacher, student, **(options | changes))
    trainer.train_dataset.rows = trainer.train_dataset.rows[:4]
    trainer.data_collator = batches(no_speech)
    trainer.train()
    return trainer


@pytest.mark.parametrize("trust_label", [False, True])
def test_where_no_clip_has_speech_the_teacher_changes_nothing(tmp_path, teacher, student, trust_label):
    options = dict(teacher_weight=1.0, trust_label=trust_label)
    taught = train(tmp_path / "a", teacher, student, torch.ones(4, dtype=torch.bool), **options)
    alone = train(tmp_path / "b", None, student, None, preset="ce", teacher_weight=0.0, teacher_phase=0.0)
    assert torch.equal(history(taught, "loss", "grad_norm"), history(alone, "loss", "grad_norm"))
    for name, weight in taught.model.state_dict().items():
        assert torch.equal(weight, alone.model.state_dict()[name]), name
    # with speech it would
    speech = train(tmp_path / "c", teacher, student, torch.zeros(4, dtype=torch.bool), **options)
    assert (history(speech, "loss") - history(alone, "loss")).abs().min() > 1e-3


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_in_a_mixed_batch_the_teacher_counts_on_the_clips_with_speech(tmp_path, teacher, student, freeze_encoder):
    trainer = train(tmp_path, teacher, student, None, max_steps=1, teacher_weight=0.8, freeze_encoder=freeze_encoder)
    batch = collate(trainer.train_dataset.rows)
    inputs = {name: batch[name] for name in ("input_features", "labels")}
    trainer.model.load_state_dict(student.state_dict())
    trainer.model.eval()
    flagged = copy.copy(inputs) | {"no_speech": NO_SPEECH}
    weights = trainer.blend.weights._replace(teacher=0.8, self=0.0)
    total, terms, _ = trainer._run_models(trainer.model, flagged, weights)
    with torch.no_grad():
        teacher_logits, student_logits = teacher(**inputs).logits, student.eval()(**inputs).logits
    by_clip = []
    for clip, no_speech in enumerate(NO_SPEECH):
        real = inputs["labels"][clip] != -100
        by_clip.append(
            blend(
                student_logits[clip][real],
                inputs["labels"][clip][real],
                teacher=teacher_logits[clip][real],
                teacher_weight=0.0 if no_speech else 0.8,
                temperature=2.0,
            ).total
        )
    torch.testing.assert_close(terms.total, torch.cat(by_clip), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total.detach(), torch.cat(by_clip).sum(), rtol=1e-4, atol=1e-4)
