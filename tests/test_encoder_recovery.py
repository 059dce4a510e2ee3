"""A pruned encoder is trained on audio alone, until it gives the whole encoder's outputs, and then frozen."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from models import make_processor, make_whisper
from safetensors.torch import load_file
from scripts import distill_options as options
from scripts import run_here
from speech import write_csv, write_speech
from transformers import TrainingArguments, WhisperForConditionalGeneration

from askd_hf.arguments import ModelArguments
from askd_hf.data import Limits, audio_checks, filter_invalid_clips, load_speech_dataset
from askd_hf.data import audio as audio_module
from askd_hf.data.audio import decode_audio, read_audio
from askd_hf.errors import UserError
from askd_hf.models.student import init_student
from askd_hf.training import encoder_recovery
from askd_hf.training.encoder_recovery import AudioWindows, EncoderRecovery, EncoderRecoveryTrainer, learning_rate

MORE = ["--encoder_layers", "0,1,3", "--encoder_recovery_epochs", 2, "--num_train_epochs", 1]


def encoder_weights(directory) -> dict[str, torch.Tensor]:
    weights = load_file(directory / "model.safetensors")
    return {n.removeprefix("model.encoder."): w for n, w in weights.items() if n.startswith("model.encoder.")}


def distance(model: WhisperForConditionalGeneration, whole: WhisperForConditionalGeneration, speech_dir) -> float:
    """Return the mean squared difference of the encoders' outputs on the clips."""
    total, files = 0.0, sorted(speech_dir.rglob("*.wav"))
    for file in files:
        wave, _ = soundfile.read(file, dtype="float32")
        features = make_processor().feature_extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            outputs = [one.eval().model.encoder(features).last_hidden_state for one in (model, whole)]
        total += float(((outputs[0] - outputs[1]) ** 2).mean())
    return total / len(files)


def test_the_layers_learn_and_stay(monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir):
    monkeypatch.setattr(encoder_recovery, "LEARNING_RATE", 1e-2)
    caches = ["--encoder_cache_dir", tmp_path / "encoder", "--teacher_cache_dir", tmp_path / "t", "--teacher_top_k", 5]
    run = tmp_path / "run"
    status, _, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, run, *MORE, *caches))
    assert status == 0, err
    recovered, student = load_file(run / "encoder_recovery" / "encoder.safetensors"), encoder_weights(run)
    whole = encoder_weights(deep_teacher_dir)
    assert recovered.keys() == student.keys() and all(torch.equal(recovered[n], student[n]) for n in student)
    for name, weight in student.items():
        layer = re.match(r"layers\.(\d)\.", name)
        old = name if layer is None else name.replace("layers.2.", "layers.3.", 1)
        is_equal = torch.equal(weight, whole[old])
        # a bias of the keys has no gradient: it shifts all scores of a query alike
        assert is_equal == (layer is None or "k_proj.bias" in name), name
    teacher = WhisperForConditionalGeneration.from_pretrained(deep_teacher_dir)
    before = distance(init_student(teacher, 2, "0,1,3"), teacher, speech_dir)
    after = distance(WhisperForConditionalGeneration.from_pretrained(run), teacher, speech_dir)
    assert after < 0.7 * before
    assert "first trained for 2 epochs on audio alone" in (run / "README.md").read_text()
    facts = json.loads((run / "training.json").read_text())
    assert facts["arguments"]["freeze_encoder"] is True and facts["provenance"]["copied_encoder_layers"] == [0, 1, 3]
    assert not list((run / "encoder_recovery").glob("checkpoint-*"))


@pytest.mark.parametrize("last", [6, 8])
def test_a_run_interrupted_in_the_recovery_resumes_to_the_same_encoder(
    monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir, last
):
    monkeypatch.setattr(encoder_recovery, "BATCH_SIZE", 4)
    status, _, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, tmp_path / "whole", *MORE))
    assert status == 0, err
    calls, compute_loss = [], EncoderRecoveryTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == last:  # of 8
            os.kill(os.getpid(), signal.SIGINT)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(EncoderRecoveryTrainer, "compute_loss", interrupted)
    run = options(deep_teacher_dir, speech_dir, tmp_path / "run", *MORE)
    status, out, err = run_here(monkeypatch, capsys, *run)
    assert status == 130 and f"stopped in the recovery of the encoder after step {last}" in out, err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    recovery = tmp_path / "run" / "encoder_recovery"
    changed = {"layers": ["--encoder_layers", "0,2,3"], "epochs": ["--encoder_recovery_epochs", 3]}
    for name, option in changed.items():
        status, _, err = run_here(monkeypatch, capsys, *run, *option, "--resume_from_checkpoint", "last")
        assert status == 2 and f"encoder_recovery was recovered with other values of {name}: resume with" in err, err
        assert len(calls) == last and not (recovery / "encoder.safetensors").exists()
    status, _, err = run_here(monkeypatch, capsys, *run, "--resume_from_checkpoint", "last")
    assert status == 0 and len(calls) == 8, err
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "model.safetensors").rename(tmp_path / "run" / "student")
    other = [*run, "--encoder_layers", "0,2,3", "--resume_from_checkpoint", "last"]
    status, _, err = run_here(monkeypatch, capsys, *other)
    assert status == 2 and "was recovered with other values of layers" in err
    (tmp_path / "run" / "student").rename(tmp_path / "run" / "model.safetensors")
    for name, weight in encoder_weights(tmp_path / "whole").items():
        assert torch.equal(weight, encoder_weights(tmp_path / "run")[name]), name


