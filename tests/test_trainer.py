"""What the trainer runs and when, what it logs, evaluates and saves."""

import copy
import json
import math

import jiwer
import numpy as np
import pytest
import torch
from datasets import IterableDataset
from formulas import numpy_blend
from models import make_multilingual, make_whisper
from safetensors.torch import load_file
from scipy.special import log_softmax
from speech import write_speech
from training import Clips, SeedsAsNames, collate, history, learn_by_heart, make_trainer, options
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, TrainerCallback, TrainerState

from askd_hf.config import ASKDConfig
from askd_hf.data import SpeechCollator, SpeechStream, decode_audio, load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.evaluation.metrics import compute_metrics_for
from askd_hf.models.generation_config import set_language
from askd_hf.models.student import init_student
from askd_hf.objective import distillation_loss
from askd_hf.trainer import ASKDTrainer
from askd_hf.training.loss_sums import NonFiniteLossError
from askd_hf.training.skipped_rows import SkippedRows


def count_calls(module, calls: list):
    """The share of a batch of 4 clips that every call is of, as the encoder may take fewer at a time."""
    module.register_forward_hook(lambda *call: calls.append(len(call[-1][0]) / 4))


def encoder_and_decoder_calls(trainer):
    encoder, teacher_encoder, teacher_decoder = [], [], []
    count_calls(trainer.model.model.encoder, encoder)
    count_calls(trainer.teacher.model.encoder, teacher_encoder)
    count_calls(trainer.teacher.model.decoder, teacher_decoder)
    trainer.train()
    return sum(encoder), sum(teacher_encoder), sum(teacher_decoder)


def test_a_frozen_encoder_runs_once_a_step_for_all_three(tmp_path, teacher):
    trainer = make_trainer(tmp_path, teacher, init_student(teacher), max_steps=10, self_schedule="constant")
    assert encoder_and_decoder_calls(trainer) == (10, 0, 6)


def test_different_encoders_both_run_and_the_self_teacher_shares_the_students(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, max_steps=10)
    assert encoder_and_decoder_calls(trainer) == (10, 6, 6)


