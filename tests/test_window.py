"""Students with a shorter audio window, and batches with a random audio context."""

import copy
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from models import make_processor, make_whisper
from safetensors.torch import load_file
from scripts import ROOT, run_here
from speech import write_speech
from training import history, options
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, pipeline
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from askd_hf import ASKDConfig, ASKDTrainer
from askd_hf.arguments import ModelArguments
from askd_hf.arguments.ranges import parse_window
from askd_hf.data import SpeechCollator, decode_audio, load_speech_dataset, run_encoder
from askd_hf.data.audio_context import CONTEXT_MARGIN
from askd_hf.errors import UserError
from askd_hf.evaluation.results import CLIP_CONTEXT, Results
from askd_hf.models.layer_selection import select_decoder_layers, select_encoder_layers
from askd_hf.models.loading import load_processor
from askd_hf.models.student import init_student
from askd_hf.models.window import with_window_of

SECONDS = 4  # the teacher's window


def long_processor() -> WhisperProcessor:
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS), make_processor().tokenizer)


@pytest.fixture
def wide() -> WhisperForConditionalGeneration:
    """A teacher with a window of 4 s."""
    return make_whisper(make_processor(), max_source_positions=50 * SECONDS).eval()


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wide")
    make_whisper(make_processor(), max_source_positions=50 * SECONDS).save_pretrained(directory)
    long_processor().save_pretrained(directory)
    return directory


