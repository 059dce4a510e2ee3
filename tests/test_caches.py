"""Training on cached encoder outputs and cached labels of the teacher, against training without caches."""

import copy
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from models import make_processor, make_whisper
from processes import killed_when
from safetensors.torch import load_file
from scripts import DISTILL as SCRIPT
from scripts import ROOT, run_here, steps_printed
from soft_labels import label, speech
from speech import write_speech
from torch._dynamo.utils import counters
from training import on, options

from askd_hf.arguments import CacheArguments, ModelArguments
from askd_hf.config import ASKDConfig
from askd_hf.data import TEACHER_COLUMNS, SpeechCollator, cache_encoder
from askd_hf.errors import UserError
from askd_hf.evaluation.metrics import compute_metrics_for
from askd_hf.models.student import init_student
from askd_hf.trainer import ASKDTrainer
from askd_hf.training.caches import with_encoder_cache, with_soft_labels
from askd_hf.training.checkpoint_lookup import checkpoint_to_resume

LABELLER = ROOT / "examples" / "cache_teacher.py"
ALL_BUT_ONE = 30  # of the vocabulary's 31 tokens
# half precision on disk, after some updates
TOLERANCE = dict(rtol=5e-3, atol=5e-3)
SAME_STEPS = ("loss", "ce_loss", "teacher_loss", "self_loss", "teacher_ce", "top1_agreement", "grad_norm")
SAME_STEPS += ("teacher_weight", "self_weight", "teacher_advantage", "disputed_labels")


@pytest.fixture
def clips(tmp_path):
    return speech(write_speech(tmp_path / "speech", 8))


@pytest.fixture
def collator(processor, teacher):
    return SpeechCollator(processor, teacher.config)


def encoded(model, processor, datasets, directory):
    size = dict(batch_size=4, device=torch.device("cpu"), dtype=torch.float32)
    return cache_encoder(model, processor, datasets, directory, **size)


def make_trainer(output_dir, student, dataset, collator, teacher=None, eval_dataset=None, metrics=None, **changes):
    """10 steps on 8 clips, of which the teacher phase takes 6."""
    options_here = dict(teacher_weight=0.8, teacher_phase_ratio=0.6, max_steps=10, learning_rate=3e-3) | changes
    if "preset" not in changes and options_here["teacher_phase_ratio"] < 1.0:
        options_here = dict(self_weight=0.3) | options_here
    return ASKDTrainer(
        model=copy.deepcopy(student),
        args=ASKDConfig(**options(output_dir, **options_here)),
        teacher_model=copy.deepcopy(teacher),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        compute_metrics=metrics,
    )


def steps(log_history) -> dict[str, torch.Tensor]:
    """By name, what was logged of the steps that had it."""
    rows = [row for row in log_history if "loss" in row]
    return {name: torch.tensor([row[name] for row in rows if name in row]) for name in SAME_STEPS}


def trained(*args, **changes) -> dict[str, torch.Tensor]:
    trainer = make_trainer(*args, **changes)
    trainer.train()
    return steps(trainer.state.log_history)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(weight_teacher_by_label_prob=True, divergence="jensen_shannon", temperature=1.0),
        dict(teacher_schedule="adaptive", adaptive_window=2),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=3, divergence="reverse_kl"),
    ],
    ids=str,
)
def test_labels_of_nearly_all_tokens_train_as_the_teacher_itself(
    tmp_path, teacher, student, collator, clips, changes, monkeypatch
):
    monkeypatch.setattr("askd_hf.training.held_out.SHARE", 0.25)  # of 8 clips 2 are held out
    monkeypatch.setattr("askd_hf.training.held_out.MIN_CLIPS", 2)
    changes = dict(teacher_schedule="linear") | changes
    temperature = changes.get("temperature", 2.0)
    labelled = label(tmp_path / "cache", clips, collator, teacher, top_k=ALL_BUT_ONE, temperature=temperature)
    live = trained(tmp_path, student, clips, collator, teacher, **changes)
    cached = trained(tmp_path, student, labelled, collator, **changes)
    adaptive = changes["teacher_schedule"] == "adaptive"
    assert len(live["loss"]) == 10 and len(live["self_loss"]) == 4
    assert len(live["teacher_loss"]) == (10 if adaptive else 6)
    assert len(live["disputed_labels"]) == (9 if adaptive else 0)
    torch.testing.assert_close(cached, live, **TOLERANCE)
    assert not torch.equal(cached["teacher_loss"], live["teacher_loss"])  # it has been rounded


