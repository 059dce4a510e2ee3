"""The adaptive schedule and the clips that it keeps out of training: which they are, and what they tell."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from datasets import Dataset
from speech import write_speech
from torch.utils.data import DataLoader
from training import Clips, collate, history, make_trainer, options
from transformers import TrainerState

from askd_hf import ASKDConfig, ASKDTrainer, SpeechCollator, UserError
from askd_hf.callbacks import AdaptiveBlendCallback
from askd_hf.data import SpeechStream, load_speech_dataset, select_training_columns, to_iterable_dataset
from askd_hf.hub.card_training import schedule_table
from askd_hf.hub.training_summary import TrainingSummary
from askd_hf.objective import TopK
from askd_hf.projection import LMHeadInputs
from askd_hf.schedule import LabelsJudged
from askd_hf.training import held_out
from askd_hf.training.held_out import first_choices, hold_out, judge

ADAPTIVE = dict(teacher_schedule="adaptive", adaptive_window=1)


def names(rows) -> list:
    return [row["clip"] for row in rows]


def rows_of(number: int, **columns) -> Dataset:
    given = {"clip": [f"clip-{i}" for i in range(number)]} | columns
    return Dataset.from_dict(given)


@pytest.mark.parametrize(("clips", "held"), [(16, 0), (159, 0), (160, 8), (560, 28), (4000, 128)])
def test_a_twentieth_is_held_out_and_never_more_than_128(clips, held):
    training, chosen = hold_out(rows_of(clips))
    assert (len(training), len(chosen)) == (clips - held, held)
    assert sorted(names(training) + names(chosen)) == sorted(rows_of(clips)["clip"])
    assert names(hold_out(rows_of(clips))[1]) == names(chosen)


def test_other_datasets_as_well(student):
    training, chosen = hold_out(Clips(student.config, clips=160))
    assert len(chosen) == 8 and len(training) == 152
    assert not set(names(training)) & set(names(chosen))


def test_a_clip_that_comes_repeatedly_is_held_out_altogether():
    keys = [f"key-{i % 400}" for i in range(1000)]
    training, chosen = hold_out(rows_of(1000, audio_key=keys))
    assert len(chosen) == 20 == len(set(chosen["audio_key"]))  # of 400 clips
    assert not set(training["audio_key"]) & set(chosen["audio_key"])
    assert set(training["audio_key"]) | set(chosen["audio_key"]) == set(keys)


def test_clips_without_speech_are_not_chosen():
    silent = [None if i % 2 else True for i in range(400)]
    training, chosen = hold_out(rows_of(400, no_speech=silent))
    assert len(chosen) == 10 and not any(chosen["no_speech"])
    assert sum(1 for negative in training["no_speech"] if negative) == 200


def stream_of(clips: int, **options) -> SpeechStream:
    audio = [{"path": f"{i}.wav", "bytes": None} for i in range(clips)]
    rows = Dataset.from_dict({"clip": [f"{i}.wav" for i in range(clips)], "audio": audio, "text": ["a"] * clips})
    return SpeechStream([select_training_columns(rows.to_iterable_dataset())], **options)


def test_of_a_stream_some_of_the_first_rows_never_come():
    stream = stream_of(200, seed=3, buffer_size=20)
    rest, chosen = hold_out(stream)
    assert len(chosen) == 10
    everything = stream.rows()
    expected = [row for row in (next(everything) for _ in range(400)) if row["clip"] not in names(chosen)]
    rows = rest.rows()
    assert [next(rows) for _ in range(380)] == expected  # of two epochs; at the same places and with the same draws
    assert hold_out(stream)[1] == chosen
    assert len(hold_out(stream_of(3000, buffer_size=20))[1]) == 50
    assert hold_out(stream_of(100))[1] == []


def test_several_processes_hold_out_the_clips_of_one():
    stream = stream_of(200, seed=3, buffer_size=20)
    share = dataclasses.replace(stream, process=0, processes=4)
    assert names(hold_out(share)[1]) == names(hold_out(stream)[1])


def test_the_judge_counts_what_can_be_counted_by_hand():
    """Of a vocabulary of 6, text is 0 to 3; four clips, the last one without speech."""
    labels = torch.tensor([[5, 0, 1, 3], [5, 2, 2, 3], [4, 1, 3, -100], [0, 3, -100, -100]])
    real = labels != -100
    logits = torch.zeros(4, 4, 6)
    logits[0, 1, [2, 0]] = torch.tensor([5.0, 1.0])  # the teacher's 2 comes first, then the label: upheld
    logits[0, 2, [2, 3, 1]] = torch.tensor([1.0, 2.0, 1.5])  # a third token is before the label
    logits[2, 1, 1] = 7.0  # the label itself comes first
    choices = labels.clone()
    choices[0, 0] = 1  # not text
    choices[0, 1], choices[0, 2], choices[2, 1], choices[3, 0] = 2, 2, 0, 1
    student = LMHeadInputs(logits[real], torch.eye(6))
    inputs = {"labels": labels, "no_speech": torch.tensor([False, False, False, True])}
    # clip 0 upholds one of its two, clip 2 its only one; three tokens are disputed, of 3 + 3 + 2
    assert judge(student, inputs, choices[real], end_of_text=3).tolist() == [1.5, 2.0, 3.0, 8.0]


def test_nothing_is_disputed():
    labels = torch.tensor([[0, 3]])
    student = LMHeadInputs(torch.zeros(2, 6), torch.eye(6))
    assert judge(student, {"labels": labels}, labels[0], end_of_text=3).tolist() == [0.0, 0.0, 0.0, 2.0]


def test_the_first_choices_of_a_teacher_that_is_run_and_of_a_cached_one():
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 8), torch.randn(30, 8)
    logits = hidden @ weight.T
    assert torch.equal(first_choices(LMHeadInputs(hidden, weight)), logits.argmax(-1))
    assert torch.equal(first_choices(TopK.from_logits(logits, logits.argmin(-1), 5, 2.0)), logits.argmax(-1))


def steps_of(callback: AdaptiveBlendCallback, total_steps: int) -> Iterator[int]:
    """The steps of a run that calls only this callback."""
    state = TrainerState(max_steps=total_steps)
    given = dict(model=torch.nn.Linear(1, 1), train_dataloader=DataLoader(range(total_steps)))
    callback.on_train_begin(callback.config, state, None, **given)
    for step in range(total_steps):
        state.global_step = step
        callback.on_step_begin(callback.config, state, None, **given)
        yield step


def test_a_measurement_has_the_share_of_its_updates_in_the_window(tmp_path):
    config = ASKDConfig(output_dir=str(tmp_path), teacher_schedule="adaptive", adaptive_window=20)
    callback = AdaptiveBlendCallback(config, lambda: LabelsJudged(0.0, 8.0, 8.0, 32.0), held_out_clips=8)
    upheld = [callback.state.labels_upheld for _ in steps_of(callback, 400)]
    # every 10 updates: (0 + 1) / (8 + 2), with a share of 10 / 20
    assert [upheld[step] for step in (0, 9, 10, 19, 20, 30)] == pytest.approx([0.5, 0.5, 0.3, 0.3, 0.2, 0.15])


def test_labels_that_lose_their_credit_before_the_phase_ends_keep_the_teacher(tmp_path):
    config = ASKDConfig(output_dir=str(tmp_path), teacher_phase_ratio=0.5, **ADAPTIVE)
    upheld = itertools.chain([98.0], itertools.repeat(0.0))
    callback = AdaptiveBlendCallback(config, lambda: LabelsJudged(next(upheld), 98.0, 98.0, 98.0), held_out_clips=98)
    found = [(callback.state.labels_credit, callback.weights.teacher) for _ in steps_of(callback, 40)]
    assert [credit for credit, _ in found[1:3]] == pytest.approx([1.0, 0.1])
    assert [weight for _, weight in found[20:]] == pytest.approx([0.9] * 20)


def train(output_dir, teacher, student, label_rows, **changes):
    """Of 40 steps on 160 clips 20 are planned for the teacher; `label_rows` gives a clip its labels."""
    options = dict(max_steps=40, teacher_weight=1.0, teacher_phase_ratio=0.5, learning_rate=3e-3, clips=160) | ADAPTIVE
    changed = copy.deepcopy(student)
    trainer = make_trainer(output_dir, teacher, changed, **(options | changes))
    generator = torch.Generator().manual_seed(0)
    for row in [*trainer.train_dataset, *trainer._held_out.rows]:
        row["labels"][:] = label_rows(len(row["labels"]), generator)
    trainer.train()
    return trainer


def at_random(length, generator):
    return torch.randint(0, 26, (length,), generator=generator)


def a_style(length, generator):
    """What the teacher would never say, and a student learns in no time."""
    return torch.full((length,), 7)


def test_a_teacher_is_kept_where_labels_are_noise_and_let_go_where_they_can_be_learnt(
    tmp_path, teacher, student, caplog
):
    noisy = train(tmp_path / "noisy", teacher, student, at_random)
    learnt = train(tmp_path / "learnt", teacher, student, a_style)
    plan = noisy.blend.schedule
    for trainer in (noisy, learnt):
        assert trainer.blend.state.disputed > 0.9
        assert all("disputed_labels" in row for row in trainer.state.log_history[1:] if "loss" in row)
    weights, advantage = history(noisy, "teacher_weight", "teacher_advantage").T
    assert advantage[-1] > 0.7 and weights[-1] > 0.7 and noisy.teacher is not None
    weights, advantage = history(learnt, "teacher_weight", "teacher_advantage").T
    assert advantage[-1] < 0.25 and weights[30:].max() == 0.0 and learnt.teacher is None
    assert learnt.blend.self_teacher is not None and learnt.blend.weights.self == pytest.approx(0.3)
    assert plan.planned_end == 20
    # the labels have full credit when nine tenths of the disputed ones are upheld: from then on there is no teacher
    released = next(step for step in range(20, 40) if advantage[step] <= 0.1 + 1e-6)
    assert released > 20 and f"step {released}: freed the teacher" in caplog.text
    rows = [row for row in learnt.state.log_history if "loss" in row]
    assert ["teacher_loss" in row for row in rows] == [step < released for step in range(40)]
    assert ["self_loss" in row for row in rows] == [step >= 20 for step in range(40)]
    for step, row in enumerate(rows[20:], start=20):
        held = 1.0 - min(1.0, max(0.1, (1.0 - row["teacher_advantage"]) / 0.9)) if step < released else 0.0
        assert row["teacher_weight"] == pytest.approx(held, abs=1e-6)
        assert row["self_weight"] == pytest.approx(0.3 * (step - 19) / 20 * (1.0 - held), abs=1e-6)


def test_the_teacher_hears_the_held_out_clips_once_and_nothing_when_it_has_no_weight(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, clips=160, **ADAPTIVE)
    calls = []
    trainer.teacher.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append(len(kwargs["decoder_input_ids"])), with_kwargs=True
    )
    trainer.train()  # 8 steps of 4 clips, measured before each but the first; 8 clips are held out
    weights = history(trainer, "teacher_weight")[:, 0]
    assert (weights > 0).all() and sorted(calls) == [4] * 8 + [8]


def test_a_frozen_encoder_hears_the_held_out_clips_once(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, clips=160, **ADAPTIVE)
    heard = []
    trainer.model.model.encoder.register_forward_pre_hook(lambda encoder, args: heard.append(len(args[0])))
    trainer.train()  # 8 steps of 4 clips, before 7 of which 8 held-out clips are looked at
    assert sum(heard) == 8 * 4 + 8
    (batch,) = trainer._held_out.batches(trainer.data_collator, trainer.args)
    assert "input_features" not in batch.inputs and batch.inputs["encoder_outputs"].device.type == "cpu"


def test_training_does_not_see_them(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, clips=160, max_steps=-1, num_train_epochs=2, **ADAPTIVE)
    seen, make = set(), trainer.data_collator
    held = set(names(trainer._held_out.rows))

    def noting(rows):
        if len(rows) < 8:  # not the held-out ones, which are one batch
            seen.update(names(rows))
        return make(rows)

    trainer.data_collator = noting
    trainer.train()
    assert len(held) == 8 and len(seen) == 152 and not held & seen
    trainer.save_model()
    assert TrainingSummary.load(tmp_path).arguments["teacher_schedule"] == "adaptive"


def test_with_few_clips_it_is_linear_and_says_so(tmp_path, teacher, student, caplog):
    linear = make_trainer(tmp_path / "a", teacher, student)
    linear.train()
    adaptive = make_trainer(tmp_path / "b", teacher, student, teacher_schedule="adaptive")
    adaptive.train()
    assert "to hold out clips requires 160 clips, got 16. Nothing needs to be done" in caplog.text
    adaptive.save_model()
    summary = TrainingSummary.load(tmp_path / "b")
    assert summary.arguments["teacher_schedule"] == "linear" and "at least" not in schedule_table(summary)
    terms = ("loss", "grad_norm", "teacher_weight", "self_weight")
    assert torch.equal(history(adaptive, *terms), history(linear, *terms))
    assert adaptive.teacher is None and history(adaptive, "teacher_advantage").sum() == 0.0


def test_clips_without_speech_do_not_count(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, clips=160, **ADAPTIVE)
    trainer.data_collator = lambda rows: collate(rows) | {"no_speech": torch.ones(len(rows), dtype=torch.bool)}
    trainer.train()
    assert trainer.blend.state.labels_upheld == 0.5 and trainer.blend.state.disputed == 0.0


def test_a_stream_is_measured_as_well(tmp_path, teacher, student, processor, monkeypatch):
    monkeypatch.setattr(held_out, "SHARE", 0.25)
    monkeypatch.setattr(held_out, "MIN_CLIPS", 2)
    folder = write_speech(tmp_path / "train", clips=20)
    rows = select_training_columns(to_iterable_dataset(load_speech_dataset(str(folder), None, "train")))
    trainer = ASKDTrainer(
        model=student,
        args=ASKDConfig(**options(tmp_path / "run", max_steps=12, **ADAPTIVE)),
        teacher_model=teacher,
        train_dataset=SpeechStream([rows]),
        data_collator=SpeechCollator(processor, student.config),
    )
    seen, make = [], trainer.data_collator
    trainer.data_collator = lambda rows: seen.extend(names(rows)) or make(rows)
    trainer.train()
    held = names(trainer._held_out.rows)
    assert len(held) == 5 and trainer.blend.state.disputed is not None
    assert len(set(seen)) == 20 and all(seen.count(clip) == 1 for clip in held)  # once, to be measured on


def test_what_is_held_out_is_part_of_the_run(tmp_path, teacher, student, monkeypatch):
    saving = dict(save_strategy="steps", save_steps=4, clips=160)
    make_trainer(tmp_path, teacher, student, **saving, **ADAPTIVE).train()
    monkeypatch.setattr(held_out, "SHARE", 0.1)
    other = make_trainer(tmp_path, teacher, student, **saving, **ADAPTIVE)
    with pytest.raises(UserError, match=r"clips .*152 -> 144"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