def test_a_trained_encoder_runs_in_the_self_teacher_too(tmp_path, teacher):
    trainer = make_trainer(tmp_path, teacher, init_student(teacher), max_steps=10, freeze_encoder=False)
    before = copy.deepcopy(trainer.model.model.encoder.state_dict())
    assert encoder_and_decoder_calls(trainer) == (10 + 4, 6, 6)
    assert any(not torch.equal(before[name], w) for name, w in trainer.model.model.encoder.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(divergence="reverse_kl", temperature=1.5),
        dict(divergence="jensen_shannon", divergence_beta=0.3),
        dict(divergence="skewed_kl", divergence_beta=0.3),
        dict(weight_teacher_by_label_prob=True),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
def test_the_logged_terms_are_those_of_the_formula(tmp_path, processor, student, changes):
    """The first step, recomputed in numpy from plain forward passes; dropout would show in a teacher in training."""
    teacher = make_whisper(processor, dropout=0.5).train()
    given = dict(max_steps=1, per_device_train_batch_size=16, teacher_phase_ratio=1.0, temperature=2.0) | changes
    trainer = make_trainer(tmp_path, teacher, student, **given)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    batch = collate(Clips(student.config).rows)
    inputs = {name: batch[name] for name in ("input_features", "labels")}
    real = batch["labels"] != -100
    with torch.no_grad():
        of_teacher, of_student = (model.eval()(**inputs).logits[real].double().numpy() for model in (teacher, student))

    def blend(teacher_weight: float, weighted: bool) -> float:
        return numpy_blend(
            *(of_student, batch["labels"][real].numpy(), of_teacher, of_teacher, teacher_weight, 0.0),
            given["temperature"],
            given.get("divergence", "forward_kl"),
            given.get("divergence_beta", 0.5),
            weighted,
        ).mean()

    assert row["loss"] == pytest.approx(blend(0.8, "weight_teacher_by_label_prob" in given), rel=1e-5)
    assert row["ce_loss"] == pytest.approx(blend(0.0, False), rel=1e-5)
    assert row["teacher_loss"] == pytest.approx(blend(1.0, False), rel=1e-5)
    rows = np.arange(int(real.sum()))
    expected = -log_softmax(of_teacher, axis=-1)[rows, batch["labels"][real].numpy()].mean()
    assert row["teacher_ce"] == pytest.approx(expected, rel=1e-5)
    assert row["top1_agreement"] == pytest.approx((of_teacher.argmax(-1) == of_student.argmax(-1)).mean(), rel=1e-5)
    assert (row["teacher_weight"], row["self_weight"]) == (0.8, 0.0)
    assert "self_loss" not in row


def test_terms_are_logged_in_their_phase_and_the_self_term_starts_at_zero(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, max_steps=10, self_schedule="constant")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["teacher_loss" in row for row in rows] == [True] * 6 + [False] * 4
    assert ["self_loss" in row for row in rows] == [False] * 6 + [True] * 4
    assert rows[6]["self_loss"] == pytest.approx(0.0, abs=1e-6)  # the self-teacher is the student itself
    assert all(row["self_loss"] > 1e-5 for row in rows[7:])


def test_the_teacher_is_untouched_freed_and_never_saved(tmp_path, teacher, student, processor):
    kept = copy.deepcopy(teacher)
    trainer = make_trainer(
        tmp_path, teacher, student, max_steps=10, save_strategy="steps", save_steps=5, processor=processor
    )
    during = trainer.teacher
    trainer.train()
    assert trainer.teacher is None
    for (name, a), b in zip(during.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad and a.grad is None, name
    for step, files in ((5, {"blend_state.json"}), (10, {"blend_state.json", "self_teacher.safetensors"})):
        checkpoint = tmp_path / f"checkpoint-{step}"
        saved = load_file(checkpoint / "model.safetensors")
        assert {name for name in saved if "decoder.layers" in name} == {
            name for name in student.state_dict() if "decoder.layers" in name
        }
        own = {"blend_state.json", "self_teacher.safetensors"}
        assert {path.name for path in checkpoint.iterdir()} & own == files


def test_the_ema_is_the_average_by_its_formula(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, max_steps=5, teacher_phase_ratio=0.4, self_ema_decay=0.7)
    name = "model.decoder.layers.0.fc1.weight"
    trail = []

    class Trail(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            trail.append(model.get_parameter(name).detach().clone())

    trainer.add_callback(Trail())
    trainer.train()
    trail.append(trainer.model.get_parameter(name).detach())
    average = trail[2]  # the student as it entered the self phase, after two of five steps
    for weights in trail[3:]:
        average = 0.7 * average + 0.3 * weights
    torch.testing.assert_close(trainer.blend.self_teacher.parameters[name], average)


def test_average_publishes_the_self_teacher_also_after_resuming(tmp_path, teacher, student):
    options = dict(max_steps=5, teacher_phase_ratio=0.4, self_ema_decay=0.7, save_strategy="steps", save_steps=1)
    options |= dict(save_total_limit=None)
    plain = make_trainer(tmp_path / "plain", teacher, copy.deepcopy(student), **options)
    plain.train()
    for checkpoint in (None, "checkpoint-4", "checkpoint-5"):  # of the last, only the averaging is left to do
        trainer = make_trainer(tmp_path / "averaged", teacher, copy.deepcopy(student), average=True, **options)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "averaged" / checkpoint))
        trainer.save_model()
        published = load_file(tmp_path / "averaged" / "model.safetensors")
        saved = load_file(tmp_path / "averaged" / "checkpoint-5" / "model.safetensors")
        assert plain.blend.self_teacher.parameters
        for name, average in plain.blend.self_teacher.parameters.items():
            assert torch.equal(published[name], average), name
            assert torch.equal(saved[name], plain.model.get_parameter(name)), name
            assert not torch.equal(published[name], saved[name]), name


def test_nothing_is_averaged_if_no_step_is_left_for_the_self_phase(tmp_path, teacher, student):
    """The number of steps is known when training begins."""
    epochs = dict(max_steps=-1, num_train_epochs=2)  # of 4 steps: 0.93 of them is 7, 0.94 is 8
    with pytest.raises(
        UserError, match=r"--average has no effect: with --teacher_phase_ratio 0\.94 no step of this run"
    ):
        make_trainer(tmp_path, teacher, student, average=True, teacher_phase_ratio=0.94, **epochs).train()
    trainer = make_trainer(tmp_path, teacher, student, average=True, teacher_phase_ratio=0.93, **epochs)
    trainer.train()
    assert history(trainer, "self_weight").flatten().tolist() == [0.0] * 7 + [pytest.approx(0.3)]


@pytest.mark.parametrize(("refresh", "taken_at"), [("never", 0), ("epoch", 8)])
def test_the_snapshot_is_the_student_of_its_epoch(tmp_path, teacher, student, refresh, taken_at):
    trainer = make_trainer(tmp_path, teacher, student, preset="ps-kd", snapshot_strategy=refresh, max_steps=10)
    trail = []

    class Trail(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            trail.append(model.model.decoder.layers[0].fc1.weight.detach().clone())

    trainer.add_callback(Trail())
    trainer.train()  # 4 steps per epoch
    snapshot = trainer.blend.self_teacher.parameters["model.decoder.layers.0.fc1.weight"]
    assert [step for step, weight in enumerate(trail) if torch.equal(weight, snapshot)] == [taken_at]


def test_evaluation_gives_every_term_over_tokens_and_the_error_rates(tmp_path, teacher, student, processor):
    evaluation = Clips(student.config, clips=7, seed=2)
    trainer = make_trainer(
        tmp_path,
        teacher,
        student,
        evaluation,
        compute_metrics_for(processor, "auto"),
        processor,
        max_steps=4,
        per_device_eval_batch_size=3,
        eval_strategy="steps",
        eval_steps=2,
        preset="kd",
        eval_teacher_losses=True,
    )
    trainer.train()
    metrics = trainer.state.log_history[-2]
    assert metrics["step"] == 4
    batch = collate(evaluation.rows)
    inputs = {name: batch[name] for name in ("input_features", "labels")}
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs).logits
        teacher_logits = teacher(**inputs).logits
    real = batch["labels"] != -100
    terms = distillation_loss(
        logits[real],
        batch["labels"][real],
        teacher=teacher_logits[real],
        teacher_weight=1 / 1.8,
        temperature=2.0,
    )
    for name, term in {
        "eval_loss": terms.ce,
        "eval_total_loss": terms.total,
        "eval_teacher_loss": terms.teacher,
        "eval_top1_agreement": terms.top1_agreement,
    }.items():
        assert metrics[name] == pytest.approx(term.mean().item(), rel=1e-4), name
    assert metrics["eval_wer"] > 0 and metrics["eval_cer"] > 0


def test_error_rates_are_those_of_generate_by_hand(tmp_path, processor, speech_dir):
    """Of a model that knows some of the clips by heart, so that neither all words nor none are right."""
    known = write_speech(tmp_path / "known", clips=5, seed=7)
    model = make_whisper(processor)
    learn_by_heart(model, processor, known)
    collator = SpeechCollator(processor, model.config)
    rows = [
        row for folder in (known, speech_dir / "validation") for row in load_speech_dataset(str(folder), None, "train")
    ]
    trainer = ASKDTrainer(
        model=model,
        args=ASKDConfig(**options(tmp_path / "run", preset="ps-kd", per_device_eval_batch_size=4)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        compute_metrics=compute_metrics_for(processor, "basic"),
        processing_class=processor,
    )
    metrics = trainer.evaluate()
    heard = []
    for row in rows:
        wave = decode_audio(row["audio"])
        features = processor.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
        tokens = model.eval().generate(features, num_beams=1)[0]
        heard.append(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    said = [row["text"] for row in rows]
    assert heard[:5] == said[:5]
    rates = 100 * jiwer.wer(said, heard), 100 * jiwer.cer(said, heard)
    assert (metrics["eval_wer"], metrics["eval_cer"]) == (pytest.approx(rates[0]), pytest.approx(rates[1]))
    assert 0 < rates[0] < 100


def test_error_rates_of_a_multilingual_model_are_of_the_language_of_the_labels(tmp_path):
    """A model that answers by its prompt: it has learned the clips in one language."""
    model, processor = make_multilingual()
    set_language(model, processor, "zh", "transcribe")
    known = write_speech(tmp_path / "known", clips=4, seed=7)
    learn_by_heart(model, processor, known)
    rows = list(load_speech_dataset(str(known), None, "train"))
    rates = {}
    for language in ("zh", "en"):
        labeled = [row | {"language": language, "task": "transcribe"} for row in rows]
        trainer = ASKDTrainer(
            model=model,
            args=ASKDConfig(**options(tmp_path / "run", preset="ps-kd", per_device_eval_batch_size=4)),
            train_dataset=labeled,
            eval_dataset=labeled,
            data_collator=SpeechCollator(processor, model.config),
            compute_metrics=compute_metrics_for(processor, "basic"),
            processing_class=processor,
        )
        model.generation_config.language = None
        rates[language] = trainer.evaluate()["eval_cer"]
        features = [
            processor.feature_extractor(decode_audio(row["audio"]), sampling_rate=16_000, return_tensors="pt")
            for row in rows
        ]
        heard = [
            processor.tokenizer.decode(
                model.generate(one.input_features, language=language, task="transcribe", num_beams=1)[0],
                skip_special_tokens=True,
            ).strip()
            for one in features
        ]
        assert rates[language] == pytest.approx(100 * jiwer.cer([row["text"] for row in rows], heard))
    assert rates["zh"] == 0.0 < rates["en"]


def test_a_last_batch_that_training_drops_is_evaluated(tmp_path, teacher, student):
    """15 clips to train on and 7 to evaluate, in batches of 4."""
    evaluation = Clips(student.config, clips=7, seed=2)
    changes = dict(max_steps=-1, num_train_epochs=2, predict_with_generate=False)
    runs = []
    for drop_last in (False, True):
        trainer = make_trainer(tmp_path, teacher, student, evaluation, dataloader_drop_last=drop_last, **changes)
        trainer.train_dataset = Clips(student.config, clips=15)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        runs.append((before, trainer.state.global_step, trainer.predict(evaluation).metrics["test_loss"]))
    assert runs[0][0] == runs[1][0] and [steps for _, steps, _ in runs] == [8, 6]
    batch = collate(evaluation.rows)
    with torch.no_grad():
        logits = trainer.model.eval()(input_features=batch["input_features"], labels=batch["labels"]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"])
    assert runs[1][2] == pytest.approx(expected.item(), rel=1e-5)


def test_the_order_of_the_clips_follows_the_data_seed(tmp_path, student):
    def order(**seeds) -> list[str]:
        trainer, seen = make_trainer(tmp_path, None, student, preset="ce", **seeds), []
        trainer.data_collator = lambda rows: seen.extend(row["clip"] for row in rows) or collate(rows)
        trainer.train()
        return seen

    followed = order(seed=1, data_seed=9)
    assert followed == order(seed=2, data_seed=9) == order(seed=9) != order(seed=1)
    assert followed[:16] != followed[16:]  # another order in the second epoch


def test_tensorboard_gets_terms_and_weights(tmp_path, teacher, student):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, teacher, student, report_to="tensorboard", max_steps=10, self_schedule="constant")
    trainer.train()
    (event_file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(event_file)).Reload()
    weights = [event.value for event in events.Scalars("train/teacher_weight")]
    assert weights == pytest.approx([0.8 * (1 - i / 6) for i in range(6)] + [0.0] * 4)
    names = ("ce_loss", "teacher_loss", "self_loss", "self_weight", "top1_agreement")
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])


def test_a_non_finite_loss_stops_and_names_step_and_clips(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, preset="ce", max_steps=4)
    trainer.train_dataset.rows[5]["input_features"][0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"at step [0-3], in 1 of 4 clips: clip-5\."):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_clips_of_a_non_finite_loss_may_be_in_any_part_of_an_update(tmp_path, teacher, student):
    """In the first of two batches of the second update; the losses of the first update aren't kept."""
    changes = dict(preset="ce", max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    order: list[str] = []
    trainer = make_trainer(tmp_path / "order", teacher, student, **changes)
    trainer.data_collator = lambda rows: order.extend(row["clip"] for row in rows) or collate(rows)
    trainer.train()
    assert trainer._update == []
    trainer = make_trainer(tmp_path / "run", teacher, student, **changes)
    trainer.train_dataset.rows[int(order[4].removeprefix("clip-"))]["input_features"][0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match=rf"at step 1, in 1 of 4 clips: {order[4]}\."):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 1])
