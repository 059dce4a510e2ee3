"""`examples/evaluate.py` end to end: interrupted and resumed runs, scoring without the models."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from models import make_multilingual, make_processor, make_whisper
from processes import Ended, killed_when
from scripts import ROOT, load_script, run_here
from speech import write_speech
from transformers import pipeline
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from askd_hf.arguments.parser import parse_args
from askd_hf.data import SAMPLING_RATE, decode_audio, load_speech_dataset
from askd_hf.data.locks import locked
from askd_hf.errors import UserError
from askd_hf.evaluation import EvaluationArguments, Results
from askd_hf.models.student import init_student

SCRIPT = ROOT / "examples" / "evaluate.py"
DEMO = ROOT / "examples" / "demo"
DIGITS_TEACHER = ROOT / "tests" / "digits_teacher"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory with a tiny teacher and its student."""
    directory = tmp_path_factory.mktemp("models")
    processor, teacher = make_processor(), make_whisper(make_processor())
    for name, model in (("teacher", teacher), ("student", init_student(teacher, 2))):
        model.save_pretrained(directory / name)
        processor.save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("data") / "speech", clips=10)


@pytest.fixture
def evaluate(monkeypatch, capfd):
    """Run the script's `main()` in this process."""
    script = load_script(SCRIPT)

    def run(*arguments) -> Ended:
        return run_here(monkeypatch, capfd, *arguments, script=script)

    return run


def lines(directory: Path, role: str, name: str) -> list[dict]:
    file = directory / "manifests" / role / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_wer_is_that_of_jiwer_on_pipeline_outputs(evaluate, tmp_path):
    """Uses the demo teacher on spoken digits."""
    run = evaluate(
        *("--model", DIGITS_TEACHER, "--dataset", DEMO / "data", "--eval_splits", "calls", "--normalizer", "basic"),
        *("--max_eval_samples", 24, "--batch_size", 5, "--output_dir", tmp_path, "--device", "cpu"),
    )
    assert run.returncode == 0, run.stderr
    clips = load_speech_dataset(str(DEMO / "data"), None, "calls").select(range(24))
    recognize = pipeline("automatic-speech-recognition", model=str(DIGITS_TEACHER), device="cpu", dtype=torch.float32)
    waves = [{"raw": decode_audio(clip["audio"]), "sampling_rate": SAMPLING_RATE} for clip in clips]
    outputs = [recognize(wave, generate_kwargs={"num_beams": 1}) for wave in waves]
    normalize = BasicTextNormalizer()
    references, predictions = (
        [normalize(text) for text in clips["text"]],
        [normalize(output["text"]) for output in outputs],
    )
    result = Results.load(tmp_path / "results.json").sets[0]
    wer = 100 * jiwer.wer(references, predictions)
    assert 0 < wer < 100
    assert result.scores["student"].wer == pytest.approx(wer, abs=1e-9)
    assert result.scores["student"].cer == pytest.approx(100 * jiwer.cer(references, predictions), abs=1e-9)
    assert result.clips == 24 and result.bootstrap_unit == "clip" and result.name == "data-calls"
    assert f"{wer:.2f} [" in run.stdout and "basic" in run.stdout
    assert (tmp_path / "report.html").is_file()
    durations = [line["duration"] for line in lines(tmp_path, "student", "data-calls")]
    assert durations == sorted(durations, reverse=True)


