"""`--auto_find_batch_size`: after a batch that takes too much memory comes the same run with a smaller one."""

import signal

import pytest
import torch
from models import make_processor, make_whisper
from training import Clips, history, make_trainer

from askd_hf import ASKDTrainer, UserError
from askd_hf.errors import training_memory_message
from askd_hf.hub.training_summary import TrainingSummary
from askd_hf.models.student import init_student

TERMS = ("loss", "ce_loss", "grad_norm", "learning_rate", "teacher_weight", "self_weight")
EPOCHS = dict(num_train_epochs=3, max_steps=-1)


@pytest.fixture(scope="module")
def models():
    processor = make_processor()
    return make_whisper(processor).eval(), init_student(make_whisper(processor, seed=5), 2)


class Memory:
    """Makes training fail as on a GPU that has room for so many clips only, from some step on.

    Attributes:
        tried: the batch sizes, one an attempt.
        teachers: whether there was a teacher, one an attempt.
    """

    def __init__(self, trainer: ASKDTrainer, clips: int, from_step: int = 0, in_evaluation: bool = False):
        self.tried, self.teachers = [], []

        def run(model, args, kwargs):
            if model.training:
                if self.tried[-1:] != [trainer.state.train_batch_size]:
                    self.tried.append(trainer.state.train_batch_size)
                    self.teachers.append(trainer.teacher is not None)
                full = len(kwargs["decoder_input_ids"]) > clips and trainer.state.global_step >= from_step
            else:
                full = in_evaluation
            if full:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        trainer.model.register_forward_pre_hook(run, with_kwargs=True)


def run_of(output_dir, models, batch_size: int, auto: bool = True, **changes) -> ASKDTrainer:
    return make_trainer(
        output_dir, *models, per_device_train_batch_size=batch_size, auto_find_batch_size=auto, **EPOCHS | changes
    )


# with batches of 8: 6 steps, the teacher has a weight in the first 4
@pytest.mark.parametrize(
    ("failing_step", "changes"),
    [
        pytest.param(0, {}, marks=pytest.mark.slow),
        (2, {}),
        (5, {}),
        pytest.param(
            *(5, {"teacher_schedule": "adaptive", "adaptive_window": 3, "clips": 160, "num_train_epochs": 1}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(2, {"gradient_accumulation_steps": 2, "logging_steps": 3, "num_train_epochs": 6}), marks=pytest.mark.slow
        ),
    ],
    ids=["at once", "in the teacher phase", "when it was released", "adaptive", "accumulation"],
)
def test_it_ends_as_the_run_that_had_the_smaller_batch_from_the_start(tmp_path, models, failing_step, changes):
    expected = run_of(tmp_path / "a", models, batch_size=4, auto=False, **changes)
    expected.train()
    found = run_of(tmp_path / "b", models, batch_size=8, **changes)
    memory = Memory(found, clips=4, from_step=failing_step)
    found.train()
    assert memory.tried == [8, 7, 6, 5, 4] and all(memory.teachers)
    assert found.state.global_step == expected.state.global_step
    assert torch.equal(history(found, *TERMS), history(expected, *TERMS))
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight), name
    assert found.blend.state == expected.blend.state
    assert (found.teacher is None) == ("teacher_schedule" not in changes)


def test_what_is_random_is_drawn_again(tmp_path, models):
    student = init_student(make_whisper(make_processor(), seed=5, dropout=0.2), 2)
    expected = run_of(tmp_path / "a", (models[0], student), batch_size=4, auto=False)
    expected.train()
    found = run_of(tmp_path / "b", (models[0], student), batch_size=8)
    Memory(found, clips=4, from_step=2)
    found.train()
    assert torch.equal(history(found, *TERMS), history(expected, *TERMS))


def test_what_is_told_of_it_is_the_batch_that_was_found(tmp_path, models):
    trainer = run_of(tmp_path, models, batch_size=8, gradient_accumulation_steps=2)
    Memory(trainer, clips=4)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    trainer.train()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    trainer.save_model()
    facts = TrainingSummary.load(tmp_path)
    assert facts.arguments["per_device_train_batch_size"] == 4 and facts.batch_size == 8