def test_random_numbers_of_a_clip_are_others_in_each_epoch(tmp_path, processor, student, workers):
    """They are seeded by the seed, the epoch and the row: for augmentations, prompts and audio contexts."""
    changes = dict(preset="ce", max_steps=-1, num_train_epochs=3, dataloader_num_workers=workers)
    trainer = ASKDTrainer(
        model=copy.deepcopy(student),
        args=ASKDConfig(**options(tmp_path, **changes)),
        train_dataset=Clips(student.config),
        data_collator=SeedsAsNames(processor, student.config),
    )
    keys: list[tuple[int, ...]] = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            keys.extend(map(tuple, map(json.loads, trainer._clips)))

    trainer.add_callback(Note())
    trainer.train()
    assert sorted(keys) == [(3, epoch, row) for epoch in range(3) for row in range(16)]


@pytest.mark.parametrize("eval_teacher_losses", [False, True])
def test_evaluation_computes_features_of_the_teacher_only_for_its_losses(
    tmp_path, processor, teacher, student, speech_dir, eval_teacher_losses
):
    rows = load_speech_dataset(str(speech_dir), None, "train")
    trainer = ASKDTrainer(
        model=student,
        teacher_model=teacher,
        args=ASKDConfig(**options(tmp_path, eval_teacher_losses=eval_teacher_losses)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=SpeechCollator(processor, student.config, teacher_extractor=processor.feature_extractor),
        processing_class=processor,
    )
    assert "teacher_input_features" in next(iter(trainer.get_train_dataloader()))
    assert ("teacher_input_features" in next(iter(trainer.get_eval_dataloader()))) is eval_teacher_losses
    assert "teacher_input_features" in next(iter(trainer.get_train_dataloader()))


def test_a_non_finite_gradient_stops_before_the_update(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, preset="ce", max_steps=4)
    weight = trainer.model.model.decoder.layers[0].fc1.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 0, last clips: clip-"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        dict(bf16=True),
        dict(activation_checkpointing=True),
        dict(activation_checkpointing=True, freeze_encoder=False),
    ],
    ids=str,
)
def test_other_ways_to_compute_follow_the_plain_trajectory(tmp_path, teacher, student, changes):
    plain = make_trainer(tmp_path, teacher, student, freeze_encoder=changes.get("freeze_encoder", True), max_steps=10)
    plain.train()
    other = make_trainer(tmp_path, teacher, student, max_steps=10, **changes)
    other.train()
    tolerance = dict(rtol=0.1, atol=0.05) if "bf16" in changes else dict(rtol=1e-4, atol=1e-5)
    names = ("loss", "ce_loss", "grad_norm")
    torch.testing.assert_close(history(other, *names), history(plain, *names), **tolerance)


