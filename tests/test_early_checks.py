"""Mistakes in the options are found before the time is spent that finding them later would cost."""

import dataclasses

import pytest
from scripts import run_here
from training import Clips, collate, make_trainer, options

from askd_hf import ASKDConfig, ASKDTrainer, UserError
from askd_hf.commands import distill, dry_run  # noqa: F401  dry_run must not import what a test has patched
from askd_hf.config import FinetuningConfig


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--lora_r 2 --push_to_hub --hub_strategy every_save", "--hub_strategy must be end for an adapter"),
        ("--lora_r 2 --keep_adapter --student S --save_dtype float16", "--save_dtype must be float32 with --keep_ada"),
        (
            "--dataloader_persistent_workers --dataloader_num_workers 1 --augmentations gain",
            "--dataloader_persistent_",
        ),
        ("--dataloader_persistent_workers --dataloader_num_workers 1 --window_seconds 2-30", "--dataloader_persisten"),
        ("--push_to_hub", "log in with `hf auth login`"),
    ],
)
def test_no_model_is_loaded_for_options_that_do_not_fit(monkeypatch, capsys, tmp_path, speech_dir, more, message):
    monkeypatch.setattr(distill, "load_models", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    given = f"--teacher {tmp_path / 'none'} --dataset {speech_dir} --output_dir {tmp_path / 'run'} --use_cpu {more}"
    ended = run_here(monkeypatch, capsys, *given.split())
    assert ended.returncode == 2 and message in ended.stderr


def test_several_gpus_in_one_process_are_refused_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, speech_dir):
    """The recovery of an encoder would use `torch.nn.DataParallel`."""
    monkeypatch.setattr(distill, "load_models", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(ASKDConfig, "n_gpu", 2)
    ended = run_here(monkeypatch, capsys, "--teacher", tmp_path, "--dataset", speech_dir)
    assert ended.returncode == 2 and "several GPUs require one process each" in ended.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--lora_r 2 --lora_target_modules q_prj", "--lora_target_modules must be among"),
        ("--spec_augment", "--spec_augment True has no effect: mask_time_prob and mask_feature_prob are 0"),
    ],
)
def test_no_speech_is_loaded_for_options_that_do_not_fit_the_model(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, more, message
):
    monkeypatch.setattr(distill, "load_speech", lambda *_: pytest.fail("speech was loaded"))
    config = teacher_dir / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"mask_time_prob": 0.05', '"mask_time_prob": 0.0'))
    given = f"--teacher {teacher_dir} --dataset {speech_dir} --output_dir {tmp_path / 'run'} --use_cpu {more}"
    try:
        ended = run_here(monkeypatch, capsys, *given.split())
    finally:
        config.write_text(text)
    assert ended.returncode == 2 and message in ended.stderr


# ---- when to evaluate and save ----


@pytest.mark.parametrize(
    ("given", "evaluates", "saves"),
    [
        ({}, ("epoch", None), ("epoch", 500)),
        (dict(save_steps=500), ("epoch", None), ("steps", 500)),
        (dict(eval_steps=7), ("steps", 7), ("epoch", 500)),
        (dict(eval_steps=0.5, save_steps=0.5), ("steps", 0.5), ("steps", 0.5)),
        (dict(eval_steps=7, load_best_model_at_end=True), ("steps", 7), ("steps", 7)),
        (dict(save_steps=7, load_best_model_at_end=True), ("steps", 7), ("steps", 7)),
        (dict(load_best_model_at_end=True), ("epoch", None), ("epoch", 500)),
        (dict(save_strategy="steps"), ("epoch", None), ("steps", 500)),
        (dict(save_strategy="best"), ("epoch", None), ("best", 500)),
        (dict(save_strategy="no", eval_strategy="no"), ("no", None), ("no", 500)),
        (dict(save_strategy="no", save_steps=9), ("epoch", None), ("no", 9)),  # of a YAML file
    ],
    ids=str,
)
def test_a_number_of_steps_decides_when_to_evaluate_and_save(tmp_path, given, evaluates, saves):
    config = ASKDConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    for made in (config, dataclasses.replace(config)):
        assert (made.eval_strategy, made.eval_steps) == evaluates
        assert (made.save_strategy, made.save_steps) == saves


@pytest.mark.parametrize(("part", "strategy"), [("eval", "epoch"), ("save", "epoch"), ("save", "best")])
def test_a_number_of_steps_without_effect_is_refused(tmp_path, part, strategy):
    message = f"--{part}_steps 20 has no effect with --{part}_strategy {strategy}"
    with pytest.raises(UserError, match=message):
        ASKDConfig(output_dir=str(tmp_path), **{f"{part}_steps": 20, f"{part}_strategy": strategy})