def test_with_fewer_tokens_only_the_divergence_is_less(tmp_path, teacher, student, collator, clips):
    one_step = dict(max_steps=1, teacher_phase_ratio=1.0, per_device_train_batch_size=8)
    last = torch.zeros(1)
    live = trained(tmp_path, student, clips, collator, teacher, **one_step)
    for top_k in (1, 3, 9, ALL_BUT_ONE):
        labelled = label(tmp_path / f"{top_k}", clips, collator, teacher, top_k=top_k)
        cached = trained(tmp_path, student, labelled, collator, **one_step)
        assert last < cached["teacher_loss"] < live["teacher_loss"] + 1e-3
        for name in ("ce_loss", "teacher_ce", "top1_agreement", "teacher_weight"):
            torch.testing.assert_close(cached[name], live[name])
        last = cached["teacher_loss"]
    assert last > 0.99 * live["teacher_loss"]


@pytest.mark.parametrize("own_encoder", [True, False], ids=["the student's own encoder", "the teacher's encoder"])
def test_cached_encoder_outputs_train_as_the_encoder_itself(
    tmp_path, processor, teacher, student, collator, clips, own_encoder
):
    """A teacher with another encoder still gets features, and one with the student's the cached outputs."""
    student = student if own_encoder else init_student(teacher)
    cache = encoded(student, processor, [clips], tmp_path / "encoder")
    plain = trained(tmp_path, student, clips, collator, teacher)
    both = SpeechCollator(
        processor, student.config, cache, teacher_extractor=processor.feature_extractor if own_encoder else None
    )
    trainer = make_trainer(tmp_path, student, clips, both, teacher)
    calls = {"student": 0, "teacher": 0}

    def count(name):
        calls[name] += 1

    trainer.model.model.encoder.register_forward_pre_hook(lambda *_: count("student"))
    trainer.teacher.model.encoder.register_forward_pre_hook(lambda *_: count("teacher"))
    trainer.train()
    assert calls == {"student": 0, "teacher": 6 if own_encoder else 0}
    torch.testing.assert_close(steps(trainer.state.log_history), plain, **TOLERANCE)
    if own_encoder:
        outputs_only = SpeechCollator(processor, student.config, cache)
        with pytest.raises(
            UserError, match=r"the teacher's encoder differs: create them with SpeechCollator\(.*teacher_extractor"
        ):
            trained(tmp_path, student, clips, outputs_only, teacher)


@pytest.mark.parametrize(
    "changes", [dict(freeze_encoder=False), dict(dropout=0.1), dict(apply_spec_augment=True)], ids=str
)
def test_cached_outputs_of_an_encoder_that_changes_are_refused(tmp_path, processor, student, clips, changes):
    cache = encoded(student, processor, [clips], tmp_path / "encoder")
    for name in changes.keys() - {"freeze_encoder"}:
        setattr(student.config, name, changes[name])
    changes = dict(preset="ce", teacher_weight=None, teacher_phase_ratio=None) | {
        name: value for name, value in changes.items() if name == "freeze_encoder"
    }
    with pytest.raises(UserError, match="cached encoder outputs require a frozen encoder without SpecAugment"):
        trained(tmp_path, student, clips, SpeechCollator(processor, student.config, cache), **changes)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("eval_teacher_losses", [False, True])
def test_evaluation_runs_the_encoder_once_or_not_and_the_teacher_only_if_asked(
    tmp_path, processor, teacher, student, clips, cached, eval_teacher_losses
):
    evaluation = speech(write_speech(tmp_path / "evaluation", 5, seed=3))
    collator = SpeechCollator(processor, student.config)
    with torch.no_grad():
        batch = collator(list(evaluation))
        real = batch["labels"] != -100
        logits = student.eval()(input_features=batch["input_features"], labels=batch["labels"]).logits
        expected = torch.nn.functional.cross_entropy(logits[real], batch["labels"][real]).item()
    if cached:
        cache = encoded(student, processor, [clips, evaluation], tmp_path / "encoder")
        collator = SpeechCollator(processor, student.config, cache, processor.feature_extractor)
    metrics = compute_metrics_for(processor, "auto")
    once = dict(max_steps=1, learning_rate=1e-30, preset="kd", teacher_phase_ratio=1.0, per_device_eval_batch_size=2)
    trainer = make_trainer(
        tmp_path,
        student,
        clips,
        collator,
        teacher,
        evaluation,
        metrics,
        eval_teacher_losses=eval_teacher_losses,
        **once,
    )
    trainer.train()
    calls = {"encoder": 0, "teacher": 0}

    def count(name):
        calls[name] += 1

    trainer.model.model.encoder.register_forward_pre_hook(lambda *_: count("encoder"))
    trainer.teacher.register_forward_pre_hook(lambda *_: count("teacher"))
    result = trainer.evaluate()
    batches = 3
    assert calls["encoder"] == (0 if cached else batches)
    assert calls["teacher"] == (batches if eval_teacher_losses else 0)
    assert result["eval_loss"] == pytest.approx(expected, rel=2e-3 if cached else 1e-5)
    assert {"eval_wer", "eval_cer"} <= result.keys()
    assert ({"eval_teacher_loss", "eval_total_loss", "eval_top1_agreement"} <= result.keys()) == eval_teacher_losses


