"""`examples/distill.py` as a user runs it: on directories, with real processes, killed and resumed."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import quick_report
import soundfile
import torch
from huggingface_hub import ModelCard
from models import by_generate, by_pipeline, make_multilingual, make_processor, make_whisper
from processes import killed_when, run_there
from safetensors.torch import load_file
from scripts import ROOT, accelerate_launch, run_here, steps_printed
from scripts import distill_options as options
from speech import write_speech
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from askd_hf.commands import distill
from askd_hf.data import SpeechCollator
from askd_hf.errors import UserError
from askd_hf.evaluation import Results
from askd_hf.models.generation_config import set_language
from askd_hf.models.student import init_student
from askd_hf.trainer import ASKDTrainer
from askd_hf.training.checkpoint_lookup import checkpoint_to_resume

SCRIPT = ROOT / "examples" / "distill.py"


def test_a_run_ends_with_a_table_and_a_model_that_anyone_can_load(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    quick_report.restore(monkeypatch)
    status, out, err = run_here(
        monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "run", "--eval_splits", "validation")
    )
    assert status == 0, err
    assert re.search(r"teacher +0 - 9 .*\nlabels +10 - 11 ", out)
    for row in ("student", "initial student", "teacher"):
        rates = r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]"
        assert re.search(rf" {row} +{rates} +{rates} +6 .*english-unified, no spelling list", out, re.MULTILINE), row
    results = Results.load(tmp_path / "run" / "evaluation" / "results.json")
    assert [model.name for model in results.models.values()] == [
        str(tmp_path / "run"),
        f"layers of {teacher_dir}",
        str(teacher_dir),
    ]
    assert [row.role for row in results.speed.rows if row.batch_size == 6] == ["student", "teacher"]
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.eval_results is None  # a directory of one's own isn't a dataset of the Hub
    assert f"{results.sets[0].scores['student'].wer:.2f}" in card.text
    assert (tmp_path / "run" / "evaluation" / "report.html").is_file() and (tmp_path / "run" / "run.png").is_file()
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "run")
    assert model.config.decoder_layers == 2 and model.config.encoder_layers == 2
    AutoProcessor.from_pretrained(tmp_path / "run")
    tone = np.sin(np.arange(8000) / 10).astype(np.float32)
    assert by_pipeline(tmp_path / "run", tone) == by_generate(tmp_path / "run", tone) != ""
    student = load_file(tmp_path / "run" / "model.safetensors")
    teacher = load_file(teacher_dir / "model.safetensors")
    assert all(torch.equal(student[name], teacher[name]) for name in teacher if ".encoder." in name)
    moved = {name for name in student if "decoder.layers" in name and name in teacher}
    assert any(not torch.equal(student[name], teacher[name]) for name in moved)


def test_a_multilingual_student_speaks_its_language(monkeypatch, capsys, tmp_path, speech_dir):
    model, processor = make_multilingual()
    model.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    arguments = options(
        tmp_path / "teacher", speech_dir, tmp_path / "run", "--eval_splits", "validation", "--max_steps", 2
    )
    arguments.append("--no_select_alignment_heads")
    status, _, err = run_here(monkeypatch, capsys, *arguments)
    assert status == 2 and "--language is required" in err
    status, _, err = run_here(monkeypatch, capsys, *arguments, "--language", "klingon")
    assert status == 2 and "--language must be one of en, zh, got 'klingon'" in err
    status, _, err = run_here(monkeypatch, capsys, *arguments, "--language", "chinese")
    assert status == 0, err
    saved = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "run").generation_config
    assert (saved.language, saved.task) == ("zh", "transcribe")
    assert saved.alignment_heads == [[1, 1]]  # of the teacher's layers 0 and 3
    set_language(model, processor, "zh", "transcribe")
    labels = SpeechCollator(processor, model.config).label_ids({"text": "ab"})
    assert processor.tokenizer.convert_ids_to_tokens(labels) == [
        *("<|zh|>", "<|transcribe|>", "<|notimestamps|>", "a", "b", "<|endoftext|>")
    ]
    tone = np.sin(np.arange(8000) / 10).astype(np.float32)
    assert by_pipeline(tmp_path / "run", tone) == by_generate(tmp_path / "run", tone) != ""


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_student_of_ones_own_with_and_without_a_teacher(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, with_teacher
):
    own = tmp_path / "own"
    init_student(make_whisper(make_processor(), seed=9), [1, 2]).save_pretrained(own)
    make_processor().save_pretrained(own)
    arguments = ["--student", own, *options(teacher_dir, speech_dir, tmp_path / "run", "--learning_rate", "1e-6")]
    if not with_teacher:
        position = arguments.index("--teacher")
        del arguments[position : position + 2]
        assert "requires --teacher" in run_here(monkeypatch, capsys, *arguments)[2]
        arguments += ["--preset", "ps-kd"]
    status, _, err = run_here(monkeypatch, capsys, *arguments)
    assert status == 0, err
    before, after = (load_file(path / "model.safetensors") for path in (own, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)  # trained from there on
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_in_half_precision_leaves_no_rounding_in_the_student(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--max_steps", 1, "--teacher_dtype", "bfloat16")
    assert run_here(monkeypatch, capsys, *arguments)[0] == 0
    student, teacher = (load_file(path / "model.safetensors") for path in (tmp_path / "run", teacher_dir))
    assert all(torch.equal(student[name], teacher[name]) for name in teacher if ".encoder." in name)


def test_a_loss_that_explodes_ends_the_run_with_one_message(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--learning_rate", "1e30")
    status, _, err = run_here(monkeypatch, capsys, *arguments)
    assert status == 2
    assert re.search(r"error: the (loss|gradient) is not finite at step \d+, .*train/audio/\d+\.wav", err)


def test_batches_from_worker_processes_grouped_by_length(monkeypatch, capsys, tmp_path, teacher_dir):
    """Labels within a batch differ less in length than those of the batches of a plain shuffle."""
    spread = {}
    train = ASKDTrainer.training_step

    def step(self, model, batch, *args, **kwargs):
        lengths = (batch["labels"] != -100).sum(1)
        spread.setdefault(self.args.train_sampling_strategy, []).append(int(lengths.max() - lengths.min()))
        return train(self, model, batch, *args, **kwargs)

    monkeypatch.setattr(ASKDTrainer, "training_step", step)
    speech = write_speech(tmp_path / "speech", clips=48)  # of 12 each the like come together
    more = ["--dataloader_num_workers", 2, "--max_steps", 12, "--compare", False, "--train_sampling_strategy"]
    for strategy in ("group_by_length", "random"):
        arguments = options(teacher_dir, speech, tmp_path / strategy, *more, strategy)
        status, _, err = run_here(monkeypatch, capsys, *arguments)
        assert status == 0, err
    assert len(spread["group_by_length"]) == len(spread["random"]) == 12
    assert sum(spread["group_by_length"]) < 0.6 * sum(spread["random"])


def test_the_table_has_the_error_rates_that_transformers_gives(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    more = ["--eval_splits", "validation", "--max_steps", 2, "--normalizer", "basic"]
    status, out, err = run_here(monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "run", *more))
    assert status == 0, err
    with (speech_dir / "validation" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    results = Results.load(tmp_path / "run" / "evaluation" / "results.json")
    manifest = tmp_path / "run" / "evaluation" / "manifests" / "student" / "validation.jsonl"
    durations = [json.loads(line)["duration"] for line in manifest.read_text().splitlines()]
    assert durations == sorted(durations, reverse=True)  # a batch ends with its longest text
    for role, model in (("teacher", teacher_dir), ("student", tmp_path / "run")):
        transcribe = pipeline("automatic-speech-recognition", model=str(model))
        heard = []
        for row in rows:
            wave, _ = soundfile.read(speech_dir / "validation" / row["file_name"], dtype="float32")
            clip = {"raw": wave, "sampling_rate": 16_000}
            heard.append(BasicTextNormalizer()(transcribe(clip, generate_kwargs={"num_beams": 1})["text"]))
        wer = 100 * jiwer.wer([row["transcription"] for row in rows], heard)
        assert results.sets[0].scores[role].wer == pytest.approx(wer)
        assert re.search(rf" {role} +{wer:.2f} \[", out, re.MULTILINE), (wer, out)


def test_a_run_that_goes_on_leaves_nothing_of_its_earlier_evaluation(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    """Which was of another split; and of a model that isn't compared any more."""
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--save_strategy", "steps", "--save_steps", 1)
    arguments += ["--max_steps", 2]
    status, _, err = run_here(monkeypatch, capsys, *arguments, "--eval_splits", "validation")
    assert status == 0, err
    manifests = tmp_path / "run" / "evaluation" / "manifests"
    shutil.copytree(manifests / "student", manifests / "another")
    (manifests / "normalizer.json").write_text('{"a": "b"}')
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    more = ["--eval_splits", "train[:4]", "--resume_from_checkpoint", "last"]
    status, _, err = run_here(monkeypatch, capsys, *arguments, *more)
    assert status == 0 and "no comparison" not in err, err
    results = Results.load(tmp_path / "run" / "evaluation" / "results.json")
    assert [(entry.name, list(entry.scores)) for entry in results.sets] == [("train[:4]", list(results.models))]
    assert list(results.models) == ["student", "initial student", "teacher"]
    assert results.sets[0].spelling_normalizer is False
    assert {file.stem for file in manifests.rglob("*.json*")} == {"train[:4]"}