def test_the_wer_in_english_with_a_spelling_list_is_that_of_jiwer_too(evaluate, tmp_path):
    """One transcript is a word that the spelling list maps to the model's prediction."""
    clips = load_speech_dataset(str(DEMO / "data"), None, "calls").select(range(24))
    recognize = pipeline("automatic-speech-recognition", model=str(DIGITS_TEACHER), device="cpu", dtype=torch.float32)
    waves = [{"raw": decode_audio(clip["audio"]), "sampling_rate": SAMPLING_RATE} for clip in clips]
    outputs = [recognize(wave, generate_kwargs={"num_beams": 1})["text"] for wave in waves]
    numbers = [EnglishTextNormalizer({})(text).strip() for text in outputs]  # "six six" is 66
    row = next(row for row, number in enumerate(numbers) if number.isdigit())
    spelling = {"colour": numbers[row]}
    texts = ["Colour!" if i == row else text for i, text in enumerate(clips["text"])]

    shutil.copytree(DIGITS_TEACHER, tmp_path / "model")
    (tmp_path / "model" / "normalizer.json").write_text(json.dumps(spelling))
    clips.remove_columns("text").add_column("text", texts).to_parquet(tmp_path / "digits.parquet")
    run = evaluate(
        *("--model", tmp_path / "model", "--dataset", tmp_path / "digits.parquet", "--batch_size", 5),
        *("--output_dir", tmp_path / "out", "--device", "cpu"),
    )
    assert run.returncode == 0, run.stderr

    def rates(spelling):
        normalize = EnglishTextNormalizer(spelling)
        references, predictions = ([normalize(text) for text in either] for either in (texts, outputs))
        return 100 * jiwer.wer(references, predictions), 100 * jiwer.cer(references, predictions)

    result = Results.load(tmp_path / "out" / "results.json").sets[0]
    assert (result.normalizer, result.spelling_normalizer, result.clips) == ("english-unified", True, 24)
    assert (result.scores["student"].wer, result.scores["student"].cer) == pytest.approx(rates(spelling), abs=1e-9)
    assert rates(spelling)[0] < rates({})[0]
    assert f"{rates(spelling)[0]:.2f} [" in run.stdout and "english-unified, with spelling list" in run.stdout


def test_student_and_teacher_then_scores_without_models_and_speech(evaluate, tmp_path, models, speech):
    own = tmp_path / "own"
    shutil.copytree(models, own / "models")
    shutil.copytree(speech, own / "speech")
    out = tmp_path / "out"
    first = evaluate(
        *("--model", own / "models/student", "--teacher", own / "models/teacher", "--dataset", own / "speech"),
        *("--output_dir", out, "--device", "cpu", "--batch_size", 4),
    )
    assert first.returncode == 0, first.stderr
    results = Results.load(out / "results.json")
    assert list(results.models) == ["student", "teacher"]
    assert (results.models["student"].decoder_layers, results.models["teacher"].decoder_layers) == (2, 4)
    (result,) = results.sets
    assert list(result.scores) == ["student", "teacher"] and result.comparison.baseline == "teacher"
    assert len(lines(out, "teacher", "speech")) == 10
    assert set(lines(out, "teacher", "speech")[0]) == {
        *("clip", "reference", "prediction", "duration", "transcription_time", "tokens")
    }

    shutil.rmtree(own)
    again = evaluate("--score_only", "True", "--output_dir", out, "--normalizer", "none")
    assert again.returncode == 0, again.stderr
    rescored = Results.load(out / "results.json")
    assert rescored.sets[0].normalizer == "none"
    assert "none" in again.stdout