def test_a_checkpoint_of_another_directory_brings_its_recovered_encoder(
    monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir
):
    first = options(deep_teacher_dir, speech_dir, tmp_path / "first", *MORE, "--compare", "False")
    status, _, err = run_here(monkeypatch, capsys, *first)
    assert status == 0, err
    calls, train = [], EncoderRecovery._train
    monkeypatch.setattr(EncoderRecovery, "_train", lambda *args, **limits: calls.append(1) or train(*args, **limits))
    (checkpoint,) = (tmp_path / "first").glob("checkpoint-*")
    moved = options(deep_teacher_dir, speech_dir, tmp_path / "moved", *MORE, "--compare", "False")
    moved += ["--resume_from_checkpoint", str(checkpoint)]
    status, out, err = run_here(monkeypatch, capsys, *moved, "--dry_run")
    assert status == 0 and "finished by the earlier run" in out, err
    status, _, err = run_here(monkeypatch, capsys, *moved)
    assert status == 0 and not calls, err
    encoders = [load_file(tmp_path / name / "encoder_recovery" / "encoder.safetensors") for name in ("first", "moved")]
    assert all(torch.equal(weight, encoders[1][name]) for name, weight in encoders[0].items())
    status, _, err = run_here(monkeypatch, capsys, *moved, "--encoder_layers", "0,2,3")
    assert status == 2 and "was recovered with other values of layers" in err


def test_a_student_loses_further_layers_and_recovers_to_itself(
    monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir
):
    """The target is the encoder of --student, not the teacher's."""
    student = init_student(WhisperForConditionalGeneration.from_pretrained(deep_teacher_dir), 1)
    with torch.no_grad():
        for parameter in student.model.encoder.parameters():
            parameter += 0.02
    student.save_pretrained(tmp_path / "student")
    make_processor().save_pretrained(tmp_path / "student")
    monkeypatch.setattr(encoder_recovery, "LEARNING_RATE", 1e-2)
    more = [*MORE, "--student", tmp_path / "student", "--encoder_recovery_epochs", 10]
    run = options(deep_teacher_dir, speech_dir, tmp_path / "run", *more)
    status, _, err = run_here(monkeypatch, capsys, *run)
    assert status == 0, err
    found = WhisperForConditionalGeneration.from_pretrained(tmp_path / "run")
    teacher = WhisperForConditionalGeneration.from_pretrained(deep_teacher_dir)
    assert distance(found, student, speech_dir) < distance(found, teacher, speech_dir)


def test_clips_per_step_do_not_depend_on_those_that_fit_in_memory(
    monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir
):
    """Whole batches, and parts of them with activation checkpointing."""
    encoders = []
    for name, size, more in (("whole", 16, []), ("parts", 6, ["--activation_checkpointing", "True"])):
        given = [*MORE, "--per_device_train_batch_size", size, *more]
        status, _, err = run_here(monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, tmp_path / name, *given))
        assert status == 0, err
        encoders.append(load_file(tmp_path / name / "encoder_recovery" / "encoder.safetensors"))
    torch.testing.assert_close(encoders[1], encoders[0], atol=1e-5, rtol=1e-4)


def test_recheck_decodes_the_further_audio_again(monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir):
    audio, decoded = write_speech(tmp_path / "audio", clips=3, seed=4), []

    def read(clip):
        decoded.append(Path(clip["path"]))
        return read_audio(clip)

    monkeypatch.setattr(audio_checks, "kept_in", lambda: tmp_path / "kept")
    monkeypatch.setattr(audio_checks, "read_audio", read)
    more = [*MORE, "--encoder_recovery_dataset", audio, "--encoder_recovery_epochs", 1, "--compare", "False"]
    for recheck in (False, True):
        run = options(deep_teacher_dir, speech_dir, tmp_path / f"run-{recheck}", *more, "--recheck", recheck)
        status, _, err = run_here(monkeypatch, capsys, *run)
        assert status == 0, err
        assert len(decoded) == 16 + 3 and sum(audio in path.parents for path in decoded) == 3
        decoded.clear()


