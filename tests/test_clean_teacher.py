"""The student's clips are augmented, and the teacher's targets are those of the clean clips: live and cached."""

import copy
import re

import pytest
import torch
from scripts import run_here
from soft_labels import label, speech
from speech import write_speech
from test_caches import ALL_BUT_ONE, TOLERANCE, arguments, make_trainer, steps
from training import history
from transformers import WhisperFeatureExtractor

from askd_hf.arguments.augment import AugmentArguments
from askd_hf.data import SpeechCollator
from askd_hf.data.audio import decode_audio
from askd_hf.data.augment import Augmenter
from askd_hf.errors import UserError
from askd_hf.models.student import init_student
from askd_hf.trainer import ASKDTrainer
from askd_hf.training.checks import check_speed


def augmenter(*effects: str, **changes) -> Augmenter:
    options = AugmentArguments(augmentations=list(effects), augment_probability=1.0, **changes)
    return Augmenter(options, 16_000)


@pytest.fixture
def clips(tmp_path):
    return speech(write_speech(tmp_path / "speech", 8))


def features(processor, waves) -> torch.Tensor:
    """Whisper's own features."""
    return processor.feature_extractor(waves, sampling_rate=16_000, return_tensors="pt").input_features


def noisy_collator(processor, model, effects=("noise",), **changes) -> SpeechCollator:
    options = dict(teacher_extractor=processor.feature_extractor, augmenter=augmenter(*effects)) | changes
    return SpeechCollator(processor, model.config, **options)


def seeded(clips) -> list[dict]:
    return [row | {"rng_key": (3, 0, number)} for number, row in enumerate(clips)]


@pytest.mark.parametrize("own_extractor", [False, True])
def test_teacher_and_student_take_other_features(processor, student, clips, own_extractor):
    """Bit for bit. In evaluation both are clean."""
    theirs = WhisperFeatureExtractor(feature_size=6, chunk_length=1) if own_extractor else processor.feature_extractor
    collator = noisy_collator(processor, student, ("speed", "reverb", "noise"), teacher_extractor=theirs)
    waves = [decode_audio(row["audio"]) for row in clips]
    noisy = [collator.augmenter(wave, (3, 0, number))[0] for number, wave in enumerate(waves)]
    batch = collator(seeded(clips))
    of_teacher = theirs(waves, sampling_rate=16_000, return_tensors="pt").input_features
    assert torch.equal(batch["teacher_input_features"], of_teacher)
    assert torch.equal(batch["input_features"], features(processor, noisy))
    assert not torch.equal(batch["input_features"], features(processor, waves))
    in_evaluation = collator(list(clips))
    assert torch.equal(in_evaluation["input_features"], features(processor, waves))
    assert ("teacher_input_features" in in_evaluation) == own_extractor


def test_the_teacher_takes_the_augmented_clips_if_asked(processor, student, clips):
    augment = augmenter("noise", augment_teacher=True)
    collator = noisy_collator(processor, student, augmenter=augment)
    batch = collator(seeded(clips))
    assert torch.equal(batch["teacher_input_features"], batch["input_features"])
    assert collator.changes_targets and not noisy_collator(processor, student).changes_targets


def test_a_teacher_with_the_students_encoder_runs_it_on_the_clean_clips(tmp_path, processor, teacher, clips):
    """In training. In evaluation it takes the outputs of the student's encoder."""
    student = init_student(teacher)
    collator = noisy_collator(processor, student)
    trainer = make_trainer(
        tmp_path, student, clips, collator, teacher, clips, max_steps=2, eval_teacher_losses=True,
        teacher_phase_ratio=1.0, per_device_train_batch_size=8, predict_with_generate=False,
    )  # fmt: skip
    taken = {"teacher": [], "student": []}
    for name, model in (("teacher", trainer.teacher), ("student", trainer.model)):
        model.model.encoder.register_forward_pre_hook(lambda _, args, name=name: taken[name].append(args[0].clone()))
    trainer.train()
    clean = features(processor, [decode_audio(row["audio"]) for row in clips])

    def sums(batch: torch.Tensor) -> list[float]:
        return sorted(batch.sum((1, 2)).tolist())

    # the student's encoder takes a batch in parts
    of_teacher, of_student = (torch.cat(taken[name]).split(8) for name in taken)
    assert len(of_teacher) == len(of_student) == 2
    for batch in of_teacher:
        assert sums(batch) == sums(clean)
    for batch in of_student:
        assert not set(sums(batch)) & set(sums(clean))
    trainer.evaluate()
    assert sum(map(len, taken["teacher"])) == 16
    assert sums(torch.cat(taken["student"])[16:]) == sums(clean)


