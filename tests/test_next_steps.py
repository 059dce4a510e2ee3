"""The end of a run: the places that it names exist, and the commands that it prints run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import USER, hub_of_this_process, serve_hub
from hub import hub_environment
from models import make_multilingual
from scripts import ROOT, distill_options, run_here
from speech import write_speech
from transformers import WhisperConfig

from askd_hf.arguments import DataArguments, ModelArguments, SpeechSource
from askd_hf.commands.next_steps import export_step, next_steps, places, print_publishing
from askd_hf.config import ASKDConfig

TOKEN = "hf_tokenThatMayWrite"
RUN = "it's a (first) run"  # a directory whose name a shell would take apart


def commands_of(output: str) -> list[str]:
    """The commands as they are printed, each below its purpose."""
    return re.findall(r"^[a-z ]+:\n  (.+)$", output, re.MULTILINE)


def transcribed(output: str) -> str:
    """The transcript that the report shows."""
    return re.search(r"^  pipeline:  (.*)$", output, re.MULTILINE)[1]


def test_the_commands_of_a_run_do_what_they_say(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    monkeypatch.chdir(tmp_path)
    more = ["--eval_splits", "validation", "--normalizer", "basic"]
    options = distill_options(teacher_dir, speech_dir, "OUTPUT", *more)
    ended = run_here(monkeypatch, capsys, *(RUN if option == "OUTPUT" else option for option in options))
    assert ended.returncode == 0, ended.stderr
    for name in ("student", "model card", "report", "checkpoints", "log"):
        place = re.search(rf"^{name:<13}({re.escape(RUN)}.*?)(?: and \d+ before it)?$", ended.stdout, re.MULTILINE)[1]
        assert Path(place).exists(), name
    transcribe, evaluate, push = (shlex.split(command) for command in commands_of(ended.stdout))
    assert transcribe[:2] == ["python", "-c"]
    exec(transcribe[2], {})
    assert capsys.readouterr().out.strip() == transcribed(ended.stdout)
    write_speech(tmp_path / "other_speech", clips=3)
    assert evaluate[:2] == ["askd-hf", "evaluate"]
    evaluated = run_here(monkeypatch, capsys, *evaluate[2:], file=ROOT / "examples" / "evaluate.py")
    assert evaluated.returncode == 0 and "Comparison:" in evaluated.stdout and " basic" in evaluated.stdout
    (push_results,) = (shlex.split(command) for command in commands_of(evaluated.stdout))
    assert push_results[:-2] == push and push_results[-2] == "--results"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push[:2] == ["askd-hf", "push"] and push[-1] == "you/it-s-a-first-run"
    with hub_of_this_process(tmp_path / "hub", {TOKEN: "write"}, monkeypatch) as hub:
        for words, speech in ((push, "validation"), (push_results, "other_speech")):
            mine = [word.replace("you/", f"{USER}/") for word in words[2:]]
            published = run_here(monkeypatch, capsys, *mine, file=ROOT / "examples" / "push.py")
            assert published.returncode == 0 and f"models/{USER}/it-s-a-first-run" in hub.commits
            page = f"{hub.endpoint}/{USER}/it-s-a-first-run"
            assert re.fullmatch(rf"published: {page}\ncommit: {page}/commit/\w+\n", published.stdout)
            card = (hub.root / "models" / USER / "it-s-a-first-run" / "README.md").read_text()
            assert f"\n| {speech} | student | " in card


def test_nothing_is_to_be_published_of_a_model_that_is_not_of_a_run(tmp_path, capsys):
    print_publishing(str(tmp_path), tmp_path / "results.json")
    print_publishing("openai/whisper-tiny", tmp_path / "results.json")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_shell_runs_the_commands_as_they_are_printed(tmp_path, teacher_dir, speech_dir):
    """One after the other, as they are pasted."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, what in (("python", ""), ("askd-hf", "-m askd_hf.commands.main")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {what} "$@"\n')
        (programs / name).chmod(0o755)
    write_speech(tmp_path / "other_speech", clips=3)
    with serve_hub(tmp_path / "hub", {TOKEN: "write"}) as hub:
        environment = hub_environment(hub, tmp_path / "home", TOKEN)
        environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        shared = dict(cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600)

        def run(command: str) -> str:
            done = subprocess.run(["bash", "-c", command], **shared)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        options = distill_options(teacher_dir, speech_dir, "OUTPUT", "--eval_splits", "validation")
        printed = run(shlex.join(["askd-hf", "distill", *options]).replace("OUTPUT", shlex.quote(RUN)))
        transcribe, evaluate, push = commands_of(printed)
        assert run(transcribe).strip() == transcribed(printed)
        assert "Comparison:" in run(evaluate)
        assert "published: " in run(push.replace("you/", f"{USER}/"))
        assert hub.commits