def test_a_comparison_that_fails_costs_nothing_else(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    def fail(*args):
        raise UserError("they can't be compared")

    monkeypatch.setattr("askd_hf.commands.report.evaluate_models", fail)
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--eval_splits", "validation", "--max_steps", 1)
    status, out, err = run_here(monkeypatch, capsys, *arguments)
    assert status == 0 and "no comparison: they can't be compared" in err
    assert "pipeline:" in out and (tmp_path / "run" / "README.md").is_file()


def test_what_was_skipped_and_who_spoke_is_in_the_results(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    speech = shutil.copytree(speech_dir, tmp_path / "speech")
    metadata = speech / "validation" / "metadata.csv"
    header, *rows = metadata.read_text().splitlines()
    (speech / "validation" / "audio" / "005.wav").unlink()
    speakers = ["7", "8", "9", "10", "11", "7"]
    lines = [f"{header},speaker_id", *(f"{row},{name}" for row, name in zip(rows, speakers, strict=True))]
    metadata.write_text("\n".join(lines) + "\n")
    more = ["--eval_splits", "validation", "--on_bad_audio", "skip", "--max_steps", 1]
    status, _, err = run_here(monkeypatch, capsys, *options(teacher_dir, speech, tmp_path / "run", *more))
    assert status == 0, err
    (result,) = Results.load(tmp_path / "run" / "evaluation" / "results.json").sets
    assert (result.clips, result.excluded) == (5, {"invalid, or longer than the window": 1})
    assert result.scores["student"].wer_by_speaker.keys() == set(speakers) and result.bootstrap_unit == "speaker"


def test_the_command_line_wins_over_yaml_and_yaml_over_the_preset(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    (tmp_path / "run.yaml").write_text(
        f"teacher: {teacher_dir}\ndataset: {speech_dir}\noutput_dir: {tmp_path / 'run'}\nuse_cpu: true\nmax_steps: 4\n"
        "preset: kd\nteacher_weight: 0.5\ntemperature: 3.0\nlearning_rate: 1e-3\n"
    )
    arguments = ("--config", tmp_path / "run.yaml", "--teacher_weight", "0.25")
    status, out, err = run_here(monkeypatch, capsys, *arguments)
    assert status == 0, err
    assert re.search(r"teacher +0 - 3 +0\.250 -> 0\.250", out)
    assert run_here(monkeypatch, capsys, *arguments)[0] == 2  # the directory is taken now
    (tmp_path / "run.yaml").write_text("teacher_wieght: 0.5\n")
    status, _, err = run_here(monkeypatch, capsys, "--config", tmp_path / "run.yaml")
    assert status == 2 and "did you mean 'teacher_weight'?" in err


def break_speech(kind: str, directory: Path, row: int = 3) -> None:
    """Spoil a clip of `directory/train`, or the whole."""
    audio = directory / "train" / "audio" / f"{row:03d}.wav"
    metadata = directory / "train" / "metadata.csv"
    lines = metadata.read_text().splitlines()
    if kind == "missing file":
        audio.unlink()
    elif kind == "corrupt":
        audio.write_bytes(b"this is not audio at all")
    elif kind == "truncated":
        audio.write_bytes(audio.read_bytes()[:3000])
    elif kind == "empty":
        soundfile.write(audio, np.zeros(0), 16_000)
    elif kind == "NaN":
        soundfile.write(audio, np.full(4000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    elif kind == "too long":
        soundfile.write(audio, 0.1 * np.ones(20_000), 16_000)
    elif kind == "transcript too long":
        lines[row + 1] = f"audio/{row:03d}.wav," + "a" * 60
    elif kind == "empty transcript":
        lines[row + 1] = f"audio/{row:03d}.wav, "
    elif kind == "wrong header":
        lines[0] = "filename,transcription"
    elif kind == "missing column":
        lines[0] = "file_name,words"
    metadata.write_text("\n".join(lines) + "\n")


ROW_PROBLEMS = ["missing file", "corrupt", "truncated", "empty", "NaN", "too long", "transcript too long"]
ROW_PROBLEMS += ["empty transcript"]


def test_bad_clips_are_named_before_training_or_skipped_and_listed(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    bad = shutil.copytree(speech_dir, tmp_path / "bad")
    for row, kind in enumerate(ROW_PROBLEMS, start=3):
        break_speech(kind, bad, row)
    status, out, err = run_here(monkeypatch, capsys, *options(teacher_dir, bad, tmp_path / "run"))
    assert status == 2 and "8 of 16 clips are invalid" in err
    assert re.search(r"row 3, train/audio/003\.wav: \S+", err) and "--on_bad_audio skip" in err
    assert "loss" not in out and "Traceback" not in err
    skipping = options(teacher_dir, bad, tmp_path / "run", "--on_bad_audio", "skip", "--max_steps", "2")
    status, out, err = run_here(monkeypatch, capsys, *skipping)
    assert status == 0, err
    with (tmp_path / "run" / "skipped-training-bad.csv").open(newline="") as file:
        listed = {row: (clip, reason) for row, clip, reason in list(csv.reader(file))[1:]}
    assert {row: clip for row, (clip, _) in listed.items()} == {
        str(row): f"train/audio/{row:03d}.wav" for row in range(3, 11)
    }
    assert len({reason.partition(":")[0] for _, reason in listed.values()}) > 4  # each for its own reason


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("wrong header", "the columns are filename, transcription; expected file_name"),
        ("missing column", "--text_column_name"),
    ],
)
def test_a_wrong_metadata_file_is_refused(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, kind, message):
    bad = shutil.copytree(speech_dir, tmp_path / "bad")
    break_speech(kind, bad)
    status, _, err = run_here(monkeypatch, capsys, *options(teacher_dir, bad, tmp_path / "run"))
    assert status == 2 and message in err


def test_any_rate_and_stereo_are_just_audio(monkeypatch, capsys, tmp_path, teacher_dir):
    """Four clips of one tone, each of another rate, reach the model with the same features."""
    kinds = [(8_000, 1), (22_050, 1), (44_100, 2), (48_000, 2)]
    (tmp_path / "speech" / "audio").mkdir(parents=True)
    for i, (rate, channels) in enumerate(kinds):
        tone = np.sin(np.arange(rate // 2) * 2 * np.pi * 300 / rate)
        soundfile.write(tmp_path / "speech" / "audio" / f"{i}.flac", np.tile(tone[:, None], (1, channels)), rate)
    rows = "".join(f"audio/{i}.flac,abc\n" for i in range(len(kinds)))
    (tmp_path / "speech" / "metadata.csv").write_text("file_name,transcription\n" + rows)
    heard = []

    def collate(self, rows, collated=SpeechCollator.__call__):
        batch = collated(self, rows)
        heard.append(batch["input_features"])
        return batch

    monkeypatch.setattr(SpeechCollator, "__call__", collate)
    arguments = options(teacher_dir, tmp_path / "speech", tmp_path / "run", "--max_steps", "1")
    status, _, err = run_here(monkeypatch, capsys, *arguments)
    assert status == 0, err
    (features,) = [batch for batch in heard if len(batch) == len(kinds)][:1]
    tone = features.mean(0, keepdim=True)
    assert (features[:, :, 5:45] - tone[:, :, 5:45]).abs().max() < 0.2  # the four sound alike
    assert (features[:, :, 5:45] - features[:, :, 60:].mean()).abs().max() > 1  # and not like silence


def test_models_that_cannot_be_used_are_refused(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copy(teacher_dir / "tokenizer_config.json", tmp_path / "bert")
    status, _, err = run_here(monkeypatch, capsys, *options(tmp_path / "bert", speech_dir, tmp_path / "run"))
    assert status == 2 and "is a 'bert' model, not Whisper" in err
    other = tmp_path / "other"
    make_whisper(make_processor(), num_mel_bins=16).save_pretrained(other)
    make_processor().save_pretrained(other)
    status, _, err = run_here(
        monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "run", "--student", other)
    )
    assert status == 2 and "expects 16 mel bins x 100 frames, but its preprocessor_config.json produces 8 x 100" in err
    status, _, err = run_here(monkeypatch, capsys, *options(teacher_dir / "nothing", speech_dir, tmp_path / "run"))
    assert status == 2 and "no such file or directory" in err
    status, _, err = run_here(monkeypatch, capsys, "--dataset", speech_dir)
    assert status == 2 and "--teacher is required" in err
    more = ("--teacher_offload", "True", "--torch_compile", "True")
    status, _, err = run_here(
        monkeypatch, capsys, *options(teacher_dir / "nothing", speech_dir, tmp_path / "run", *more)
    )
    assert status == 2 and "--teacher_offload is not supported with --torch_compile" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_splits", "nothing"), "has no split 'nothing'"),
        (("--no_speech_dataset", "./nothing"), "nothing"),
        (("--no_speech_dataset", "empty"), "no speech in empty"),
        (("--vocabulary", "31", "--augmentations", "noise", "--noise_dir", "nothing"), "nothing: no such directory"),
    ],
)
def test_missing_speech_is_named_before_the_teacher_transcribes(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, more, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(distill, "pseudo_label", lambda *args: pytest.fail("transcribes"))
    unlabeled = ("--unlabeled_dataset", speech_dir / "train", *more)
    status, _, err = run_here(monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "run", *unlabeled))
    assert status == 2 and message in err, err


def test_without_the_hub_one_line_says_so_and_names_the_demo(monkeypatch, capsys, tmp_path):
    status, _, err = run_here(monkeypatch, capsys, "--teacher", "openai/whisper-large-v3", "--use_cpu")
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert "openai/whisper-large-v3" in err and "make demo" in err


# ---- processes of their own ----

SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", "--teacher_phase_ratio", "0.6"]
SAVING += ["--logging_steps", "1", "--self_weight", "0.3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_dir, speech_dir):
    """For a kind of self-teacher, the directory of the run that nobody kills."""

    @functools.cache
    def run(self_teacher: str) -> Path:
        directory = tmp_path_factory.mktemp("whole") / "run"
        ended = run_there(
            SCRIPT, *options(teacher_dir, speech_dir, directory, *SAVING, "--self_teacher", self_teacher)
        )
        assert ended.returncode == 0, ended.stderr
        assert steps_printed(ended.stdout) == [*range(1, 13)]
        return directory

    return run


@pytest.mark.parametrize(
    ("self_teacher", "killed_at", "by"),
    # 12 steps, the self phase begins at step 7: in the teacher phase, at the boundary, in the self phase
    [
        # as a cluster's scheduler does
        pytest.param("ema", "checkpoint-3", signal.SIGTERM, marks=pytest.mark.slow),
        ("snapshot", "checkpoint-7", signal.SIGKILL),
        pytest.param("ema", "checkpoint-9", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(
    tmp_path, teacher_dir, speech_dir, whole, self_teacher, killed_at, by
):
    run = tmp_path / "run"
    arguments = options(teacher_dir, speech_dir, run, *SAVING, "--self_teacher", self_teacher)
    # the directory is made first: the checkpoint may well be incomplete
    killed = killed_when((run / killed_at).exists, SCRIPT, *arguments, by=by)
    assert not (run / "model.safetensors").exists()
    steps_done = int(checkpoint_to_resume(str(run), "last").rpartition("-")[2])
    if by == signal.SIGTERM:
        assert killed.returncode == 130
        assert f"stopped after step {steps_done}; go on with" in killed.stdout + killed.stderr
    else:
        assert killed.returncode == -signal.SIGKILL
    resumed = run_there(SCRIPT, *arguments, "--resume_from_checkpoint", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert steps_printed(resumed.stdout) == [*range(steps_done + 1, 13)]
    a, b = (load_file(directory / "model.safetensors") for directory in (whole(self_teacher), run))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_processes_train_and_one_of_them_reports(tmp_path, teacher_dir, speech_dir):
    """As users start them."""
    done = accelerate_launch(
        SCRIPT, *options(teacher_dir, speech_dir, tmp_path / "run", "--eval_splits", "validation")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^labels +5 - 5 ", done.stdout, re.MULTILINE)) == 1  # 6 steps, half of one process's
    assert len(re.findall(r" WER, % +CER, % ", done.stdout)) == 1
    AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_ends_a_process_with_a_checkpoint_and_says_how_to_go_on(tmp_path, teacher_dir, speech_dir):
    """A process that Python itself started."""
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--logging_steps", "1", "--max_steps", "5000")
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if steps_printed(line):
            break
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out[-3000:]
    step = int(re.search(r"stopped after step (\d+); go on with --resume_from_checkpoint last", out)[1])
    assert (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").is_file()