@pytest.mark.parametrize("same_encoder", [True, False])
def test_cached_labels_train_as_the_live_teacher(tmp_path, processor, teacher, student, clips, same_encoder):
    student = init_student(teacher) if same_encoder else student
    collator = noisy_collator(processor, student, ("speed", "noise", "codec"))
    labeled = label(tmp_path / "cache", clips, collator, teacher, top_k=ALL_BUT_ONE)
    live = make_trainer(tmp_path, student, clips, collator, teacher)
    cached = make_trainer(tmp_path, student, labeled, collator)
    plain = make_trainer(tmp_path, student, labeled, SpeechCollator(processor, student.config))
    for trainer in (live, cached, plain):
        trainer.train()
    live, cached, plain = (steps(trainer.state.log_history) for trainer in (live, cached, plain))
    torch.testing.assert_close(cached, live, **TOLERANCE)
    assert len(live["teacher_loss"]) == 6
    assert not torch.allclose(plain["ce_loss"], live["ce_loss"], **TOLERANCE)


def test_a_resumed_run_is_the_same_run_and_other_options_are_refused(tmp_path, processor, teacher, student, clips):
    def trainer(directory: str, augment: Augmenter) -> ASKDTrainer:
        collator = noisy_collator(processor, student, augmenter=augment)
        changes = dict(save_strategy="steps", save_steps=3, max_steps=5, per_device_train_batch_size=4)
        return make_trainer(tmp_path / directory, student, clips, collator, teacher, **changes)

    whole, resumed = (trainer(name, augmenter("noise")) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(history(whole, "loss", "ce_loss"), history(resumed, "loss", "ce_loss"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for changes, message in (
        (dict(augment_teacher=True), "augment_teacher False -> True"),
        (dict(snr_db=[0.0, 30.0]), r"snr_db \[5.0, 30.0\] -> \[0.0, 30.0\]"),
    ):
        with pytest.raises(UserError, match=message):
            trainer("other", augmenter("noise", **changes)).train(
                resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
            )


# ---- what is refused ----


def test_a_live_teacher_without_clean_features_is_refused(tmp_path, processor, teacher, student, clips):
    collator = noisy_collator(processor, student, teacher_extractor=None)
    with pytest.raises(UserError, match=r"no features for the teacher.*teacher_extractor=processor\.feature_ext"):
        make_trainer(tmp_path, student, clips, collator, teacher)
    make_trainer(tmp_path, student, clips, collator, preset="ce", teacher_weight=None, teacher_phase_ratio=None)


def test_cached_labels_of_a_teacher_that_would_take_augmented_clips_are_refused(
    tmp_path, processor, teacher, student, clips
):
    collator = noisy_collator(processor, student, augmenter=augmenter("noise", augment_teacher=True))
    labeled = label(tmp_path / "cache", clips, collator, teacher)
    with pytest.raises(UserError, match="cached labels are of the unchanged clips: --augment_teacher"):
        make_trainer(tmp_path, student, labeled, collator)


def test_times_of_clips_of_another_speed_are_not_compared(tmp_path, processor, deep_teacher, compressed, clips):
    collator = noisy_collator(processor, compressed, ("speed",))
    with pytest.raises(UserError, match=r"speed moves the frames .*--hidden_weight 0 or --augment_teacher True"):
        make_trainer(tmp_path, compressed, clips, collator, deep_teacher)
    trainer = make_trainer(tmp_path, compressed, clips, collator, deep_teacher, hidden_weight=0.0)
    speed, teacher_too = (AugmentArguments(augmentations=["speed"], augment_teacher=too) for too in (False, True))
    with pytest.raises(UserError, match="speed moves the timestamps of --timestamp_probability"):
        check_speed(speed, 0.5, trainer.args, False)
    check_speed(teacher_too, 0.5, trainer.args, True)
    check_speed(AugmentArguments(augmentations=["noise"]), 0.5, trainer.args, True)


def test_the_hidden_states_of_noisy_clips_are_drawn_to_those_of_the_clean_ones(
    tmp_path, processor, deep_teacher, compressed, clips
):
    options = dict(max_steps=1, per_device_train_batch_size=8, hidden_weight=1.0, teacher_phase_ratio=1.0)
    trainer = make_trainer(tmp_path, compressed, clips, noisy_collator(processor, compressed), deep_teacher, **options)
    with torch.no_grad():
        waves = [decode_audio(row["audio"]) for row in clips]
        noisy = [trainer.data_collator.augmenter(w, (3, 0, row))[0] for row, w in enumerate(waves)]
        encoders = compressed.model.encoder, deep_teacher.model.encoder
        ours, theirs = (
            encoder(features(processor, audio), output_hidden_states=True).hidden_states
            for encoder, audio in zip(encoders, (noisy, waves), strict=True)
        )
        pairs = trainer.runner.layer_pairs
        errors = [(ours[a] - theirs[b]).pow(2).mean((1, 2)) for a, b in zip(pairs.student, pairs.teacher, strict=True)]
        scales = [theirs[b].pow(2).mean((1, 2)) for b in pairs.teacher]
    trainer.train()
    tokens = torch.tensor([len(trainer.data_collator.label_ids(row)) for row in clips]).float()
    by_clip = torch.stack([e / s for e, s in zip(errors, scales, strict=True)]).mean(0)
    expected = (by_clip * tokens).sum() / tokens.sum()
    assert history(trainer, "hidden_loss")[0].item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            dict(augmentations="noise", encoder_cache_dir="x"),
            "Leave out --encoder_cache_dir; --teacher_cache_dir still caches the teacher's labels",
        ),
        (dict(augmentations="noise", augment_teacher=True, teacher_cache_dir="x"), "--augment_teacher True is not"),
        (dict(spec_augment=True, encoder_cache_dir="x"), "--spec_augment True is not supported with --encoder_cache"),
    ],
)
def test_caches_that_cannot_be_used_are_refused(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, more, message):
    more = {name: tmp_path / value if value == "x" else value for name, value in more.items()}
    given = arguments(tmp_path / "run", speech_dir, teacher=teacher_dir, **more)
    status, _, err = run_here(monkeypatch, capsys, *given)
    assert status == 2 and re.search(rf"^error: .*{re.escape(message)}", err, re.MULTILINE), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cached", [False, True])
def test_the_command_trains_on_noise_with_a_clean_teacher(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, cached
):
    more = dict(teacher=teacher_dir, augmentations="noise", max_steps=3, eval_splits="validation")
    more |= dict(teacher_cache_dir=tmp_path / "labels", teacher_top_k=ALL_BUT_ONE) if cached else {}
    made = []
    of_trainer = ASKDTrainer.__init__

    def noted(self, *args, **kwargs):
        of_trainer(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ASKDTrainer, "__init__", noted)
    status, _, err = run_here(monkeypatch, capsys, *arguments(tmp_path / "run", speech_dir, **more))
    assert status == 0, err
    (trainer,) = made
    assert trainer.data_collator.keeps_teacher_clean
    assert (trainer.data_collator.teacher_extractor is None) == cached
    row = copy.deepcopy(trainer.train_dataset[0]) | {"rng_key": (0, 0, 0)}
    batch = trainer.data_collator([row])
    if cached:
        assert "teacher_token_ids" in batch and "teacher_input_features" not in batch
    else:
        clean = features(trainer.processing_class, [decode_audio(row["audio"])])
        assert torch.equal(batch["teacher_input_features"], clean)