def test_the_saved_student_needs_nothing_of_ours(tmp_path, teacher, student, processor):
    spelling = {"colour": "color"}
    processor = copy.deepcopy(processor)
    processor.tokenizer.english_spelling_normalizer = spelling
    trainer = make_trainer(tmp_path, teacher, student, processor=processor)
    trainer.train()
    trainer.save_model()
    files = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "normalizer.json"} <= files
    assert "training_args.bin" not in files  # a pickle that may hold a token
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert model.config.use_cache
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.english_spelling_normalizer == spelling
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_the_saved_dtype_is_as_asked_for_and_checkpoints_keep_float32(tmp_path, teacher, student, processor):
    trainer = make_trainer(
        tmp_path, teacher, student, processor=processor, save_dtype="float16", save_strategy="steps", save_steps=8
    )
    trainer.train()
    trainer.save_model()
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).dtype == torch.float16
    assert {w.dtype for w in load_file(tmp_path / "checkpoint-8" / "model.safetensors").values()} == {torch.float32}
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=40), "vocab_size: teacher 40, student 31"),
        (dict(num_mel_bins=16), "num_mel_bins: teacher 16, student 8"),
    ],
    ids=["vocabulary", "mel bins"],
)
def test_a_pair_that_does_not_fit_is_refused(tmp_path, processor, student, changes, message):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, make_whisper(processor, **changes), student)


