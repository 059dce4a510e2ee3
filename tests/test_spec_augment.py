"""SpecAugment writes into the student's features; a teacher hears the clip as it is, whatever way it gets it."""

import copy

import pytest
import torch
from models import make_whisper
from speech import write_speech
from training import Clips, make_trainer
from transformers import WhisperConfig

from askd_hf.data import Limits, SpeechCollator, filter_invalid_clips, load_speech_dataset
from askd_hf.data.soft_labels import teacher_settings
from askd_hf.data.teacher_cache import cache_teacher
from askd_hf.errors import UserError
from askd_hf.models.student import init_student

MASKS = dict(apply_spec_augment=True, mask_time_prob=0.5, mask_time_length=4)


def masking(model):
    for name, value in MASKS.items():
        setattr(model.config, name, value)
    return model


def heard_by(encoder) -> list[torch.Tensor]:
    """The features that it is given from now on, as they are then; SpecAugment sets some to 0."""
    features = []
    encoder.register_forward_pre_hook(lambda _, args: features.append(args[0].detach().clone()))
    return features


@pytest.fixture
def clips(tmp_path, processor, student):
    speech = load_speech_dataset(str(write_speech(tmp_path / "speech", clips=4)), None, "train")
    collator = SpeechCollator(processor, student.config)
    return filter_invalid_clips(speech, collator.label_ids, Limits(1.0), on_bad_audio="error")


@pytest.fixture
def clean(clips, processor, student):
    """The features of the four clips."""
    return SpeechCollator(processor, copy.deepcopy(student.config))(list(clips))["input_features"]


def test_a_student_with_masks_does_write_into_its_features(student, clean):
    """Otherwise nothing here would prove anything."""
    student = masking(student).train()
    features = clean.clone()
    student(input_features=features, decoder_input_ids=torch.zeros(4, 2, dtype=torch.long))
    assert (features == 0).sum() > 100 and (clean == 0).sum() == 0


@pytest.mark.parametrize("own_features", [False, True])
@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_in_training_the_teacher_hears_the_clips_of_the_collator(
    tmp_path, processor, teacher, clips, clean, own_features, freeze_encoder
):
    student = masking(init_student(teacher))
    options = dict(max_steps=3, teacher_phase_ratio=1.0, remove_unused_columns=False, freeze_encoder=freeze_encoder)
    trainer = make_trainer(tmp_path, masking(teacher), student, **options)
    trainer.train_dataset = clips
    own = processor.feature_extractor if own_features else None
    trainer.data_collator = SpeechCollator(processor, student.config, teacher_extractor=own)
    of_teacher, of_student = heard_by(trainer.teacher.model.encoder), heard_by(trainer.model.model.encoder)
    trainer.train()
    assert len(of_teacher) == 3 and len(of_student) == 3
    for features in of_teacher:
        torch.testing.assert_close(by_content(features), by_content(clean), rtol=0, atol=0)
    assert all((features == 0).sum() > 100 for features in of_student)


def test_what_is_written_into_the_students_features_does_not_reach_the_teachers(processor, student, clips, clean):
    collator = SpeechCollator(processor, student.config, teacher_extractor=copy.deepcopy(processor.feature_extractor))
    batch = collator(list(clips))
    batch["input_features"].zero_()
    assert torch.equal(batch["teacher_input_features"], clean)


def by_content(features: torch.Tensor) -> torch.Tensor:
    """The clips of a batch in an order that doesn't depend on the sampler's."""
    return torch.stack(sorted(features, key=lambda clip: clip.flatten().tolist()))


def test_the_self_teacher_hears_what_the_student_would_without_masks(tmp_path, student):
    trainer = make_trainer(tmp_path, None, masking(student), preset="ps-kd", max_steps=3, self_schedule="constant")
    trainer.model.config.update(MASKS)
    in_training, by_self = [], []
    trainer.model.model.encoder.register_forward_pre_hook(
        lambda module, args: (in_training if module.training else by_self).append((args[0] == 0).sum().item())
    )
    trainer.train()
    assert len(in_training) == 3 and min(in_training) > 0
    assert len(by_self) == 3 and max(by_self) == 0


def test_the_option_masks_in_training_and_the_saved_student_has_its_own_config(tmp_path, teacher):
    student = init_student(teacher)
    student.config.update({"mask_time_prob": 0.5, "mask_time_length": 4})
    assert not student.config.apply_spec_augment
    trainer = make_trainer(tmp_path, teacher, student, max_steps=3, spec_augment=True, preset="kd")
    of_teacher, of_student = heard_by(trainer.teacher.model.encoder), heard_by(trainer.model.model.encoder)
    trainer.train()
    assert len(of_student) == 3 and all((features == 0).sum() > 100 for features in of_student)
    assert len(of_teacher) == 3 and not any((features == 0).any() for features in of_teacher)
    trainer.save_model()
    saved = WhisperConfig.from_pretrained(tmp_path)
    assert (saved.apply_spec_augment, saved.mask_time_prob) == (False, 0.5)
    assert trainer.model.config.apply_spec_augment


def test_the_option_without_masks_is_refused(tmp_path, teacher):
    student = init_student(teacher)
    student.config.update({"mask_time_prob": 0.0, "mask_feature_prob": 0.0})
    with pytest.raises(
        UserError, match="--spec_augment True has no effect: mask_time_prob and mask_feature_prob are 0"
    ):
        make_trainer(tmp_path, teacher, student, spec_augment=True)


def test_in_evaluation_nobody_hears_masks(tmp_path, teacher, student):
    evaluation = Clips(student.config, clips=4, seed=2)
    trainer = make_trainer(
        tmp_path, masking(teacher), masking(student), evaluation, max_steps=2, eval_teacher_losses=True, preset="kd"
    )
    trainer.train()
    of_teacher, of_student = heard_by(trainer.teacher.model.encoder), heard_by(trainer.model.model.encoder)
    trainer.evaluate()
    expected = torch.stack([row["input_features"] for row in evaluation.rows])
    for heard in (of_teacher, of_student):
        assert torch.equal(torch.cat(heard), expected)


def test_labels_for_the_cache_are_of_clips_without_masks(tmp_path, processor, clips, clean):
    """Whatever the config of the teacher, or of the student that the collator knows, says."""
    teacher = masking(make_whisper(processor)).eval()
    heard = heard_by(teacher.model.encoder)
    collator = SpeechCollator(processor, teacher.config)
    settings = teacher_settings(teacher, "teacher", 4, 1.0, torch.float32)
    cache_teacher(lambda: teacher, settings, clips, collator, tmp_path / "labels", batch_size=4)
    assert torch.equal(torch.cat(heard), clean)
