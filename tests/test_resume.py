"""A run resumed from any of its checkpoints ends with the weights of the run that was never interrupted."""

import copy
import dataclasses
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import make_processor, make_whisper
from safetensors.torch import load_file, save_file
from speech import write_speech
from torch.utils.data import DataLoader
from training import Clips, collate, history, make_trainer, options
from transformers import Trainer, TrainerCallback, TrainerState, WhisperForConditionalGeneration

from askd_hf import ASKDConfig, ASKDTrainer
from askd_hf.callbacks import data_epoch
from askd_hf.data import (
    SpeechCollator,
    SpeechStream,
    load_speech_dataset,
    select_training_columns,
    to_iterable_dataset,
)
from askd_hf.errors import UserError
from askd_hf.models.lora import LoraArguments, with_lora
from askd_hf.models.student import init_student
from askd_hf.training.checkpoint_lookup import checkpoint_to_resume, checkpoints
from askd_hf.training.run_callbacks import StopGracefullyCallback, updates_between_exchanges
from askd_hf.training.run_settings import check_options, config_settings, is_harmless

STEPS = 10  # 4 steps an epoch

HIDDEN_STATES = "hidden states of a compressed encoder"
SLOW = ("snapshot", "ps-kd")
RUNS = {
    "ema, order by a seed of its own": dict(preset="askd", data_seed=9),  # the self phase begins at step 6
    "snapshot": dict(preset="askd", self_teacher="snapshot"),
    "snapshot renewed at step 8": dict(preset="askd", self_teacher="snapshot", snapshot_strategy="epoch"),
    "ps-kd": dict(preset="ps-kd"),  # renewed at steps 4 and 8
    "adaptive": dict(preset="askd", teacher_schedule="adaptive", adaptive_window=2, clips=160),
    "accumulation, trained encoder": dict(
        preset="askd", per_device_train_batch_size=2, gradient_accumulation_steps=2, freeze_encoder=False
    ),
    HIDDEN_STATES: dict(preset="askd", hidden_weight=2.0),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RUNS])