def test_what_would_replace_the_objective_is_refused(tmp_path, teacher, student):
    with pytest.raises(ValueError, match="compute_loss_func"):
        ASKDTrainer(
            model=student, args=make_trainer(tmp_path, teacher, student).args, compute_loss_func=lambda *_: None
        )
    with pytest.raises(UserError, match="there is no teacher"):
        make_trainer(tmp_path, None, student)


def iterable(speech_dir) -> IterableDataset:
    return load_speech_dataset(str(speech_dir), None, "train", streaming=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(train_dataset=iterable),
            r"train_dataset: .* with SpeechCollator; give askd_hf.data.SpeechStream\(",
        ),
        (dict(eval_dataset=iterable), "eval_dataset: .* not supported with SpeechCollator; give a dataset with rows"),
        (dict(eval_dataset=lambda folder: {"calls": iterable(folder)}), "eval_dataset: .* not supported"),
        (dict(accelerator_config={"dispatch_batches": True}), "dispatch_batches=True is not supported"),
        (
            dict(train_dataset=lambda folder: SpeechStream([iterable(folder)]), max_steps=2)
            | dict(accelerator_config={"split_batches": True}),
            "split_batches=True is not supported with a stream",
        ),
    ],
)
def test_batches_that_accelerate_would_cut_are_refused(tmp_path, processor, student, speech_dir, changes, message):
    """It cuts every tensor of a dispatched batch to as many entries as clips, and so most label positions."""
    made = {name: value(speech_dir) for name, value in changes.items() if callable(value)}
    given = {name: value for name, value in changes.items() if not callable(value)}
    datasets = dict(train_dataset=Clips(student.config)) | made
    args = ASKDConfig(**options(tmp_path, preset="ce", **given))
    collator = SpeechCollator(processor, student.config)
    with pytest.raises(UserError, match=message):
        ASKDTrainer(model=student, args=args, data_collator=collator, **datasets)
    trainer = ASKDTrainer(model=student, args=ASKDConfig(**options(tmp_path, preset="ce")), data_collator=collator)
    with pytest.raises(UserError, match="eval_dataset: iterable datasets are not supported with SpeechCollator"):
        trainer.evaluate(iterable(speech_dir))