def test_checkpoints_are_saved_after_as_many_steps_as_were_given(tmp_path, teacher, student):
    given = {name: value for name, value in options(tmp_path, max_steps=6).items() if name != "save_strategy"}
    ASKDTrainer(
        model=student,
        args=ASKDConfig(**given | dict(preset="ce", save_steps=3, save_total_limit=9)),
        train_dataset=Clips(student.config),
        data_collator=collate,
    ).train()
    assert sorted(file.name for file in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


# ---- the config of the caller ----


def test_a_trainer_leaves_the_config_of_its_caller_alone(tmp_path, teacher, student):
    """A second trainer of it, for another student, decides anew what depends on the student."""
    given = {name: value for name, value in options(tmp_path).items() if name != "eval_strategy"}
    config = ASKDConfig(**given)
    before = config.to_dict()
    make = dict(args=config, train_dataset=Clips(student.config), data_collator=collate, teacher_model=teacher)
    trainer = ASKDTrainer(model=student, **make)  # without an evaluation set, which the default strategy allows
    assert trainer.args.freeze_encoder is True and trainer.args.eval_strategy == "no"
    assert config.to_dict() == before and config.freeze_encoder is None


@pytest.mark.parametrize(
    "needs",
    [
        dict(save_strategy="best"),
        dict(load_best_model_at_end=True),
        dict(lr_scheduler_type="reduce_lr_on_plateau"),
        dict(eval_on_start=True),
    ],
    ids=str,
)
def test_options_that_need_evaluations_are_refused_without_a_set(tmp_path, teacher, student, needs):
    given = {name: value for name, value in options(tmp_path).items() if not name.endswith("_strategy")}
    with pytest.raises(UserError, match="--eval_dataset"):
        ASKDTrainer(
            model=student,
            args=ASKDConfig(**given | dict(preset="ce") | needs),
            train_dataset=Clips(student.config),
            data_collator=collate,
        )


@pytest.mark.parametrize(
    "given",
    [
        dict(teacher_weight=0.0),
        dict(teacher_weight=0.3, teacher_phase_ratio=1.0),
        dict(self_teacher="none"),
        dict(preset="ps-kd"),
        dict(save_steps=3, eval_steps=3, load_best_model_at_end=True),
    ],
    ids=str,
)
def test_a_config_may_be_made_of_another(tmp_path, given):
    config = ASKDConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    changed = dataclasses.replace(config, seed=3)
    assert changed.to_dict() == config.to_dict() | {"seed": 3}


@pytest.mark.parametrize("self_teacher", ["ema", "none"])
def test_finetuning_takes_another_self_teacher_than_that_of_its_preset(tmp_path, self_teacher):
    config = FinetuningConfig(output_dir=str(tmp_path), use_cpu=True, self_teacher=self_teacher)
    assert config.snapshot_strategy == "no" and bool(config.self_weight) == (self_teacher == "ema")


def test_finetuning_knows_the_former_names(tmp_path):
    with pytest.warns(FutureWarning, match=r"divergence_mix=\) is called divergence_beta= now"):
        config = FinetuningConfig(output_dir=str(tmp_path), divergence="skewed_kl", divergence_mix=0.1)
    assert config.divergence_beta == 0.1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_from_one_weight_to_the_same_is_refused(tmp_path, schedule):
    with pytest.raises(UserError, match=f"--teacher_schedule {schedule} has no effect.*smaller --teacher_weight_end"):
        ASKDConfig(output_dir=str(tmp_path), preset="kd", teacher_schedule=schedule)
    ASKDConfig(output_dir=str(tmp_path), preset="kd", teacher_schedule=schedule, teacher_weight_end=0.1)


# ---- memory ----


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_memory_that_an_evaluation_lacks_is_not_that_of_the_training_batch(tmp_path, teacher, student, method):
    clips = Clips(student.config, 4)
    trainer = make_trainer(tmp_path, teacher, student, clips, predict_with_generate=False)
    trainer.model.register_forward_pre_hook(_out_of_memory)
    with pytest.raises(UserError, match="out of memory in evaluation: lower --per_device_eval_batch_size"):
        getattr(trainer, method)(clips)


def test_memory_that_the_measurement_of_the_labels_lacks_is_told_apart(tmp_path, teacher, student):
    adaptive = dict(teacher_schedule="adaptive", adaptive_window=2, clips=180)
    trainer = make_trainer(tmp_path, teacher, student, **adaptive)
    trainer.model.register_forward_pre_hook(lambda model, _: None if model.training else _out_of_memory())
    with pytest.raises(UserError, match="out of memory while the labels of held-out clips are measured"):
        trainer.train()


def _out_of_memory(*_):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