def masked_logits(model, features: torch.Tensor, positions: int, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of the whole model if neither encoder nor decoder attends to positions beyond the window."""
    features = features.clone()
    features[..., 2 * positions :] = 0.0  # as the padding of the convolutions
    encoder = model.model.encoder
    hidden = torch.nn.functional.gelu(encoder.conv1(features))
    hidden = torch.nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2) + encoder.embed_positions.weight
    mask = torch.zeros(1, 1, hidden.shape[1], hidden.shape[1])
    mask[..., positions:] = float("-inf")
    for layer in encoder.layers:
        hidden = layer(hidden, attention_mask=mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    hidden = encoder.layer_norm(hidden)[:, :positions]
    decoded = model.model.decoder(input_ids=tokens, encoder_hidden_states=hidden).last_hidden_state
    return model.proj_out(decoded)


def test_logits_are_those_of_the_whole_window_without_the_positions_beyond(wide):
    student = init_student(wide, 4, window_seconds=1).eval()
    assert student.config.max_source_positions == 50
    torch.manual_seed(0)
    features, tokens = torch.randn(2, 8, 100 * SECONDS), torch.randint(0, 26, (2, 5))
    with torch.no_grad():
        logits = student(input_features=features[..., :100], decoder_input_ids=tokens).logits
        expected = masked_logits(wide, features, 50, tokens)
        whole = wide(input_features=features, decoder_input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (logits - whole).abs().max() > 1e-2  # the positions beyond matter
    assert wide.config.max_source_positions == 50 * SECONDS and len(wide.model.encoder.embed_positions.weight) == 200


def test_a_whole_window_changes_nothing(wide):
    plain, same = init_student(wide, 2), init_student(wide, 2, window_seconds=SECONDS)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name
    assert plain.config.to_dict() == same.config.to_dict()


def test_shorter_features_give_the_outputs_of_a_shorter_window(wide):
    """The audio context, against a model whose window is that context."""
    short = init_student(wide, window_seconds=2).eval()
    features = torch.randn(3, 8, 200)
    with torch.no_grad():
        outputs = run_encoder(wide.model.encoder, features)
        torch.testing.assert_close(outputs, short.model.encoder(features).last_hidden_state)
    assert wide.config.max_source_positions == 200  # as before
    with pytest.raises(ValueError, match="even and at most 400"):
        run_encoder(wide.model.encoder, torch.randn(1, 8, 402))


def test_features_are_the_first_of_the_whole_window(wide):
    extractor = long_processor().feature_extractor
    short = with_window_of(init_student(wide, window_seconds=2), long_processor()).feature_extractor
    wave = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    whole, cut = (e(wave, sampling_rate=16_000, return_tensors="np").input_features for e in (extractor, short))
    assert cut.shape == (1, 8, 200)
    np.testing.assert_allclose(cut, whole[..., :200], atol=1e-5)
    assert {
        **short.to_dict(),
        "chunk_length": SECONDS,
        "n_samples": 64000,
        "nb_max_frames": 400,
    } == extractor.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "must be between 1 and 30"),
        ("31", "must be between 1 and 30"),
        ("10-3", "a range must be ascending, got 10-3"),
        ("6.5", "must be a whole number of seconds such as 6, or a range such as 3-10, got '6.5'"),
        ("3-6-9", "must be a whole number"),
        ("", "must be a whole number"),
        ("-3", "must be a whole number"),
    ],
)
def test_wrong_windows_are_one_line_before_anything_is_loaded(value, message):
    with pytest.raises(UserError, match="--window_seconds .*" + re.escape(message)):
        ModelArguments(teacher="there-is-none", window_seconds=value)


def test_windows_are_parsed():
    assert parse_window("6") == (6, 6) and parse_window("3-10") == (3, 10) and parse_window("5-5") == (5, 5)


def run(monkeypatch, capsys, *arguments):
    command = "--use_cpu --num_train_epochs 2 --per_device_train_batch_size 4 --learning_rate 1e-2"
    command += " --teacher_top_k 8" * ("--teacher_cache_dir" in arguments)
    return run_here(monkeypatch, capsys, *command.split(), *map(str, arguments))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--window_seconds", "5"], "--window_seconds must be at most 4, the teacher's window, got 5"),
        (
            ["--window_seconds", "2", "--student", "{wide}"],
            "--window_seconds with --student, which has its own window",
        ),
        (["--window_seconds", "1-2", "--student", "{wide}"], "must end at the student's window, 4 s, got 1-2"),
        (
            ["--window_seconds", "1-2", "--encoder_cache_dir", "{out}/c"],
            "a range of --window_seconds can't be combined",
        ),
    ],
)
def test_windows_that_do_not_fit_are_refused(monkeypatch, capsys, tmp_path, wide_dir, speech_dir, given, message):
    given = [option.format(wide=wide_dir, out=tmp_path) for option in given]
    ended = run(
        monkeypatch, capsys, "--teacher", wide_dir, "--dataset", speech_dir, "--output_dir", tmp_path / "run", *given
    )
    assert ended.returncode == 2 and message in ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("caches", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["cached", "live"])
def test_a_student_with_a_window_is_made_trained_and_loaded_anywhere(
    monkeypatch, capsys, tmp_path, wide_dir, speech_dir, caches
):
    out = tmp_path / "run"
    given = ["--encoder_cache_dir", tmp_path / "e", "--teacher_cache_dir", tmp_path / "t"] if caches else []
    ended = run(
        monkeypatch,
        capsys,
        *("--teacher", wide_dir, "--dataset", speech_dir, "--output_dir", out, "--window_seconds", 2),
        *("--eval_splits", "validation", *given),
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads((out / "config.json").read_text())["max_source_positions"] == 100
    assert load_processor(str(out)).feature_extractor.n_samples == 32_000
    recognize = pipeline("automatic-speech-recognition", model=str(out))
    wave = np.random.default_rng(0).standard_normal(5 * 16_000).astype(np.float32)
    assert isinstance(recognize({"raw": wave, "sampling_rate": 16_000}, chunk_length_s=2)["text"], str)
    if caches:  # half the positions of the teacher's window, 16 values each, as float16
        (part,) = (tmp_path / "e").glob("*/part-*.f16")
        assert part.stat().st_size == 22 * 100 * 16 * 2
    card = (out / "README.md").read_text()
    assert "The audio window is 2 s." in card


def test_layers_are_selected_with_the_window_of_the_student(wide):
    """Greedily, by the whole teacher on shorter features; as by a teacher with that window."""
    torch.manual_seed(0)
    labels = torch.randint(0, 26, (2, 5))
    batches = [{"input_features": torch.randn(2, 8, 200), "labels": labels}]
    for select in (select_encoder_layers, select_decoder_layers):
        reports: list[list[str]] = [[], []]
        for model, report in zip((wide, init_student(wide, 4, window_seconds=2).eval()), reports, strict=True):
            select(model, batches, 1, report.append)
        assert reports[0] == reports[1] != []
    assert wide.config.max_source_positions == 50 * SECONDS


def test_the_teachers_labels_are_computed_from_the_cache_of_its_whole_encoder(
    monkeypatch, capsys, tmp_path, wide_dir, speech_dir
):
    """A run with the whole window fills the cache that a later run with a shorter one takes the teacher's part of."""
    frames: list[int] = []
    forward = WhisperEncoder.forward

    def watched(self, input_features, *args, **kwargs):
        frames.append(input_features.shape[-1])
        return forward(self, input_features, *args, **kwargs)

    monkeypatch.setattr(WhisperEncoder, "forward", watched)
    common = ("--teacher", wide_dir, "--dataset", speech_dir, "--preset", "kd", "--max_steps", 2, "--compare", "False")

    def labels_of(name: str, *given) -> list:
        frames.clear()
        caches = ("--teacher_cache_dir", tmp_path / name, "--output_dir", tmp_path / f"run-{name}")
        ended = run(monkeypatch, capsys, *common, *caches, *given)
        assert ended.returncode == 0, ended.stderr
        return load_from_disk(str(tmp_path / name))["teacher_log_probs"][:]

    short = ("--window_seconds", 2)
    expected = labels_of("alone", *short, "--encoder_cache_dir", tmp_path / "other")
    assert {200, 400} == set(frames)  # without the cache of the whole encoder it has to run
    labels_of("whole", "--encoder_cache_dir", tmp_path / "e")
    cached = labels_of("short", *short, "--encoder_cache_dir", tmp_path / "e")
    assert set(frames) == {200}
    assert all(np.allclose(ours, theirs, atol=2e-3) for ours, theirs in zip(cached, expected, strict=True))


def test_clips_beyond_the_window_are_named_or_skipped(monkeypatch, capsys, tmp_path, wide_dir):
    speech = write_speech(tmp_path / "speech", clips=6)
    import soundfile

    wave = np.random.default_rng(0).standard_normal(40_000) * 0.1
    soundfile.write(speech / "audio" / "001.wav", wave, 16_000)
    common = ("--teacher", wide_dir, "--dataset", speech, "--window_seconds", 2, "--compare", "False")
    ended = run(monkeypatch, capsys, *common, "--output_dir", tmp_path / "a")
    assert ended.returncode == 2 and "row 1, audio/001.wav: too long: 2.50 s, the limit is 2 s" in ended.stderr
    ended = run(monkeypatch, capsys, *common, "--output_dir", tmp_path / "b", "--long_clips", "skip")
    assert ended.returncode == 0, ended.stderr
    (skipped,) = (tmp_path / "b").glob("skipped-training-*.csv")
    assert "1,audio/001.wav,longer than the window of 2 s: 2.50 s" in skipped.read_text()


# ---- random audio context ----


def rows(lengths, epoch: int = 0) -> list[dict]:
    """Training rows of noise, `lengths` seconds each."""
    noise = np.random.default_rng(1).standard_normal(SECONDS * 16_000).astype(np.float32) * 0.1
    return [
        {
            "audio": {"array": noise[: int(16_000 * seconds)], "sampling_rate": 16_000},
            "text": "abc",
            "clip": f"clip-{number}",
            "rng_key": (7, epoch, number),
        }
        for number, seconds in enumerate(lengths)
    ]


def test_contexts_are_between_the_clips_and_the_window(wide):
    collator = SpeechCollator(long_processor(), wide.config, shortest_context=2.0, teacher_extractor=None)
    frames = [collator(rows([0.5, 1.0], epoch))["input_features"].shape[-1] for epoch in range(200)]
    assert min(frames) >= 200 and max(frames) <= 400 and len(set(frames)) > 50 and not any(f % 2 for f in frames)
    assert min(frames) < 215 and max(frames) > 385  # both ends occur
    longer = [collator(rows([0.5, 2.5], epoch))["input_features"].shape[-1] for epoch in range(100)]
    assert min(longer) >= 100 * (2.5 + CONTEXT_MARGIN) and min(longer) < 330
    assert collator(rows([3.9]))["input_features"].shape[-1] == 400  # no room for the margin
    assert frames[:5] == [collator(rows([0.5, 1.0], epoch))["input_features"].shape[-1] for epoch in range(5)]
    evaluation = [{key: value for key, value in row.items() if key != "rng_key"} for row in rows([0.5])]
    assert collator(evaluation)["input_features"].shape[-1] == 400
    features = collator(rows([0.5, 1.0]))["input_features"]
    whole = SpeechCollator(long_processor(), wide.config)(rows([0.5, 1.0]))["input_features"]
    assert torch.equal(features, whole[..., : features.shape[-1]])


def test_the_teacher_takes_its_whole_window_whatever_the_context(monkeypatch, capsys, tmp_path, wide_dir, speech_dir):
    lengths = {"student": set(), "teacher": set()}
    forward = WhisperForConditionalGeneration.forward

    def watched(self, *args, **kwargs):
        features = kwargs.get("input_features")
        if features is None:
            lengths["student"].add(kwargs["encoder_outputs"][0].shape[1])
        else:
            lengths["teacher"].add(features.shape[-1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WhisperForConditionalGeneration, "forward", watched)
    out = tmp_path / "run"
    ended = run(
        monkeypatch,
        capsys,
        *("--teacher", wide_dir, "--dataset", speech_dir, "--output_dir", out, "--window_seconds", "1-4"),
        *("--preset", "kd", "--compare", "False"),
    )
    assert ended.returncode == 0, ended.stderr
    assert lengths["teacher"] == {400}
    assert len(lengths["student"]) > 3 and max(lengths["student"]) <= 200


def test_random_contexts_without_features_for_the_teacher_are_refused(tmp_path, wide, speech_dir):
    student, processor = init_student(wide, 2), long_processor()

    def trainer(collator: SpeechCollator, preset: str) -> ASKDTrainer:
        config = ASKDConfig(**options(tmp_path, max_steps=1, preset=preset))
        speech = load_speech_dataset(str(speech_dir), None, "train")
        return ASKDTrainer(copy.deepcopy(student), config, wide, train_dataset=speech, data_collator=collator)

    collator = SpeechCollator(processor, student.config, shortest_context=1.0)
    with pytest.raises(UserError, match=r"no features for it: create them with .*teacher_extractor="):
        trainer(collator, "kd")
    trainer(collator, "ce").train()  # without a teacher
    collator = replace(collator, teacher_extractor=processor.feature_extractor)
    run = trainer(collator, "kd")
    run.train()
    assert math.isfinite(history(run, "teacher_loss").item())


def test_a_run_with_random_contexts_reports_both_contexts(monkeypatch, capsys, tmp_path, wide_dir):
    """In its comparison, its speed and its card."""
    for split in ("train", "validation"):
        write_speech(tmp_path / "speech" / split, clips=4)
    common = ("--teacher", wide_dir, "--dataset", tmp_path / "speech", "--eval_splits", "validation")
    ended = run(monkeypatch, capsys, *common, "--output_dir", tmp_path / "run", "--window_seconds", "1-4")
    assert ended.returncode == 0, ended.stderr
    results = Results.load(tmp_path / "run" / "evaluation" / "results.json")
    assert results.models.keys() == {"student", CLIP_CONTEXT, "initial student", "teacher"}
    assert {row.role for row in results.speed.rows} == {"student", CLIP_CONTEXT, "teacher"}
    assert (tmp_path / "run" / "README.md").read_text().count(f"| {CLIP_CONTEXT} | ") > 2


def test_a_run_with_random_contexts_resumes_bit_exactly(monkeypatch, capsys, tmp_path, wide_dir, speech_dir):
    common = ("--teacher", wide_dir, "--dataset", speech_dir, "--window_seconds", "1-3", "--compare", "False")
    common += ("--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 9, "--logging_steps", 1)
    common += ("--teacher_cache_dir", tmp_path / "t")
    assert run(monkeypatch, capsys, *common, "--output_dir", tmp_path / "a").returncode == 0
    weights = load_file(tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "model.safetensors").unlink()
    resumed = ("--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3")
    ended = run(monkeypatch, capsys, *common, "--output_dir", tmp_path / "a", *resumed)
    assert ended.returncode == 0 and "resumed at step 3" in ended.stdout, ended.stderr
    again = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    changed = run(monkeypatch, capsys, *common, "--output_dir", tmp_path / "a", *resumed, "--window_seconds", "2-3")
    assert changed.returncode == 2 and "shortest_context 1.0 -> 2.0" in changed.stderr


def test_a_trained_encoder_is_compared_on_the_positions_that_both_have(tmp_path, wide, speech_dir):
    """The hidden-state loss of a student with the teacher's layers and a shorter window, by hand."""
    student = init_student(wide, 2, window_seconds=1)
    processor = with_window_of(student, long_processor())
    collator = SpeechCollator(processor, student.config, teacher_extractor=long_processor().feature_extractor)
    speech = load_speech_dataset(str(speech_dir), None, "train").select(range(4))
    batch = collator(list(speech))
    tokens = dict(decoder_input_ids=batch["decoder_input_ids"], output_hidden_states=True)
    with torch.no_grad():
        ours = student.eval()(input_features=batch["input_features"], **tokens).encoder_hidden_states
        theirs = wide(input_features=batch["teacher_input_features"], **tokens).encoder_hidden_states
    pairs = [(ours[i], theirs[i][:, :50]) for i in (1, 2)]
    by_clip = torch.stack([((a - b) ** 2).sum((1, 2)) / (b**2).sum((1, 2)) for a, b in pairs]).mean(0)
    count = (batch["labels"] != -100).sum(1)
    by_hand = (by_clip * count).sum() / count.sum()
    trainer = ASKDTrainer(
        model=copy.deepcopy(student),
        args=ASKDConfig(**options(tmp_path, max_steps=1, preset="kd", freeze_encoder=False, hidden_weight=1.0)),
        teacher_model=wide,
        train_dataset=speech,
        data_collator=collator,
    )
    trainer.train()
    assert history(trainer, "hidden_loss").item() == pytest.approx(by_hand.item(), rel=1e-3)


def test_evaluation_at_the_context_of_the_clips(monkeypatch, capsys, tmp_path, wide_dir):
    """The encoder takes the longest clip of each batch and the margin, and the results name both ways."""
    speech = write_speech(tmp_path / "speech", clips=4)
    lengths = {"window": [], "clips": []}
    encode = WhisperEncoder.forward

    def watched(self, input_features, *args, **kwargs):
        lengths["window" if input_features.shape[-1] == 400 else "clips"].append(input_features.shape[-1])
        return encode(self, input_features, *args, **kwargs)

    monkeypatch.setattr(WhisperEncoder, "forward", watched)
    command = f"--model {wide_dir} --clip_context True --dataset {speech} --output_dir {tmp_path / 'out'} --device cpu"
    command += " --batch_size 1 --speed True --speed_clips 2 --speed_batch_sizes 1 --repetitions 1"
    ended = run_here(monkeypatch, capsys, *command.split(), file=ROOT / "examples" / "evaluate.py")
    assert ended.returncode == 0, ended.stderr
    results = Results.load(tmp_path / "out" / "results.json")
    assert list(results.models) == ["student", CLIP_CONTEXT]
    durations = load_speech_dataset(str(speech), None, "train")
    seconds = sorted(len(decode_audio(row["audio"])) / 16_000 for row in durations)
    expected = {2 * math.ceil((length + CONTEXT_MARGIN) * 50) for length in seconds}
    assert set(lengths["clips"]) == expected and lengths["window"]
    encoder = {row.role: row.encoder for row in results.speed.parts}
    assert encoder.keys() == {"student", CLIP_CONTEXT}