def test_a_multilingual_model_needs_the_language_of_the_clips(tmp_path, speech_dir):
    model, processor = make_multilingual()
    rows = list(load_speech_dataset(str(speech_dir), None, "train"))

    def trainer_on(rows: list[dict]) -> ASKDTrainer:
        args = ASKDConfig(**options(tmp_path, preset="ce"))
        collator = SpeechCollator(processor, model.config)
        return ASKDTrainer(model=model, args=args, train_dataset=rows, data_collator=collator)

    assert processor.tokenizer.language is None
    with pytest.raises(UserError, match="neither its tokenizer nor the clips have a language"):
        trainer_on(rows)
    trainer_on([row | {"language": "zh", "task": "transcribe"} for row in rows])
    set_language(model, processor, "zh")
    trainer_on(rows)


def test_a_failed_push_leaves_the_student_and_says_how_to_push_it(tmp_path, teacher, student, processor):
    trainer = make_trainer(tmp_path, teacher, student, processor=processor)
    trainer.train()
    trainer.save_model()
    resume = f"askd-hf push --model_dir {tmp_path} --repo_id {tmp_path.name}"
    with pytest.raises(UserError, match=f"is saved in {tmp_path}; resume with: {resume}"):  # with HF_HUB_OFFLINE
        trainer.push_to_hub()
    trainer.args.hub_model_id = "somebody/student"
    with pytest.raises(UserError, match="--repo_id somebody/student"):
        trainer.push_to_hub()
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).config.decoder_layers == 2


