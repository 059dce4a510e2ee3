"""Clips with an empty transcript (no speech), and clips without a transcript (unknown)."""

import dataclasses
import json

import pytest
import soundfile
from manifests import write
from models import make_processor, make_whisper
from numpy.random import default_rng
from scripts import ROOT, load_script, run_here

from askd_hf.errors import UserError
from askd_hf.evaluation import DatasetSpec, EvaluationArguments, Results, format_results, prepare_set, score_directory
from askd_hf.evaluation.study import set_errors


def speech(folder, texts: list[str | None]) -> DatasetSpec:
    """Write half a second of noise per text; None is a clip without a transcript."""
    folder.mkdir()
    rows = []
    for i, text in enumerate(texts):
        soundfile.write(folder / f"{i}.wav", 0.1 * default_rng(i).standard_normal(8000), 16_000)
        rows.append({"file_name": f"{i}.wav", "text": text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return DatasetSpec("own", str(folder), None, "train")


@pytest.mark.parametrize("texts", [["", " ", ""], [None, None], [None, ""], ["", "ignore_time_segment_in_scoring"]])
def test_untranscribed_speech_is_no_set_without_speech(tmp_path, texts):
    source = speech(tmp_path / "speech", texts)
    with pytest.raises(UserError, match=rf"own: none of {len(texts)} clips .* --no_speech True.*--text_column_name"):
        prepare_set(source, window=1.0)


@pytest.mark.parametrize("texts", [["", " "], [None, None], [None, ""]])
def test_a_set_is_without_speech_where_it_is_said(tmp_path, texts):
    source = dataclasses.replace(speech(tmp_path / "noise", texts), no_speech=True)
    (prepared,) = prepare_set(source, window=1.0)
    assert len(prepared.clips) == 2 and not "".join(prepared.clips["text"]).strip()
    assert prepared.excluded == {}


def test_a_set_without_speech_needs_no_transcripts(tmp_path):
    source = dataclasses.replace(speech(tmp_path / "noise", ["", ""]), no_speech=True)
    (tmp_path / "noise" / "metadata.jsonl").write_text('{"file_name": "0.wav"}\n{"file_name": "1.wav"}\n')
    assert prepare_set(source, window=1.0)[0].clips["text"][:] == ["", ""]


def test_a_set_without_speech_has_no_transcripts(tmp_path):
    source = dataclasses.replace(speech(tmp_path / "noise", ["", "hello there", None]), no_speech=True)
    with pytest.raises(UserError, match=r"own: --no_speech requires .* but 1 of 3 have one, such as .*1.wav: 'hello"):
        prepare_set(source, window=1.0)


def test_beside_transcripts_an_empty_one_is_silence_and_none_is_unknown(tmp_path):
    source = speech(tmp_path / "speech", ["a", "", None, "b", None])
    (prepared,) = prepare_set(source, window=1.0)
    assert sorted(prepared.clips["text"]) == ["", "a", "b"]
    assert prepared.excluded == {"no transcript (null)": 2}


def test_no_speech_is_said_of_a_dataset():
    with pytest.raises(UserError, match="--no_speech requires --dataset"):
        EvaluationArguments(model="x", suite=["ami"], no_speech=True)
    (suite, own) = EvaluationArguments(model="x", suite=["ami"], dataset="y", no_speech=True).sets()
    assert (suite.no_speech, own.no_speech) == (False, True)


@pytest.mark.parametrize("said", [True, None])
def test_older_manifests_of_empty_references_are_still_without_speech(tmp_path, said):
    write(tmp_path, "student", [(None, "", "you"), (None, "", "")], set={} if said is None else {"no_speech": said})
    results = score_directory(tmp_path)
    (result,) = results.sets
    assert (result.has_speech, result.clips, result.scores["student"].no_speech_hallucinations) == (False, 2, 1)
    assert "1 of 2 (50.0 %)" in format_results(results)


def test_a_study_counts_texts_on_sounds_as_the_evaluation_does(tmp_path):
    """The English normalizer removes what is in brackets, and hesitations."""
    write(tmp_path, "student", [(None, "", "[Music]"), (None, "", "Uh."), (None, "", " "), (None, "", "you")], set={})
    (result,) = score_directory(tmp_path).sets
    errors = set_errors(tmp_path, result.name, "sounds", "english")
    assert errors.texts == result.scores["student"].no_speech_hallucinations == 3


def test_new_manifests_of_empty_references_are_not(tmp_path):
    write(tmp_path, "student", [(None, "", "you"), (None, "", "")], set={"no_speech": False})
    with pytest.raises(UserError, match=r"spoken: all clips are excluded \(no transcript: 2\)"):
        score_directory(tmp_path)


def test_the_script_names_both_ways_out_and_takes_either(tmp_path, monkeypatch, capfd):
    processor = make_processor()
    make_whisper(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    speech(tmp_path / "speech", [None, None])
    script = load_script(ROOT / "examples" / "evaluate.py")
    shared = "--model", tmp_path / "model", "--dataset", tmp_path / "speech", "--output_dir", tmp_path / "out"
    refused = run_here(monkeypatch, capfd, *shared, "--device", "cpu", script=script)
    assert refused.returncode == 2 and "--no_speech True" in refused.stderr and "--text_column_name" in refused.stderr
    assert not list((tmp_path / "out").rglob("*.jsonl"))
    ended = run_here(monkeypatch, capfd, *shared, "--device", "cpu", "--no_speech", "True", script=script)
    assert ended.returncode == 0, ended.stderr
    (result,) = Results.load(tmp_path / "out" / "results.json").sets
    assert (result.has_speech, result.clips) == (False, 2)