# ---- the scripts ----


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    """Of another encoder than the teacher's."""
    student = init_student(make_whisper(make_processor(), seed=5), decoder_layers=2)
    return save(student, tmp_path_factory.mktemp("tiny-student"))


def save(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    make_processor().save_pretrained(directory)
    return directory


def arguments(output_dir, dataset, **more) -> list[str]:
    """6 steps, of which the teacher phase takes 4."""
    given = dict(output_dir=output_dir, dataset=dataset, max_steps=6, logging_steps=1, learning_rate=3e-3) | more
    given |= dict(per_device_train_batch_size=4, compare=False)
    given["teacher_phase_ratio"] = None if more.get("preset") == "ce" else 0.6
    return [
        "--use_cpu",
        *(text for name, value in given.items() if value is not None for text in (f"--{name}", f"{value}")),
    ]


def finished(monkeypatch, capsys, output_dir, dataset, **more) -> tuple[dict, str, str]:
    """A run of `distill.py`: what it logged and printed."""
    status, out, err = run_here(monkeypatch, capsys, *arguments(output_dir, dataset, **more))
    assert status == 0, err
    return steps(json.loads((output_dir / "trainer_state.json").read_text())["log_history"]), out, err


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_runs_with_caches_follow_the_run_without_and_the_second_computes_nothing(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    given = dict(teacher=teacher_dir, eval_splits="validation")
    caches = dict(cache_encoder=tmp_path / "encoder", cache_teacher=tmp_path / "labels", teacher_top_k=ALL_BUT_ONE)
    plain, out, _ = finished(monkeypatch, capsys, tmp_path / "plain", speech_dir, **given)
    assert "cached)" not in out
    first, out, err = finished(monkeypatch, capsys, tmp_path / "first", speech_dir, **given, **caches)
    assert "(0 of 22 cached)" in out and "(0 of 16 cached)" in out and "Encoder outputs: 22/22" in err
    second, out, err = finished(monkeypatch, capsys, tmp_path / "second", speech_dir, **given, **caches)
    assert "(22 of 22 cached)" in out and "(16 of 16 cached)" in out
    assert "Encoder outputs" not in err and "Soft labels" not in err
    assert len(plain["loss"]) == 6 and len(plain["teacher_loss"]) == 4
    torch.testing.assert_close(first, plain, **TOLERANCE)
    for name, weight in weights(tmp_path / "first").items():
        assert torch.equal(weights(tmp_path / "second")[name], weight), name
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [json.loads((tmp_path / run / "trainer_state.json").read_text()) for run in ("plain", "first")]
    evaluations = [[row["eval_loss"] for row in state["log_history"] if "eval_loss" in row] for state in states]
    assert evaluations[0] and evaluations[1] == pytest.approx(evaluations[0], rel=5e-3)


def test_a_student_with_another_encoder_than_its_teachers(
    monkeypatch, capsys, tmp_path, teacher_dir, student_dir, speech_dir
):
    """The encoder's cache is the student's, the teacher gets features."""
    given = dict(teacher=teacher_dir, student=student_dir)
    plain, _, _ = finished(monkeypatch, capsys, tmp_path / "plain", speech_dir, **given)
    labels = dict(cache_teacher=tmp_path / "labels", teacher_top_k=ALL_BUT_ONE)
    for name, more in {"cached": {}, "labelled": labels}.items():
        # each has a cache of its own, which it fills itself
        caches = dict(cache_encoder=tmp_path / f"encoder-{name}") | more
        cached, _, _ = finished(monkeypatch, capsys, tmp_path / name, speech_dir, **given, **caches)
        torch.testing.assert_close(cached, plain, **TOLERANCE)


@pytest.mark.slow
def test_labelled_speech_trains_students_without_the_teacher(
    monkeypatch, capsys, tmp_path, teacher_dir, student_dir, speech_dir
):
    labels = tmp_path / "labels"
    labelling = ["--use_cpu", "--teacher", teacher_dir, "--dataset", speech_dir, "--teacher_cache_dir", labels]
    labelling += ["--teacher_top_k", ALL_BUT_ONE, "--output_dir", tmp_path / "unused"]
    status, out, err = run_here(monkeypatch, capsys, *labelling, file=LABELLER)
    assert status == 0, err
    assert "(0 of 16 cached)" in out and f"16 labeled clips: --dataset {labels}" in out
    assert not (tmp_path / "unused").exists() and set(TEACHER_COLUMNS) <= set(load_from_disk(labels).column_names)
    live, _, _ = finished(monkeypatch, capsys, tmp_path / "live", speech_dir, teacher=teacher_dir, student=student_dir)
    alone, out, _ = finished(monkeypatch, capsys, tmp_path / "alone", labels, student=student_dir)
    torch.testing.assert_close(alone, live, **TOLERANCE)
    assert "cached)" not in out
    # with its teacher and the encoder's cache beside it
    both, out, _ = finished(
        monkeypatch, capsys, tmp_path / "both", labels,
        teacher=teacher_dir, student=student_dir, cache_encoder=tmp_path / "encoder",
    )  # fmt: skip
    torch.testing.assert_close(both, live, **TOLERANCE)
    # labels that aren't wanted are left alone, also where they wouldn't fit
    without = dict(student=student_dir, preset="ce")  # with temperature 1
    plain, _, _ = finished(monkeypatch, capsys, tmp_path / "plain", speech_dir, **without)
    finished(monkeypatch, capsys, tmp_path / "ignored", labels, **without)
    assert len(plain["teacher_loss"]) == 0
    for name, weight in weights(tmp_path / "plain").items():
        assert torch.equal(weights(tmp_path / "ignored")[name], weight), name
    for more, message in (
        (dict(temperature=3.0), "computed with temperature 2, the run's is 3"),
        (dict(eval_teacher_losses=True), "--eval_teacher_losses requires a teacher"),
    ):
        status, _, err = run_here(
            monkeypatch, capsys, *arguments(tmp_path / "run", labels, student=student_dir, **more)
        )
        assert status == 2 and message in err, err


def test_options_that_cannot_be_are_one_message(monkeypatch, capsys, tmp_path, teacher_dir, student_dir, speech_dir):
    augmented = save(make_whisper(make_processor(), apply_spec_augment=True), tmp_path / "augmented")
    encoder, labels = dict(cache_encoder=tmp_path / "encoder"), dict(cache_teacher=tmp_path / "labels")
    labels_5 = labels | dict(teacher_top_k=5)
    for more, message in (
        (
            dict(teacher=teacher_dir, freeze_encoder=False) | encoder,
            "--encoder_cache_dir requires a frozen encoder",
        ),
        (dict(teacher=augmented) | encoder, "--encoder_cache_dir requires a model without SpecAugment"),
        (dict(student=student_dir, preset="ce") | labels_5, "--teacher_cache_dir requires --teacher"),
        (dict(student=student_dir), "requires --teacher; without a teacher choose --preset ps-kd"),
        (
            dict(teacher=teacher_dir) | labels,
            "--teacher_top_k must be between 1 and 30, less than the vocabulary, got 32",
        ),
        (dict(teacher=teacher_dir, teacher_top_k=0) | labels, "--teacher_top_k must be at least 1, got 0"),
    ):
        status, _, err = run_here(monkeypatch, capsys, *arguments(tmp_path / "run", speech_dir, **more))
        assert status == 2 and re.search(rf"^error: .*{re.escape(message)}", err, re.MULTILINE), err
    assert {path.name for path in tmp_path.iterdir()} == {"augmented"}
    status, _, err = run_here(monkeypatch, capsys, "--teacher", teacher_dir, "--use_cpu", file=LABELLER)
    assert status == 2 and "error: --teacher and --teacher_cache_dir are required" in err
    for preset in ("ce", "ps-kd"):
        for_nobody = ["--teacher", teacher_dir, "--dataset", speech_dir, "--teacher_cache_dir", tmp_path / "labels"]
        status, out, err = run_here(monkeypatch, capsys, *for_nobody, "--use_cpu", "--preset", preset, file=LABELLER)
        assert (
            status == 2
            and f"error: --teacher_cache_dir has no effect: --preset {preset} has no teacher" in err
            and "labeled clips" not in out
        )


def test_clips_skipped_in_labelling_are_listed_beside_the_labels(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    bad = shutil.copytree(speech_dir, tmp_path / "bad")
    (bad / "train" / "audio" / "003.wav").write_bytes(b"this is not audio at all")
    labelling = ["--use_cpu", "--teacher", teacher_dir, "--dataset", bad, "--on_bad_audio", "skip"]
    labelling += ["--teacher_cache_dir", f"{tmp_path / 'labels'}/", "--teacher_top_k", 5]
    for there in (0, 15):
        status, out, err = run_here(monkeypatch, capsys, *labelling, file=LABELLER)
        assert status == 0, err
        assert f"({there} of 15 cached)" in out and "15 labeled clips: --dataset" in out
    assert "3,train/audio/003.wav," in (tmp_path / "labels.skipped" / "skipped-training-bad.csv").read_text()
    assert len(load_from_disk(tmp_path / "labels")) == 15


def test_too_little_memory_for_a_cache_names_the_option(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("askd_hf.data.encoder_cache.run_encoder", full)
    given = dict(teacher=teacher_dir, cache_encoder=tmp_path / "encoder")
    status, _, err = run_here(monkeypatch, capsys, *arguments(tmp_path / "run", speech_dir, **given))
    assert status == 2 and "out of memory while a cache is filled: lower --per_device_eval_batch_size" in err


@pytest.mark.slow
def test_a_killed_run_with_caches_resumes_to_the_same_weights(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    given = dict(teacher=teacher_dir, save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=12)
    given |= dict(cache_encoder=tmp_path / "encoder", cache_teacher=tmp_path / "labels", teacher_top_k=5)
    given |= dict(logging_steps=1)
    finished(monkeypatch, capsys, tmp_path / "whole", speech_dir, **given)
    there = (tmp_path / "killed" / "checkpoint-3").exists
    killed = killed_when(there, SCRIPT, *arguments(tmp_path / "killed", speech_dir, **given))
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    steps_done = int(checkpoint_to_resume(str(tmp_path / "killed"), "last").rpartition("-")[2])
    _, out, _ = finished(monkeypatch, capsys, tmp_path / "killed", speech_dir, **given, resume_from_checkpoint="last")
    assert len(steps_printed(out)) == 12 - steps_done  # and it didn't begin at the beginning
    assert "(16 of 16 cached)" in out
    a, b = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fill_caches(directory, processor, teacher, clips, **changes) -> tuple[torch.Tensor, list]:
    """What a run with the options `changes` puts into both caches: encoder outputs, and the teacher's log-probs."""
    encoder = CacheArguments(encoder_cache_dir=str(directory / "encoder"))
    labels = CacheArguments(teacher_cache_dir=str(directory / "labels"), teacher_top_k=8)
    config, model = ASKDConfig(**options(directory / "run", **changes)), copy.deepcopy(teacher)
    own = SpeechCollator(processor, model.config)
    counters.clear()
    outputs = with_encoder_cache(own, model, [clips], encoder, config).encoder_cache.read(clips["audio_key"])
    encoders = counters["stats"]["unique_graphs"]
    assert model.model.encoder._compiled_call_impl is None  # no compiled model is left behind
    labeled = with_soft_labels(clips, model, own, ModelArguments(teacher="tiny"), labels, config)
    compiled = counters["stats"]["unique_graphs"] - encoders
    assert (encoders > 0) == (compiled > 0) == config.torch_compile
    return outputs, labeled["teacher_log_probs"][:]


def test_caches_that_a_device_fills_are_those_of_the_cpu(tmp_path, processor, teacher, clips, device):
    expected = fill_caches(tmp_path / "cpu", processor, teacher, clips)
    outputs, log_probs = fill_caches(tmp_path / "device", processor, teacher, clips, **on(device))
    torch.testing.assert_close(outputs.float(), expected[0].float(), **TOLERANCE)
    for ours, theirs in zip(log_probs, expected[1], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-2, atol=1e-2)


def test_caches_that_compiled_models_fill_are_the_same(tmp_path, processor, teacher, clips, compiling):
    device, compiled = compiling
    expected = fill_caches(tmp_path / "plain", processor, teacher, clips, **on(device))
    outputs, log_probs = fill_caches(tmp_path / "compiled", processor, teacher, clips, **on(device), **compiled)
    close = TOLERANCE if device == "cuda" else dict(rtol=0, atol=0)
    torch.testing.assert_close(outputs.float(), expected[0].float(), **close)
    for ours, theirs in zip(log_probs, expected[1], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), **close)
