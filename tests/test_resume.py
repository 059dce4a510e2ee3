"""A run resumed from any of its checkpoints ends with the weights of the run that was never interrupted."""

import json
import signal

import pytest
import torch
from conftest import Clips, history, make_trainer
from datasets import Dataset
from transformers import TrainerCallback

from askd_hf.errors import UserError
from askd_hf.run_dir import checkpoint_to_resume, checkpoints

STEPS = 10  # 4 steps an epoch

RUNS = {
    "ema": dict(preset="askd"),  # the self phase begins at step 6
    "snapshot": dict(preset="askd", self_teacher="snapshot"),
    "snapshot renewed at step 8": dict(preset="askd", self_teacher="snapshot", self_refresh="epoch"),
    "ps-kd": dict(preset="ps-kd"),  # renewed at steps 4 and 8
    "adaptive": dict(preset="askd", teacher_schedule="adaptive", adaptive_window=2, clips=160),
    "accumulation, trained encoder": dict(
        preset="askd", per_device_train_batch_size=2, gradient_accumulation_steps=2, freeze_encoder=False
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_resuming_anywhere_is_bit_exact(tmp_path, teacher, student, name):
    changes = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=None) | RUNS[name]
    student.config.apply_spec_augment, student.config.mask_time_prob, student.config.mask_time_length = True, 0.1, 4
    whole = make_trainer(tmp_path / "whole", teacher, student, **changes)
    whole.train()
    assert len(checkpoints(tmp_path / "whole")) == STEPS
    for step in range(1, STEPS):
        resumed = make_trainer(tmp_path / "resumed", teacher, student, **(changes | dict(save_strategy="no")))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), f"resumed at step {step}: {name}"
        names = ("loss", "blend_loss", "ce_loss", "teacher_weight", "self_weight")
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


def test_the_teacher_is_not_even_touched_when_the_run_resumes_in_the_self_phase(tmp_path, teacher, student):
    changes = dict(max_steps=STEPS, save_strategy="steps", save_steps=8)
    make_trainer(tmp_path, teacher, student, **changes).train()
    resumed = make_trainer(tmp_path, teacher, student, **changes)
    calls = []
    resumed.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert calls == [] and resumed.teacher is None


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path, teacher, student):
    make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=2, save_total_limit=None).train()
    newest, before = tmp_path / "checkpoint-8", tmp_path / "checkpoint-6"
    state = (newest / "trainer_state.json").read_text()
    (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    assert checkpoint_to_resume(str(tmp_path), "last") == str(before)
    (before / "trainer_state.json").unlink()
    assert checkpoint_to_resume(str(tmp_path), "last") == str(tmp_path / "checkpoint-4")


def test_a_directory_with_another_run_is_refused_unless_resumed(tmp_path, teacher, student):
    assert checkpoint_to_resume(str(tmp_path), None) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path), "last")
    make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=4).train()
    with pytest.raises(UserError, match=r"already holds a run \(last checkpoint: checkpoint-8\).*--resume_from"):
        checkpoint_to_resume(str(tmp_path), None)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint_to_resume(str(tmp_path), str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_of_a_run_of_another_length_is_refused(tmp_path, teacher, student):
    make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=4).train()
    longer = make_trainer(tmp_path, teacher, student, max_steps=20)
    with pytest.raises(UserError, match=r"total_steps 8 -> 20"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_plain_seq2seq_trainer_is_refused(tmp_path, teacher, student):
    make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=4).train()
    (tmp_path / "checkpoint-4" / "blend_state.json").unlink()
    trainer = make_trainer(tmp_path, teacher, student)
    with pytest.raises(UserError, match=r"no blend_state\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_ctrl_c_saves_first_and_the_run_goes_on_from_there(tmp_path, teacher, student):
    whole = make_trainer(tmp_path / "whole", teacher, student, max_steps=STEPS)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", teacher, student, max_steps=STEPS)

    class CtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                signal.raise_signal(signal.SIGINT)

    stopped.add_callback(CtrlC())
    previous = signal.getsignal(signal.SIGINT)
    stopped.train()
    assert stopped.stop.stopped and stopped.state.global_step == 7
    assert signal.getsignal(signal.SIGINT) is previous
    last = checkpoint_to_resume(str(tmp_path / "stopped"), "last")
    assert last.endswith("checkpoint-7")
    resumed = make_trainer(tmp_path / "stopped", teacher, student, max_steps=STEPS)
    resumed.train(resume_from_checkpoint=last)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


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