@pytest.mark.parametrize(("every", "logged"), [(1, [1, 2, 3, 8]), (2, [2, 4, 8]), (8, [8])])
def test_a_few_updates_without_labels_do_not_end_the_run(tmp_path, student, every, logged):
    """As of a stream whose next clips are all invalid. What is logged is of the others."""

    def train(first: int, last: int, steps: int):
        changes = dict(preset="ce", max_steps=steps, logging_steps=every, train_sampling_strategy="sequential")
        trainer = make_trainer(tmp_path, None, student, per_device_train_batch_size=1, **changes)
        for row in trainer.train_dataset.rows[first - 1 : last]:
            row["labels"] = torch.full_like(row["labels"], -100)
        trainer.train()
        return history(trainer, "step", "ce_loss")

    found = train(4, 7, steps=8)
    assert found[:, 0].tolist() == logged and (found[:, 1] > 1.0).all()
    assert train(8, 8, steps=8)[:, 0].tolist() == [step for step in range(every, 9, every) if step < 8 or every > 1]
    with pytest.raises(UserError, match=r"step [5-9]: every clip of the last [5-9] updates was invalid or filtered"):
        train(1, 8, steps=8)
    with pytest.raises(UserError, match="step 2: every clip of the last 2 updates was invalid or filtered out"):
        train(1, 2, steps=2)


def test_the_list_of_skipped_rows_has_its_header_in_another_directory_too(tmp_path):
    """A resumed run that has skipped rows before, and another `--output_dir`."""
    first = SkippedRows.of_run(ASKDConfig(output_dir=str(tmp_path / "first"), use_cpu=True), None)
    first.add([("a.wav", "too long", False)], 1)
    first.save(tmp_path, [first.count])
    second = SkippedRows.of_run(ASKDConfig(output_dir=str(tmp_path / "second"), use_cpu=True), None)
    second.load(tmp_path, 0)
    second.add([("b.wav", "too long", False)], 2)
    assert (tmp_path / "second" / "skipped-stream.csv").read_text().split() == ["clip,reason", "b.wav,too", "long"]


def test_rows_that_were_skipped_after_the_checkpoint_are_listed_once(tmp_path):
    skipped = SkippedRows.of_run(ASKDConfig(output_dir=str(tmp_path), use_cpu=True), None)
    skipped.add([("a.wav", "long", False)], 1)
    skipped.save(tmp_path, [skipped.count])
    for _ in range(2):  # the second time after a resume
        skipped.add([("b.wav", "long", False), ("c.wav", "long", False)], 2)
        listed = (tmp_path / "skipped-stream.csv").read_text().split()
        assert listed == ["clip,reason", "a.wav,long", "b.wav,long", "c.wav,long"]
        skipped.load(tmp_path, 0)
        assert skipped.count == 1
    skipped.load(tmp_path, 1)  # a process more than there were: it has skipped nothing
    assert skipped.count == 0


def test_without_a_whole_batch_a_run_ends_before_it_starts(tmp_path, student):
    """Trainer would save the untrained student as the result."""
    options = dict(dataloader_drop_last=True, per_device_train_batch_size=8, preset="ce", max_steps=3)
    trainer = make_trainer(tmp_path, None, student, clips=7, **options)
    with pytest.raises(UserError, match=r"leaves no batch: there are 7 training clips, and .* take 8 at a time"):
        trainer.train()


def test_the_last_updates_of_a_resumed_run_may_have_no_labels(tmp_path):
    """As they may of a run that wasn't interrupted: it would fail again at every start."""
    skipped = SkippedRows.of_run(ASKDConfig(output_dir=str(tmp_path), use_cpu=True), None)
    state = TrainerState(global_step=8, max_steps=8, log_history=[{"step": 6, "loss": 1.0}])
    skipped.check_empty(state, first_step=6)
    state.log_history = []
    with pytest.raises(UserError, match="every clip of the last 8 updates"):
        skipped.check_empty(state, first_step=0)