def test_resuming_anywhere_is_bit_exact(tmp_path, teacher, student, deep_teacher, compressed, name):
    if name == HIDDEN_STATES:
        teacher, student = deep_teacher, compressed
    changes = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=None) | RUNS[name]
    student.config.apply_spec_augment, student.config.mask_time_prob, student.config.mask_time_length = True, 0.1, 4
    whole = make_trainer(tmp_path / "whole", teacher, student, **changes)
    whole.train()
    assert len(checkpoints(tmp_path / "whole")) == STEPS
    for step in (1, 6, 8):  # within an epoch, at the phases' border, at the end of an epoch and a renewal
        resumed = make_trainer(tmp_path / "resumed", teacher, student, **(changes | dict(save_strategy="no")))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), f"resumed at step {step}: {name}"
        names = ("loss", "ce_loss", "teacher_weight", "self_weight")
        assert torch.equal(history(whole, *names), history(resumed, *names)), f"resumed at step {step}"
        if whole.blend.self_teacher is not None:
            for name, tensor in whole.blend.self_teacher.parameters.items():
                assert torch.equal(tensor, resumed.blend.self_teacher.parameters[name]), f"step {step}: {name}"


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_resuming_with_clips_grouped_by_length_is_bit_exact(tmp_path, teacher, student, step):
    """Trainer's own sampler sees other clips after resuming in the middle of an epoch, as at 6."""
    rows = [row | {"label_tokens": len(row["labels"])} for row in Clips(student.config).rows]
    changes = dict(max_steps=STEPS, train_sampling_strategy="group_by_length")
    changes |= dict(save_strategy="steps", save_steps=2, save_total_limit=None)

    def grouped(directory):
        trainer = make_trainer(directory, teacher, student, **changes)
        trainer.train_dataset = Dataset.from_list(rows).with_format("torch")
        return trainer

    whole = grouped(tmp_path / "whole")
    whole.train()
    resumed = grouped(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert torch.equal(history(whole, "loss", "ce_loss"), history(resumed, "loss", "ce_loss"))
    # other orders in other epochs: each epoch has all the tokens, but not the same ones in its first step
    assert len({round(row["loss"], 6) for row in whole.state.log_history if "loss" in row}) == STEPS


def test_a_finished_run_whose_last_epoch_is_not_whole_is_not_trained_further(tmp_path, teacher, student):
    """Trainer's own loop trains a sixth step."""
    changes = dict(max_steps=5, save_strategy="steps", save_steps=5, lr_scheduler_type="constant")
    whole = make_trainer(tmp_path, teacher, student, **changes)
    whole.train()
    resumed = make_trainer(tmp_path, teacher, student, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.state.global_step == 5
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_teacher_is_not_even_touched_when_the_run_resumes_in_the_self_phase(tmp_path, teacher, student):
    changes = dict(max_steps=STEPS, save_strategy="steps", save_steps=8)
    make_trainer(tmp_path, teacher, student, **changes).train()
    resumed = make_trainer(tmp_path, teacher, student, **changes)
    calls = []
    resumed.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert calls == [] and resumed.teacher is None


def test_a_directory_with_another_run_is_refused_unless_resumed(tmp_path, teacher, student):
    assert checkpoint_to_resume(str(tmp_path), None) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path), "last")
    make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=4).train()
    with pytest.raises(UserError, match=r"already contains a run \(last checkpoint: checkpoint-8\).*--resume_from"):
        checkpoint_to_resume(str(tmp_path), None)
    for checkpoint in checkpoints(tmp_path):  # it would be overwritten all the same
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"already contains a run\. Give another --output_dir"):
        checkpoint_to_resume(str(tmp_path), None)
    with pytest.raises(UserError, match="no such directory"):
        checkpoint_to_resume(str(tmp_path), str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_first_and_the_run_goes_on_from_there(tmp_path, teacher, student, signum):
    whole = make_trainer(tmp_path / "whole", teacher, student, max_steps=STEPS)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", teacher, student, max_steps=STEPS, dataloader_num_workers=1)

    class Sent(TrainerCallback):
        """To all processes of the run, as a terminal and torchrun do."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                (worker,) = multiprocessing.active_children()
                # SIGTERM may come twice: from the scheduler of a cluster, and from the launcher
                for process in (worker.pid, os.getpid()) * (2 if signum == signal.SIGTERM else 1):
                    os.kill(process, signum)
                worker.join(0.2)
                assert worker.is_alive()

    stopped.add_callback(Sent())
    previous = signal.getsignal(signum)
    stopped.train()
    assert stopped.stop.stopped and stopped.state.global_step == 7
    assert signal.getsignal(signum) is previous
    last = checkpoint_to_resume(str(tmp_path / "stopped"), "last")
    assert last.endswith("checkpoint-7")
    resumed = make_trainer(tmp_path / "stopped", teacher, student, max_steps=STEPS)
    resumed.train(resume_from_checkpoint=last)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


class CtrlC(TrainerCallback):
    """In the update after `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_the_last_update_does_not_stop_the_run(tmp_path, student):
    trainer = make_trainer(tmp_path, None, student, preset="ce", max_steps=2)
    trainer.add_callback(CtrlC(1))
    trainer.train()
    assert not trainer.stop.stopped and trainer.state.global_step == 2


def test_after_ctrl_c_nothing_is_evaluated_and_the_weights_stay_those_of_the_checkpoint(tmp_path, student):
    changes = dict(preset="ce", self_weight=0.5, self_teacher="ema", average=True, max_steps=8, eval_strategy="epoch")
    changes |= dict(save_strategy="epoch", predict_with_generate=False)
    trainer = make_trainer(tmp_path, None, student, Clips(student.config, 4), **changes)
    trainer.add_callback(CtrlC(2))
    trainer.train()
    assert trainer.stop.stopped and not [row for row in trainer.state.log_history if "eval_loss" in row]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(saved[name], weight), name


def test_a_second_ctrl_c_stops_at_once_and_gives_the_signals_back(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student)

    class TwiceCtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    trainer.add_callback(TwiceCtrlC())
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is previous


def test_the_blend_state_is_plain_json(tmp_path, teacher, student):
    trainer = make_trainer(
        tmp_path, teacher, student, save_strategy="steps", save_steps=4, teacher_schedule="adaptive", clips=160
    )
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-4" / "blend_state.json").read_text())
    assert state["options"]["total_steps"] == 8 and 0 < state["labels_upheld"] < 1


# ---- as itself, or not at all ----


@pytest.fixture(scope="module")
def models():
    processor = make_processor()
    return make_whisper(processor).eval(), init_student(make_whisper(processor, seed=5), decoder_layers=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models):
    """A run of 8 steps in two epochs, of 16 clips, with checkpoints at 4 and 8."""
    directory = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(directory, *models, save_strategy="steps", save_steps=4, self_teacher="snapshot")
    trainer.train()
    return trainer


def resumed(whole, models, directory, **changes) -> ASKDTrainer:
    """The trainer of a run that went on from `whole` at step 4, with changed options."""
    trainer = make_trainer(directory, *models, **dict(self_teacher="snapshot") | changes)
    trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    return trainer


def old_and_new(**changes) -> list[str]:
    """What the message names of changed options, which had the values of `whole`."""
    weights = dict(teacher_weight=0.8, teacher_weight_end=0.0, teacher_phase_ratio=0.6)
    before = ASKDConfig(**options("nowhere", self_teacher="snapshot", self_weight=0.3, **weights))
    saved = before.to_dict()
    pairs = [(name, saved[name], value) for name, value in changes.items()]
    return [f"{name} {old} -> {new}" for name, old, new in pairs]


CHANGED = [
    dict(self_teacher="ema"),
    dict(temperature=1.0),
    dict(teacher_weight_end=0.1, self_weight=0.2),
    dict(divergence="reverse_kl"),
    dict(divergence="jensen_shannon", divergence_beta=0.3),
    dict(weight_teacher_by_label_prob=True),
    dict(self_teacher="ema", self_ema_decay=0.5),
    dict(snapshot_strategy="epoch"),
    dict(adaptive_window=3),
    dict(seed=9),
    dict(full_determinism=False, data_seed=9),
    dict(learning_rate=1e-3),
    dict(lr_scheduler_type="cosine"),
    dict(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}),
    dict(warmup_steps=2),
    dict(weight_decay=0.1),
    dict(optim="sgd"),
    dict(adam_beta2=0.98),
    dict(max_grad_norm=0.5),
    dict(train_sampling_strategy="sequential"),
    dict(dataloader_drop_last=True),
    dict(ignore_data_skip=True),
    dict(average_tokens_across_devices=False),
    dict(bf16=True),
]


@pytest.mark.parametrize("changes", CHANGED, ids=str)
def test_another_objective_or_order_is_refused_by_name(whole, models, tmp_path, changes):
    expected = old_and_new(**({"data_seed": 9} if "data_seed" in changes else changes))
    expected = [text.replace("data_seed None", "data_seed 3") for text in expected]  # by default it is the seed
    with pytest.raises(
        UserError, match=r"the settings of the checkpoint .* differ .*start a new run from its student with --student"
    ) as refused:
        resumed(whole, models, tmp_path, **changes)
    for text in expected:
        assert text in str(refused.value)
    with pytest.raises(
        UserError, match=r"the settings of the checkpoint .* differ"
    ):  # the script asks before it loads anything
        changes = dict(teacher_weight=0.8, teacher_phase_ratio=0.6, self_teacher="snapshot", self_weight=0.3) | changes
        check_options(ASKDConfig(**options(tmp_path, **changes)), f"{whole.args.output_dir}/checkpoint-4")


def test_a_machine_without_pinned_memory_may_resume(tmp_path):
    """`ASKDConfig` derives options of Accelerate from `dataloader_pin_memory`."""
    pinned, plain = (ASKDConfig(**options(tmp_path, dataloader_pin_memory=pinned)) for pinned in (True, False))
    assert pinned.accelerator_config != plain.accelerator_config
    assert config_settings(pinned) == config_settings(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(max_steps=20), "total_steps 8 -> 20"),
        (dict(max_steps=-1, num_train_epochs=5), "total_steps 8 -> 20"),
        (dict(per_device_train_batch_size=2), r"batch_size \(per_device_train_batch_size x .*\) 4 -> 2"),
        (dict(gradient_accumulation_steps=3), r"batch_size .* 4 -> 12"),
        (dict(gradient_accumulation_steps=3, auto_find_batch_size=True), r"batch_size .* 4 -> 12"),
        (dict(freeze_encoder=False), "freeze_encoder True -> False"),
        (dict(freeze_encoder=False, hidden_weight=2.0), "hidden_weight None -> 2.0"),
        (
            dict(seed=4, learning_rate=1.0, weight_teacher_by_label_prob=True),
            "data_seed 3 -> 4, learning_rate .*, seed .*, weight_teacher_by_label_prob",
        ),
    ],
    ids=str,
)
def test_another_length_batch_or_model_is_refused_by_name(whole, models, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        resumed(whole, models, tmp_path, **changes)


def test_other_models_are_refused(whole, models, tmp_path):
    teacher, student = models
    with pytest.raises(UserError, match=r"teacher \(weights or --teacher_dtype\) [0-9a-f]{32} -> "):
        resumed(whole, (make_whisper(make_processor(), seed=1), student), tmp_path)
    with pytest.raises(UserError, match=r"teacher .* -> "):
        resumed(whole, (copy.deepcopy(teacher).bfloat16(), student), tmp_path)
    with pytest.raises(UserError, match="decoder_layers 2 -> 3"):
        resumed(whole, (teacher, init_student(teacher, 3)), tmp_path)
    student = copy.deepcopy(student)
    student.config.dropout, student.config.apply_spec_augment, student.config.mask_time_prob = 0.1, True, 0.2
    with pytest.raises(UserError, match=r"apply_spec_augment False -> True, dropout 0.0 -> 0.1, .*mask_time_prob"):
        resumed(whole, (teacher, student), tmp_path)


def test_another_adapter_or_another_student_under_it_is_refused(models, tmp_path):
    def run(seed=5, **changes):
        base = init_student(make_whisper(make_processor(), seed=seed), decoder_layers=2)
        torch.manual_seed(0)
        adapted = with_lora(base, LoraArguments(**dict(lora_r=2) | changes), freeze_encoder=True)
        config = ASKDConfig(**options(tmp_path, preset="ce", save_strategy="steps", save_steps=4))
        return ASKDTrainer(adapted, config, train_dataset=Clips(base.config), data_collator=collate)

    run().train()
    for changes, message in (
        (dict(lora_alpha=9.0), "lora_alpha 4 -> 9.0"),
        (dict(lora_dropout=0.1), "lora_dropout None -> 0.1"),
        (dict(lora_r=3, lora_alpha=4), "lora_r 2 -> 3"),
        (dict(lora_target_modules=["q_proj"]), "lora_target_modules .* -> "),
        (dict(seed=6), "student .weights below the adapter. "),
    ):
        with pytest.raises(UserError, match=message):
            run(**changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def of_rows(directory, models, rows, **changes):
    trainer = make_trainer(directory, *models, **changes)
    trainer.train_dataset = Dataset.from_list(rows).with_format("torch")
    return trainer


def test_other_clips_are_refused_and_the_same_loaded_again_are_not(models, tmp_path):
    rows = Clips(models[1].config).rows
    run = of_rows(tmp_path, models, rows, save_strategy="steps", save_steps=4)
    run.train()
    checkpoint = str(tmp_path / "checkpoint-4")
    relabelled = [*rows[:-1], rows[-1] | {"labels": rows[-1]["labels"].flip(0)}]
    renamed = [rows[0] | {"clip": "another"}, *rows[1:]]
    for others in (rows[::-1], relabelled, renamed):
        with pytest.raises(UserError, match=r"clips_digest \(the clips.*\) [0-9a-f]{32} -> [0-9a-f]{32}\)"):
            of_rows(tmp_path, models, others).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(UserError, match=r"clips \(number of clips\) 16 -> 15"):
        of_rows(tmp_path, models, rows[1:]).train(resume_from_checkpoint=checkpoint)
    # of other files on the disk, and with other columns that nobody reads
    again = of_rows(tmp_path, models, [row | {"speaker": "x"} for row in rows])
    again.train_dataset = again.train_dataset.select(range(16))
    again.data_collator = lambda batch: collate([{k: v for k, v in row.items() if k != "speaker"} for row in batch])
    again.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(history(run, "loss"), history(again, "loss"))


def test_what_is_harmless_may_change(whole, models, tmp_path):
    again = resumed(
        *(whole, models, tmp_path),
        **dict(preset="askd", save_strategy="no", logging_strategy="steps", logging_first_step=True, report_to="none"),
        **dict(per_device_eval_batch_size=3, activation_checkpointing=True, dataloader_num_workers=1, max_steps=-1),
        **dict(num_train_epochs=2, data_seed=3),
    )
    assert torch.equal(history(again, "loss"), history(whole, "loss"))


def test_changed_intervals_hold_from_the_checkpoint_on(tmp_path, models):
    """Trainer takes those of the checkpoint."""

    def run(**every):
        changes = dict(preset="ce", eval_strategy="steps", save_strategy="steps", save_total_limit=None, max_steps=16)
        changes |= dict(predict_with_generate=False, logging_steps=8, eval_steps=8, save_steps=8) | every
        return make_trainer(tmp_path, None, models[1], Clips(models[1].config, 4, seed=5), **changes)

    run().train()
    shutil.rmtree(tmp_path / "checkpoint-16")
    again = run(logging_steps=4, eval_steps=2, save_steps=0.25)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    steps = {name: [row["step"] for row in again.state.log_history if name in row] for name in ("loss", "eval_loss")}
    assert steps == {"loss": [8, 12, 16], "eval_loss": [8, 10, 12, 14, 16]}
    assert [directory.name for directory in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (8, 12, 16)]


def test_the_same_updates_in_smaller_pieces_go_on(whole, models, tmp_path):
    again = resumed(whole, models, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(history(again, "loss"), history(whole, "loss"), rtol=1e-4, atol=1e-6)


def test_every_option_of_the_blend_is_compared():
    own = {field.name for field in dataclasses.fields(ASKDConfig)}
    own -= {field.name for field in dataclasses.fields(ASKDConfig.__base__)}
    assert {name for name in own if is_harmless(name)} == {
        *("preset", "early_stopping_patience", "eval_teacher_losses", "save_dtype"),
    }


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_word(whole, models, tmp_path, caplog):
    """It has the blend's options, the hidden-state loss's weight and the number of steps."""
    run = shutil.copytree(whole.args.output_dir, tmp_path / "run")
    file = run / "checkpoint-4" / "blend_state.json"
    state = json.loads(file.read_text())
    then = {name: state["options"][name] for name in ("total_steps", "temperature", "self_teacher", "hidden_weight")}
    file.write_text(json.dumps(state | {"options": then}))
    whole.args.output_dir, kept = str(run), whole.args.output_dir
    try:
        with pytest.raises(UserError, match=r"differ \(temperature 2\.0 -> 1\.0"):
            resumed(whole, models, tmp_path, temperature=1.0)
        shutil.rmtree(run / "checkpoint-8")
        again = resumed(whole, models, run, save_strategy="steps", save_steps=4)
    finally:
        whole.args.output_dir = kept
    assert "another version, without " in caplog.text and "weight_teacher_by_label_prob" in caplog.text
    assert torch.equal(history(again, "loss"), history(whole, "loss"))
    captured = json.loads((run / "checkpoint-8" / "blend_state.json").read_text())["options"]
    assert captured["weight_teacher_by_label_prob"] is False and captured["batch_size"] == 4


# ---- whole checkpoints ----


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = [
    *((name, action) for name in ("model.safetensors", "optimizer.pt", "scheduler.pt") for action in ("gone", "cut")),
    *((name, action) for name in ("rng_state.pth", "self_teacher.safetensors") for action in ("gone", "cut")),
    *((name, action) for name in ("blend_state.json", "trainer_state.json") for action in ("gone", "cut")),
    *(("trainer_state.json", "[]"), ("blend_state.json", "null"), ("blend_state.json", '{"unheard_of": 1}')),
    *(("optimizer.pt", ""), ("model.safetensors", "no tensors"), ("skipped_rows.json", "[1")),
]


@pytest.mark.parametrize(("name", "action"), DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_named_and_passed_over(whole, models, tmp_path, caplog, name, action):
    run = shutil.copytree(whole.args.output_dir, tmp_path / "run")
    file = run / "checkpoint-8" / name
    if action == "gone":
        file.unlink()
    elif action == "cut":
        cut(file)
    else:
        file.write_text(action)
    message = f"no {name}" if action == "gone" else f"{name} is damaged or truncated"
    with pytest.raises(UserError, match=message):
        checkpoint_to_resume(str(run), str(run / "checkpoint-8"))
    assert checkpoint_to_resume(str(run), "last") == str(run / "checkpoint-4")
    assert f"checkpoint-8 ({message})" in caplog.text
    assert checkpoints(run) == [run / "checkpoint-4"]
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(UserError, match=rf"no complete checkpoint to resume from: checkpoint-8 \({message}\)"):
        checkpoint_to_resume(str(run), "last")
    trainer = make_trainer(run, *models, self_teacher="snapshot")
    with pytest.raises(UserError, match=message):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-8"))


def test_nothing_goes_on_from_a_checkpoint_of_the_weights_alone(models, tmp_path):
    run = make_trainer(tmp_path, *models, save_only_model=True, save_strategy="steps", save_steps=4)
    run.train()
    message = r"no optimizer\.pt; no scheduler\.pt; no rng_state\.pth\. .*--student .*checkpoint-4.*--save_only_model"
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, *models).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(UserError, match=r"no complete checkpoint.*no optimizer\.pt.*--save_only_model"):
        make_trainer(tmp_path, *models).train(resume_from_checkpoint=True)


def test_the_files_of_all_processes_and_of_the_scaler_must_be_there(whole, tmp_path):
    checkpoint = shutil.copytree(f"{whole.args.output_dir}/checkpoint-8", tmp_path / "run" / "checkpoint-8")
    file = checkpoint / "blend_state.json"
    state = json.loads(file.read_text())
    state["options"] |= {"processes": 3, "fp16": True}
    file.write_text(json.dumps(state))
    for process in (0, 2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{process}.pth")
    with pytest.raises(UserError, match=r"run/checkpoint-8 can't be resumed: no scaler\.pt; no rng_state_1\.pth\."):
        checkpoint_to_resume(str(tmp_path / "run"), str(checkpoint))
    for name in ("rng_state_1.pth", "scaler.pt"):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / name)
    assert checkpoint_to_resume(str(tmp_path / "run"), "last") == str(checkpoint)


def test_the_last_checkpoint_is_that_with_the_most_steps(whole, tmp_path):
    for step in (8, 10):
        shutil.copytree(f"{whole.args.output_dir}/checkpoint-8", tmp_path / f"checkpoint-{step}")
    assert checkpoint_to_resume(str(tmp_path), "last") == str(tmp_path / "checkpoint-10")


def test_a_self_teacher_of_other_parameters_is_refused(whole, models, tmp_path):
    run = shutil.copytree(whole.args.output_dir, tmp_path / "run")
    file = run / "checkpoint-8" / "self_teacher.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(UserError, match="self-teacher of the checkpoint has other parameters"):
        make_trainer(run, *models, self_teacher="snapshot").train(resume_from_checkpoint=str(run / "checkpoint-8"))


@pytest.mark.parametrize("self_teacher", ["ema", "snapshot"])
def test_a_self_teacher_that_an_earlier_run_left_is_not_loaded(tmp_path, models, self_teacher):
    """That run was killed before its checkpoint was complete. Step 4 of the new run is in the teacher phase."""
    changes = dict(self_teacher=self_teacher, save_strategy="steps", save_steps=4, save_total_limit=None)
    whole = make_trainer(tmp_path, *models, teacher_phase_ratio=0.75, **changes)
    left = tmp_path / "checkpoint-4" / "self_teacher.safetensors"
    left.parent.mkdir()
    trained = {name: p for name, p in models[1].named_parameters() if not name.startswith("model.encoder")}
    wrong = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    save_file(wrong, left)
    whole.train()
    assert not left.exists()
    save_file(wrong, left)  # as an earlier version left it
    resumed = make_trainer(tmp_path, *models, teacher_phase_ratio=0.75, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(history(resumed, "loss"), history(whole, "loss"))


def test_a_checkpoint_that_is_saved_anew_in_vain_is_not_complete(tmp_path, models, monkeypatch):
    """Of a run that was resumed before it. Its files are of both."""
    changes = dict(max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=None)
    make_trainer(tmp_path, *models, **changes).train()
    resumed = make_trainer(tmp_path, *models, **changes)

    def fails(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(UserError, match=r"Complete in .*: checkpoint-2\. Free"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- steps, epochs, signals ----


def test_the_epoch_of_the_data_is_exact(tmp_path):
    """In an epoch of five million steps `state.epoch` is 0.9999998 in the last one."""
    args = SimpleNamespace(gradient_accumulation_steps=4)
    loader = DataLoader(range(20_000_000 - 3))
    epochs = [
        data_epoch(args, TrainerState(global_step=step, epoch=step / 5e6), loader)
        for step in (0, 4_999_999, 5_000_000, 9_999_999, 10_000_000)
    ]
    assert epochs == [0, 0, 1, 1, 2]
    args = SimpleNamespace(gradient_accumulation_steps=1)
    for batches in (3, 7, 49, 1_000_003):  # state.epoch is a sum of fractions
        loader, last = DataLoader(range(batches)), 5 * batches - 1
        state = TrainerState(global_step=last, epoch=math.nextafter(5.0, 6.0))
        assert data_epoch(args, state, loader) == 4


def test_the_snapshot_is_of_the_last_tenth_of_a_stream(tmp_path, student, processor):
    """The length of its epochs is unknown; `ps-kd`, the default of `askd-hf finetune`, needs them."""
    folder = write_speech(tmp_path / "train", clips=8)
    rows = select_training_columns(to_iterable_dataset(load_speech_dataset(str(folder), None, "train")))
    taken = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            taken.append(trainer.blend.state.snapshot_epoch)

    trainer = ASKDTrainer(
        model=student,
        args=ASKDConfig(**options(tmp_path / "run", max_steps=20, preset="ps-kd")),
        train_dataset=SpeechStream([rows]),
        data_collator=SpeechCollator(processor, student.config),
        callbacks=[Watch()],
    )
    trainer.train()
    assert taken[-1] == 9 and sorted(set(taken)) == list(range(10))


@pytest.mark.parametrize(("seconds", "updates"), [(math.inf, 1), (10.0, 1), (0.7, 2), (0.001, 8)])
def test_processes_on_gpus_exchange_a_signal_within_two_seconds(seconds, updates):
    assert updates_between_exchanges(seconds) == updates


def test_a_forked_worker_neither_prints_nor_stops_anything(tmp_path, models, capfd):
    """It inherits the handler, and the whole process group gets the signal."""
    trainer = make_trainer(tmp_path, *models)
    stop = StopGracefullyCallback()
    stop.on_train_begin(trainer.args, trainer.state, trainer.control)
    try:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.4,))
        worker.start()
        time.sleep(0.1)
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, signum)
        worker.join()
        assert worker.exitcode == 0 and not stop.requested and capfd.readouterr().out == ""
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and capfd.readouterr().out.count("stopping after this update") == 1
    finally:
        stop.restore()


def test_the_position_embeddings_of_a_loaded_encoder_stay_fixed(tmp_path, models):
    """They are Whisper's sinusoids; `from_pretrained` leaves them trainable."""
    teacher, student = copy.deepcopy(models)
    student.save_pretrained(tmp_path / "student")
    student = WhisperForConditionalGeneration.from_pretrained(tmp_path / "student")
    before = {name: weight.clone() for name, weight in student.model.encoder.named_parameters()}
    assert student.model.encoder.embed_positions.weight.requires_grad
    trainer = make_trainer(tmp_path, teacher, student, freeze_encoder=False)
    trainer.train()
    after = dict(trainer.model.model.encoder.named_parameters())
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == before.keys() - {"embed_positions.weight"}