def test_a_killed_run_goes_on(evaluate, tmp_path, models):
    speech = write_speech(tmp_path / "speech", clips=150)
    arguments = "--model", models / "student", "--dataset", speech, "--device", "cpu", "--batch_size", 3
    whole = evaluate(*arguments, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    manifest = tmp_path / "killed" / "manifests" / "student" / "speech.jsonl"
    killed = killed_when(
        lambda: manifest.exists() and manifest.read_bytes().count(b"\n") >= 9,
        *(SCRIPT, *arguments, "--output_dir", tmp_path / "killed"),
    )
    assert killed.returncode == -signal.SIGKILL
    left = manifest.read_bytes().splitlines(keepends=True)
    assert 9 <= len(left) < 150
    scoring = evaluate("--score_only", "True", "--output_dir", tmp_path / "killed")
    assert scoring.returncode == 2 and "incomplete" in scoring.stderr
    manifest.write_bytes(b"".join(left[:10]) + left[1][:30])  # a partial batch and a partial line

    rest = evaluate(*arguments, "--output_dir", tmp_path / "killed")
    assert rest.returncode == 0, rest.stderr
    continued = manifest.read_bytes().splitlines(keepends=True)
    assert continued[:9] == left[:9]  # with their `transcription_time`: these were not decoded again
    timeless = [
        [
            {k: v for k, v in line.items() if k != "transcription_time"}
            for line in lines(tmp_path / run, "student", "speech")
        ]
        for run in ("whole", "killed")
    ]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == 150

    assert evaluate(*arguments, "--output_dir", tmp_path / "killed").returncode == 0
    assert manifest.read_bytes().splitlines(keepends=True) == continued  # complete: nothing to decode


def test_other_options_and_other_weights_are_refused(evaluate, tmp_path, models, speech):
    arguments = "--dataset", speech, "--device", "cpu", "--output_dir", tmp_path / "out", "--max_eval_samples", 4
    assert evaluate("--model", models / "student", *arguments).returncode == 0
    manifest = tmp_path / "out" / "manifests" / "student" / "speech.jsonl"
    before = manifest.read_bytes()
    beams = evaluate("--model", models / "student", *arguments, "--num_beams", 2)
    assert beams.returncode == 2
    assert "num_beams 1, now 2" in beams.stderr and "--overwrite" in beams.stderr
    weights = evaluate("--model", models / "teacher", *arguments)
    assert weights.returncode == 2 and "the model's weights" in weights.stderr
    assert manifest.read_bytes() == before
    overwritten = evaluate("--model", models / "teacher", *arguments, "--overwrite", "True")
    assert overwritten.returncode == 0
    assert manifest.read_bytes() != before


def test_speech_that_is_too_long_and_a_set_without_any(evaluate, tmp_path, models):
    """The window of the tiny models is one second."""
    write_speech(tmp_path / "speech", clips=4)
    wave = np.sin(np.arange(3 * 16_000) / 20)
    soundfile.write(tmp_path / "speech" / "long.wav", wave, 16_000)
    with (tmp_path / "speech" / "metadata.csv").open("a") as file:
        file.write("long.wav,abc\n")
    (tmp_path / "noise").mkdir()
    soundfile.write(tmp_path / "noise" / "a.wav", 0.1 * wave[:8000], 16_000)
    soundfile.write(tmp_path / "noise" / "b.wav", 0.0 * wave[:4000], 16_000)
    (tmp_path / "noise" / "metadata.csv").write_text("file_name,transcription\na.wav,\nb.wav,\n")
    out = tmp_path / "out"
    shared = "--model", models / "student", "--device", "cpu", "--output_dir", out
    first = evaluate(*shared, "--dataset", tmp_path / "speech")
    assert first.returncode == 0
    letters = sum(len(row["transcription"]) for row in csv.DictReader((tmp_path / "speech" / "metadata.csv").open()))
    line = (
        f"excluded clips: 1 (longer than 1 s). The long ones are 1 of 5 clips with {300 / letters:.0f} % of the text\n"
    )
    advice = "--long_form sequential evaluates the long ones too\n"
    above, below = first.stdout.split("Error rates:")
    assert above.endswith(f"speech: {line}{advice}\n") and advice not in below
    run = evaluate(
        *shared, "--dataset", tmp_path / "noise", "--no_speech", "True"
    )  # a second set in the same output directory
    assert run.returncode == 0, run.stderr
    shorter = evaluate(
        *("--model", models / "student", "--device", "cpu", "--output_dir", tmp_path / "shorter"),
        *("--dataset", tmp_path / "speech", "--max_duration_in_seconds", 0.3),
    )
    assert shorter.returncode == 2 and "all clips are longer than 0.3 s" in shorter.stderr
    noise, speech = Results.load(out / "results.json").sets
    assert (speech.name, speech.clips, speech.excluded) == ("speech", 4, {"longer than 1 s": 1})
    assert (noise.has_speech, noise.clips, noise.scores["student"].wer) == (False, 2, None)
    assert "no-speech clips with text" in run.stdout and "speech: excluded clips: 1 (longer than 1 s)" in run.stdout


def test_a_multilingual_model_needs_its_language(evaluate, tmp_path, speech):
    model, processor = make_multilingual()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    shared = "--model", tmp_path / "model", "--dataset", speech, "--device", "cpu", "--output_dir", tmp_path / "out"
    refused = evaluate(*shared)
    assert refused.returncode == 2 and "--language is required" in refused.stderr
    assert "Checking" not in refused.stderr  # the clips, which may be many
    assert not list((tmp_path / "out").rglob("*.jsonl"))
    assert evaluate(*shared, "--language", "chinese").returncode == 0
    (result,) = Results.load(tmp_path / "out" / "results.json").sets
    assert (result.language, result.normalizer) == ("zh", "multilingual, by letter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset x", "--model is required"),
        ("--model x", "--suite or --dataset is required"),
        ("--model x --suite nothing", "must be one of librispeech"),
        ("--model x --dataset y --long_form both", "one or more of sequential, chunked, got both"),
        ("--model x --dataset y --concatenate_seconds 60", "--long_form"),
        ("--model x --dataset y --speculative True", "--teacher"),
        ("--model x --dataset y --save_num_assistant_tokens True", "requires --speculative"),
        ("--model x --dataset y --num_assistant_tokens 4 0", "--num_assistant_tokens must be at least 1, got 0"),
        ("--score_only True", "--score_only requires --output_dir"),
        ("--model x --dataset y --batch_size 0", "must be at least 1, got 0"),
        ("--model x --dataset y --speed_batch_sizes 4 0", "--speed_batch_sizes must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_evaluation(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_args((EvaluationArguments,), arguments.split())[0].sets()


def test_what_could_not_be_scored_together_is_refused_before_decoding(evaluate, tmp_path, models, speech):
    out = tmp_path / "out"
    other = write_speech(tmp_path / "other", clips=3)
    shared = "--device", "cpu", "--output_dir", out, "--max_eval_samples", 3
    assert evaluate("--model", models / "student", "--dataset", speech, *shared).returncode == 0

    def refused(*arguments, file="student/speech.jsonl") -> str:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        run = evaluate(*arguments, *shared)
        assert run.returncode == 2 and file in run.stderr and "another --output_dir" in run.stderr, run.stderr
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        return run.stderr

    student = "--model", models / "student", "--dataset"
    assert "was decoded with" in refused(*student, other, "--num_beams", 2)
    assert "was decoded with" in refused(*student, other, "--num_beams", 2, "--overwrite", True)
    assert "of another model" in refused("--model", models / "teacher", "--dataset", other)
    sidecar = out / "manifests" / "student" / "speech.json"
    sidecar.write_text(sidecar.read_text().replace('"complete": true', '"complete": false'))
    assert "is incomplete" in refused(*student, other)


def test_what_cannot_be_timed_is_refused_before_decoding(evaluate, tmp_path, models, speech):
    soundfile.write(tmp_path / "long.wav", np.sin(np.arange(3 * 16_000) / 20), 16_000)
    (tmp_path / "metadata.csv").write_text("file_name,transcription\nlong.wav,abc\n")
    out = tmp_path / "out"
    shared = "--model", models / "student", "--device", "cpu", "--output_dir", out
    run = evaluate(*shared, "--dataset", tmp_path, "--long_form", "chunked", "--speed", True)
    assert run.returncode == 2 and "Remove these options" in run.stderr
    processor = make_processor(("<|more|>",))
    make_whisper(processor).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    run = evaluate(*shared, "--dataset", speech, "--teacher", tmp_path / "teacher", "--speculative", True)
    assert run.returncode == 2 and re.search(r"vocab_size: teacher 3., student 3..* Remove --speculative", run.stderr)
    assert not list(out.rglob("*.jsonl"))


def test_what_was_measured_stays_as_long_as_the_weights_do(evaluate, tmp_path, models):
    speech = write_speech(tmp_path / "speech", clips=6)
    out = tmp_path / "out"
    shared = "--dataset", speech, "--device", "cpu", "--output_dir", out, "--generation_max_length", 3
    student, teacher = ("--model", models / "student"), ("--teacher", models / "teacher")
    # the teacher's manifest, then the speed of the student only, on fewer clips than the largest default batch
    assert evaluate(*student, *teacher, *shared).returncode == 0
    assert evaluate(*student, *shared, "--speed", True, "--repetitions", 1).returncode == 0
    alone = Results.load(out / "results.json")
    assert [(row.role, row.batch_size, row.speedup) for row in alone.speed.rows] == [
        *(("student", 1, None), ("student", 6, None)),
    ]
    page = (out / "report.html").read_text()
    assert list(alone.models) == ["student", "teacher"]
    assert "speedup" not in page

    assert evaluate(*student, *teacher, *shared).returncode == 0
    assert Results.load(out / "results.json").speed == alone.speed
    moved = shutil.copytree(models / "student", tmp_path / "moved")
    assert evaluate("--model", moved, *shared).returncode == 0
    assert Results.load(out / "results.json").speed == alone.speed
    assert evaluate("--model", models / "teacher", *shared, "--overwrite", True).returncode == 0
    assert Results.load(out / "results.json").speed is None


def test_scores_are_there_before_anything_is_timed(evaluate, tmp_path, models, speech, monkeypatch):
    def fail(*args, **options):
        raise UserError("measurement failed")

    monkeypatch.setattr("askd_hf.commands.evaluate.measure_speed", fail)
    run = evaluate("--model", models / "student", "--dataset", speech, "--device", "cpu", "--speed", True,
                   "--output_dir", tmp_path)  # fmt: skip
    assert run.returncode == 2 and "measurement failed" in run.stderr
    assert "WER, %" in run.stdout and len(Results.load(tmp_path / "results.json").sets) == 1


def test_speed_speculative_decoding_and_joined_recordings(evaluate, tmp_path, models):
    speech = write_speech(tmp_path / "speech", clips=6)
    out = tmp_path / "out"
    student = shutil.copytree(models / "student", tmp_path / "student")
    run = evaluate(
        *("--model", student, "--teacher", models / "teacher", "--dataset", speech, "--output_dir", out),
        *("--device", "cpu", "--long_form", "chunked", "--concatenate_seconds", 2.5, "--generation_max_length", 5),
        *("--speed", "True", "--speculative", "True", "--speed_clips", 4, "--speed_batch_sizes", 1, 2),
        *("--repetitions", 2, "--num_assistant_tokens", 3, 2, 3, "--save_num_assistant_tokens", "True"),
    )
    assert run.returncode == 0, run.stderr
    results = Results.load(out / "results.json")
    short, joined = results.sets
    assert (short.name, short.method, joined.name, joined.method) == (
        *("speech", "short_form", "speech-joined-chunked", "chunked"),
    )
    assert joined.clips < short.clips and joined.reference_words == short.reference_words == 6
    assert max(line["tokens"] for line in lines(out, "teacher", "speech")) == 5
    assert [(row.role, row.batch_size) for row in results.speed.rows] == [
        *(("student", 1), ("teacher", 1), ("student", 2), ("teacher", 2)),
    ]
    assert (results.speed.set, results.speed.clips, results.speculative.clips) == ("speech", 4, 4)
    titles = "Models:", "Error rates:", "Speed:", "Latency by part", "Speculative decoding:", "Settings:"
    assert [re.findall(f"^{title}", run.stdout, re.MULTILINE) for title in titles] == [[title] for title in titles]
    found = results.speculative
    assert [each.num_assistant_tokens for each in found.draft_lengths] == [2, 3]
    config = json.loads((student / "generation_config.json").read_text())
    assert config.get("num_assistant_tokens") == (found.num_assistant_tokens if found.speedup > 1 else None)

    again = evaluate("--score_only", "True", "--output_dir", out, "--normalizer", "none")
    assert again.returncode == 0 and all(f"\n{title}" in again.stdout for title in titles), again.stderr
    kept = Results.load(out / "results.json")
    assert (kept.speed, kept.speculative) == (results.speed, results.speculative)
    assert kept.sets[0].normalizer == "none"


def test_a_second_evaluation_of_a_directory_in_use_is_refused(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    """Two that write at the same time would append each clip twice."""
    arguments = ("--model", teacher_dir, "--dataset", speech_dir, "--output_dir", tmp_path / "out")
    with locked(tmp_path / "out" / "manifests"):
        ended = run_here(monkeypatch, capsys, *arguments, file=ROOT / "examples" / "evaluate.py")
    assert ended.returncode == 2 and "manifests is in use by another run" in ended.stderr.strip().splitlines()[-1]
    ended = run_here(monkeypatch, capsys, *arguments, file=ROOT / "examples" / "evaluate.py")
    assert ended.returncode == 0, ended.stderr