def test_long_recordings_are_cut_into_windows(tmp_path):
    for name, seconds in (("a", 0.4), ("b", 2.5)):
        soundfile.write(tmp_path / f"{name}.wav", np.arange(int(seconds * 16_000)) / 50_000, 16_000)
    write_csv(tmp_path / "metadata.csv", [["file_name"], ["a.wav"], ["b.wav"]])
    clips = load_speech_dataset(str(tmp_path), None, "train", text_required=False)
    clips = filter_invalid_clips(clips, None, Limits(float("inf")), on_bad_audio="error")
    windows = [wave.numpy() for wave in AudioWindows([clips], 1.0)]
    assert [len(wave) for wave in windows] == [6400, 16_000, 16_000, 8000]
    assert windows[2][0] == pytest.approx(16_000 / 50_000, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype", "whole"),
    [
        ("a.wav", 16_000, 1, "PCM_16", False),
        ("a.wav", 16_000, 2, "FLOAT", False),
        ("a.wav", 16_000, 2, "PCM_24", False),
        ("a.flac", 16_000, 1, "PCM_16", False),
        ("a.flac", 16_000, 2, "PCM_24", False),
        ("a.flac", 22_050, 1, "PCM_16", True),
        ("a.wav", 16_000, 1, "MS_ADPCM", True),
        ("a.ogg", 16_000, 1, "VORBIS", True),
        ("a.mp3", 16_000, 1, "MPEG_LAYER_III", True),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_window_is_decoded_alone_and_has_the_samples_of_the_whole_file(
    monkeypatch, tmp_path, name, rate, channels, subtype, whole, in_memory
):
    samples = 0.1 * np.random.default_rng(0).standard_normal((int(3.3 * rate), channels))
    soundfile.write(tmp_path / name, samples, rate, subtype=subtype)
    audio = {"path": str(tmp_path / name), "bytes": (tmp_path / name).read_bytes() if in_memory else None}
    expected, calls = decode_audio(audio), []
    row = {"audio": audio, "clip": name, "duration": len(expected) / 16_000}
    monkeypatch.setattr(audio_module, "decode_audio", lambda audio: calls.append(1) or decode_audio(audio))
    windows = [wave.numpy() for wave in AudioWindows([Dataset.from_list([row])], 1.0)]
    assert len(windows) == 4 and np.array_equal(np.concatenate(windows), expected)
    assert len(calls) == (4 if whole else 0)


@pytest.mark.parametrize(("width", "expected"), [(16, 1e-3), (384, 1e-3), (768, 5e-4), (1280, 3e-4)])
def test_wider_encoders_have_a_lower_learning_rate(width, expected):
    assert learning_rate(width) == pytest.approx(expected)


def test_a_recovered_encoder_of_another_window_or_selection_is_refused(tmp_path, processor):
    whole = make_whisper(processor, encoder_layers=4, max_source_positions=100)

    def recovery(selection: str = "spread", **window) -> EncoderRecovery:
        models = ModelArguments(teacher="teacher", encoder_layers="2", layer_selection=selection)
        student = init_student(whole, 2, encoder_layers=2, **window)
        return EncoderRecovery(models, None, student, whole, None, None, 1, None)

    file = tmp_path / "encoder.safetensors"
    recovery(window_seconds=1)._save(file)
    recovery(window_seconds=1)._load(file)
    with pytest.raises(UserError, match="other values of window"):
        recovery()._load(file)
    with pytest.raises(UserError, match="other values of merged layers"):
        recovery("merged", window_seconds=1)._load(file)


def test_the_target_is_computed_in_the_precision_of_the_run(tmp_path, processor):
    whole = make_whisper(processor)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to=[])
    trainer = EncoderRecoveryTrainer(init_student(whole, 2).model.encoder, args, whole.model.encoder)
    dtypes = []
    whole.model.encoder.layers[0].fc1.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    features = torch.zeros(1, whole.config.num_mel_bins, 2 * whole.config.max_source_positions)
    trainer.compute_loss(trainer.model, {"input_features": features})
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("seconds", [1, None])
def test_the_target_is_the_whole_encoder_without_dropout_on_the_same_window(tmp_path, processor, seconds):
    """An encoder that has lost nothing has nothing to recover, also with a shorter window than the whole one's."""
    whole = make_whisper(processor, dropout=0.5, max_source_positions=100).train()
    student = init_student(whole, 2, window_seconds=seconds).eval()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = EncoderRecoveryTrainer(student.model.encoder, args, whole.model.encoder)
    frames = 2 * student.config.max_source_positions
    features = torch.randn(2, student.config.num_mel_bins, frames, generator=torch.Generator().manual_seed(0))
    loss = trainer.compute_loss(student.model.encoder, {"input_features": features})
    assert loss.item() == pytest.approx(0.0, abs=1e-9)


def test_a_missing_dataset_of_the_recovery_is_found_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    given = ["--teacher", tmp_path / "no-teacher", "--dataset", tmp_path, "--encoder_layers", 2]
    ended = run_here(monkeypatch, capsys, *given, "--encoder_recovery_dataset", tmp_path / "nothing")
    assert ended.returncode == 2 and f"{tmp_path / 'nothing'}" in ended.stderr.strip().splitlines()[-1]