def test_checkpoints_of_the_larger_batch_are_gone(tmp_path, models):
    """They have higher steps than the first ones of the run that follows, which would be rotated away for them."""
    saving = dict(save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer = run_of(tmp_path, models, batch_size=8, **saving)
    steps = []

    def look(*_):
        steps.append(sorted(int(d.name.partition("-")[2]) for d in tmp_path.glob("checkpoint-*")))

    Memory(trainer, clips=7, from_step=5)
    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    assert [4, 5] in steps  # of the first attempt
    second = steps[steps.index([4, 5]) + 1 :]
    assert second[:4] == [[], [1], [1, 2], [2, 3]] and trainer.state.global_step == 9


def test_a_run_is_resumed_with_the_batch_that_was_found(tmp_path, models):
    saving = dict(save_strategy="steps", save_steps=3, save_total_limit=9)
    whole = run_of(tmp_path, models, batch_size=8, **saving)
    Memory(whole, clips=4)
    whole.train()
    resumed = run_of(tmp_path, models, batch_size=8, **saving)
    memory = Memory(resumed, clips=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert memory.tried == [4]
    assert torch.equal(history(resumed, *TERMS), history(whole, *TERMS))


@pytest.mark.slow
def test_a_resumed_run_begins_again_at_its_checkpoint(tmp_path, models):
    """With less memory than before. The number of steps is given: with epochs it would be another run's blend."""
    saving = dict(save_strategy="steps", save_steps=3, save_total_limit=9, max_steps=12)
    plain = run_of(tmp_path / "a", models, batch_size=8, **saving)
    plain.train()
    resumed = run_of(tmp_path / "a", models, batch_size=8, **saving)
    memory = Memory(resumed, clips=4, from_step=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert memory.tried == [8, 7, 6, 5, 4] and resumed.state.global_step == 12
    at_once = run_of(tmp_path / "a", models, batch_size=8, **saving)
    Memory(at_once, clips=4, from_step=6)
    at_once.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert torch.equal(history(resumed, *TERMS), history(at_once, *TERMS))


def test_epochs_cannot_go_on_with_a_smaller_batch_than_that_of_the_checkpoint(tmp_path, models):
    saving = dict(save_strategy="steps", save_steps=2, save_total_limit=9)
    run_of(tmp_path, models, batch_size=8, **saving).train()
    resumed = run_of(tmp_path, models, batch_size=8, **saving)
    Memory(resumed, clips=4)
    with pytest.raises(UserError, match=r"out of memory with the batch size of .*checkpoint-2, and a smaller"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_when_nothing_fits_the_message_is_the_usual_one(tmp_path, models):
    trainer = run_of(tmp_path, models, batch_size=2)
    memory = Memory(trainer, clips=0)
    with pytest.raises(UserError, match=r"out of memory with every batch size from 2 down to 1\. .*--teacher_offload"):
        trainer.train()
    assert memory.tried == [2, 1]


def test_evaluation_is_told_apart(tmp_path, models):
    evaluating = dict(eval_strategy="steps", eval_steps=1, predict_with_generate=False)
    clips = Clips(models[1].config, seed=2)
    trainer = run_of(tmp_path, models, batch_size=8, eval_dataset=clips, **evaluating)
    memory = Memory(trainer, clips=8, in_evaluation=True)
    with pytest.raises(UserError, match="out of memory in evaluation: lower --per_device_eval_batch_size"):
        trainer.train()
    assert memory.tried == [8]


def test_other_errors_pass(tmp_path, models):
    trainer = run_of(tmp_path, models, batch_size=8)

    def fail(*_):
        raise RuntimeError("something else")

    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()


def test_several_processes_are_refused(tmp_path, models, monkeypatch):
    """One of them would restart, and the others wait for it forever."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"--auto_find_batch_size requires one process.*--per_device_train_batch_size.*--gradient_accumulation"
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, models, batch_size=8)
    assert "--auto_find_batch_size" in training_memory_message(8, processes=1)
    for advice in ("--per_device_train_batch_size", "--gradient_accumulation_steps"):
        assert advice in training_memory_message(8, processes=2)
    assert "--auto_find_batch_size" not in training_memory_message(8, processes=2)