def config_of(directory: Path, **changes) -> SimpleNamespace:
    given = dict(output_dir=str(directory), report_to=[], push_to_hub=False, hub_model_id=None, project="huggingface")
    return SimpleNamespace(**(given | changes))


def words_of(config: SimpleNamespace, source: SpeechSource, teacher: str | None = "t", **data) -> list[list[str]]:
    given = ModelArguments(teacher=teacher), DataArguments(dataset=["d"], **data)
    return [words for _, words in next_steps(*given, config, source, None)]


def test_the_commands_have_language_and_task_and_what_fits_the_run(tmp_path):
    translated = SpeechSource("d", None, "train", "fr", "translate")
    transcribe, evaluate, push = words_of(config_of(tmp_path / "a", hub_model_id="me/a"), translated)
    assert '"speech.wav"' in transcribe[2]
    assert evaluate[4:] == ["--teacher", "t", "--dataset", "other_speech", "--language", "fr", "--task", "translate"]
    assert push[-2:] == ["--repo_id", "me/a"]
    plain = SpeechSource("d", None, "train", None, "transcribe")
    published = words_of(config_of(tmp_path / "a", push_to_hub=True), plain, teacher=None)
    assert published[1][4:] == ["--dataset", "other_speech"] and published[2][:2] == ["askd-hf", "export"]


def test_curves_are_found_by_the_command_of_their_tracker(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    config = config_of(tmp_path / "my run", report_to=["tensorboard", "trackio"], project="a b")
    found = [place for name, place in places(config) if name == "curves"]
    assert found == [f"tensorboard --logdir '{tmp_path / 'my run'}'", "trackio show --project 'a b'"]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "logs")
    assert ("curves", "tensorboard --logdir logs") in list(places(config))


@pytest.mark.parametrize("where", ["option", "column"])
def test_a_multilingual_student_is_evaluated_in_its_language(monkeypatch, capsys, tmp_path, speech_dir, where):
    model, processor = make_multilingual()
    model.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    write_speech(tmp_path / "other_speech", clips=3)
    monkeypatch.chdir(tmp_path)
    language = ["--language", "chinese"]
    if where == "column":
        table = write_speech(tmp_path / "speech", clips=3) / "metadata.csv"
        rows = table.read_text().splitlines()
        table.write_text("\n".join([f"{rows[0]},language", *(f"{row},zh" for row in rows[1:])]))
        speech_dir, language = table.parent, []
    ended = run_here(monkeypatch, capsys, *distill_options("teacher", speech_dir, "run", *language))
    assert ended.returncode == 0, ended.stderr
    evaluate = shlex.split(commands_of(ended.stdout)[1])
    assert evaluate[-2] == "--language"
    evaluated = run_here(monkeypatch, capsys, *evaluate[2:], file=ROOT / "examples" / "evaluate.py")
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.parametrize(
    ("size", "multilingual", "expected"),
    [(51_865, True, "faster-whisper"), (6_000, False, "faster-whisper"), (6_000, True, "CTranslate2")],
)
def test_the_runtime_of_the_export_can_run_the_model(tmp_path, size, multilingual, expected):
    WhisperConfig(vocab_size=size, dtype="float32").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"is_multilingual": multilingual}))
    assert export_step(tmp_path)[0] == f"convert for {expected}"


@pytest.mark.parametrize("window, expected", [("3-10", True), ("10", False)])
def test_a_student_of_many_contexts_is_evaluated_at_that_of_the_clips(window, expected):
    models = ModelArguments(teacher="teacher", window_seconds=window)
    source = SpeechSource("speech", None, "train")
    steps = dict(next_steps(models, DataArguments(dataset=["speech"]), ASKDConfig(output_dir="run"), source, None))
    assert ("--clip_context" in steps["evaluate on other speech"]) == expected
