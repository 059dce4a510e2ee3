"""What teacher, self-teacher and student read is the same, token by token, and prompts teach nothing."""

import copy

import pytest
import torch
from models import make_processor, make_whisper
from speech import write_speech
from torch.utils.data import DataLoader
from training import options

from askd_hf import ASKDConfig, ASKDTrainer, SpeechCollator
from askd_hf.data import Limits, filter_invalid_clips, load_speech_dataset
from askd_hf.models.student import init_student

SEGMENTS = [{"start": 0.0, "end": 0.2, "text": "ab"}]
PROMPTS = ["cde", None, "", "f"]  # of four clips in turn


@pytest.fixture(scope="module")
def processor():
    return make_processor(("<|startofprev|>",))


@pytest.fixture(scope="module")
def teacher(processor):
    return make_whisper(processor, vocab_size=len(processor.tokenizer) + 51, max_target_positions=64).eval()


@pytest.fixture
def student(teacher):
    return init_student(teacher, decoder_layers=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, processor, teacher):
    speech = load_speech_dataset(str(write_speech(tmp_path_factory.mktemp("speech"), clips=8)), None, "train")
    speech = speech.add_column("prompt", PROMPTS * 2).add_column("segments", [SEGMENTS] * 8)
    collator = SpeechCollator(processor, teacher.config)
    return filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 64), on_bad_audio="error")


def trainer(directory, processor, teacher, student, rows, collator=None, **changes) -> ASKDTrainer:
    collator = collator or SpeechCollator(
        processor, student.config, timestamp_probability=0.5, condition_on_prev_probability=0.5
    )
    changes = dict(preset="askd", teacher_phase_ratio=1.0, teacher_weight=0.5, teacher_weight_end=0.5) | changes
    return ASKDTrainer(
        model=copy.deepcopy(student),
        args=ASKDConfig(**options(directory, **changes)),
        teacher_model=copy.deepcopy(teacher),
        train_dataset=rows,
        data_collator=collator,
        processing_class=processor,
    )


def test_all_three_read_the_same(tmp_path, processor, teacher, student, rows):
    changes = dict(teacher_phase_ratio=0.5, teacher_schedule="linear", self_weight=0.3)
    made = trainer(tmp_path, processor, teacher, student, rows, **changes)
    read = {"student": [], "teacher": [], "self": []}

    def note(who):
        def hook(decoder, args, kwargs):
            is_self = who == "student" and not torch.is_grad_enabled()
            read["self" if is_self else who].append(kwargs["input_ids"].clone())

        return hook

    made.model.model.decoder.register_forward_pre_hook(note("student"), with_kwargs=True)
    made.teacher.model.decoder.register_forward_pre_hook(note("teacher"), with_kwargs=True)
    made.train()
    assert [len(read[who]) for who in ("student", "teacher", "self")] == [8, 4, 4]
    for who, steps in (("teacher", read["student"][:4]), ("self", read["student"][4:])):
        assert all(torch.equal(a, b) for a, b in zip(read[who], steps, strict=True)), who
    token = processor.tokenizer.convert_tokens_to_ids
    begun = torch.cat([ids[:, 0] for ids in read["student"]]).tolist()
    assert {begun.count(token(name)) > 0 for name in ("<|startofprev|>", "<|startoftranscript|>")} == {True}
    timed = [token("<|notimestamps|>") not in ids for batch in read["student"] for ids in batch.tolist()]
    assert 0 < sum(timed) < len(timed)


def test_a_prompt_changes_what_is_read_and_not_what_is_learned(processor, student, rows):
    """The loss of a batch is the cross-entropy at the positions of the transcript, worked out by the model itself."""
    always, never = (
        SpeechCollator(processor, student.config, condition_on_prev_probability=share) for share in (1.0, 0.0)
    )
    drawn = [rows[i] | {"rng_key": (0, 0, i)} for i in range(4)]
    with_prompts, plain = always(drawn), never(drawn)
    assert (with_prompts["labels"] != -100).sum() == (plain["labels"] != -100).sum()
    for i, prompt in enumerate(PROMPTS):
        labels, inputs = with_prompts["labels"][i], with_prompts["decoder_input_ids"][i]
        learned = labels[labels != -100]
        assert torch.equal(learned, plain["labels"][i][plain["labels"][i] != -100])
        before = int((labels != -100).nonzero()[0])
        assert before == (len(f"x {prompt}") if prompt else 0)  # <|startofprev|>, the space, the letters
        start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        assert inputs[before] == start and (inputs == start).sum() == 1
        assert torch.equal(inputs[before + 1 : before + len(learned)], learned[:-1])


@pytest.mark.parametrize("preset", ["ce", "kd"])
def test_the_loss_is_at_the_transcripts_positions(tmp_path, processor, teacher, student, rows, preset):
    collator = SpeechCollator(processor, student.config, timestamp_probability=0.5, condition_on_prev_probability=1.0)
    made = trainer(tmp_path, processor, teacher, student, rows, collator, preset=preset)
    (batch,) = DataLoader([rows[i] | {"rng_key": (0, 0, i)} for i in range(4)], batch_size=4, collate_fn=collator)
    if preset == "kd":
        made.blend.weights = made.blend.weights._replace(teacher=0.5)
    made.model.eval()
    with torch.no_grad():
        ours = made.compute_loss(made.model, batch)
        inputs = {name: batch[name] for name in ("input_features", "decoder_input_ids")}
        real = batch["labels"] != -100
        log_p = made.model(**inputs).logits[real].float().log_softmax(-1)
        expected = -log_p.gather(1, batch["labels"][real][:, None]).mean()
        if preset == "kd":
            t = made.args.temperature
            target = made.teacher(**inputs).logits[real].float().div(t).log_softmax(-1)
            student_log_p = made.model(**inputs).logits[real].float().div(t).log_softmax(-1)
            kl = (target.exp() * (target - student_log_p)).sum(-1).mean()
            expected = 0.5 * expected + 0.5 * t**2 * kl
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_resuming_draws_the_same(tmp_path, processor, teacher, student, rows):
    changes = dict(max_steps=6, save_strategy="steps", save_steps=3, preset="ce")
    changes |= dict.fromkeys(("teacher_phase_ratio", "teacher_weight", "teacher_weight_end"))
    whole = trainer(tmp_path / "whole", processor, teacher, student, rows, **changes)
    whole.train()  # two steps per epoch: it resumes in the middle of one
    resumed = trainer(tmp_path / "resumed", processor, teacher, student, rows, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    workers = trainer(tmp_path / "workers", processor, teacher, student, rows, dataloader_num_workers=1, **changes)
    workers.train()
    for (name, a), b in zip(whole.model.named_parameters(), workers.model.parameters(), strict=True):
        assert torch.equal(a, b), name
