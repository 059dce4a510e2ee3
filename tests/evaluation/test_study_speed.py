"""Speed of the students of a study: measured together, kept, and measured again after a student was trained again."""

import os
import shutil

import pytest
from speech import write_speech

from askd_hf.errors import UserError
from askd_hf.evaluation import study_speed
from askd_hf.evaluation.options import EvaluationArguments
from askd_hf.evaluation.study import CellResult, Study
from askd_hf.evaluation.study_speed import measure_students
from askd_hf.evaluation.suites import DatasetSpec

EVALUATION = EvaluationArguments(model="any", dataset="any")


@pytest.fixture
def measured(monkeypatch) -> list[set[str]]:
    """The roles of each measurement."""
    roles: list[set[str]] = []

    def measure(models, *args, **kwargs):
        roles.append({*models})
        return original(models, *args, **kwargs, repetitions=1, max_length=3)

    original = study_speed.measure_speed
    monkeypatch.setattr(study_speed, "measure_speed", measure)
    return roles


def test_speeds_are_measured_again_only_for_other_students_or_newer_ones(teacher_dir, speech_dir, tmp_path, measured):
    student = tmp_path / "student"
    shutil.copytree(teacher_dir, student)
    file = tmp_path / "speed-t.json"
    spec = DatasetSpec("speech", str(speech_dir), None, "train")

    def measure(*students: str, clips: int = 2):
        results = [CellResult("t", [], name, "own", "ce", 1, {"output_dir": str(student)}) for name in students]
        return measure_students(Study(results), "t", str(teacher_dir), EVALUATION, spec, clips, file)

    first = measure("short")
    assert {row.role for row in first.rows} == {"short, own", "teacher"} and len(measured) == 1
    assert measure("short") == first and len(measured) == 1
    later = file.stat().st_mtime + 1
    os.utime(student / "model.safetensors", (later, later))
    measure("short")
    assert len(measured) == 2
    os.utime(student / "model.safetensors", (0, 0))
    measure("short", clips=3)
    assert len(measured) == 3
    measure("short", "shorter", clips=3)
    assert len(measured) == 4 and measured[-1] == {"short, own", "shorter, own", "teacher"}


def test_the_clips_are_those_that_are_evaluated(teacher_dir, tmp_path, measured):
    """A clip that the evaluations skip doesn't end a finished study."""
    speech = write_speech(tmp_path / "speech", clips=4)
    (speech / "audio" / "001.wav").write_bytes(b"no audio")
    spec = DatasetSpec("speech", str(speech), None, "train")
    study = Study([CellResult("t", [], "short", "own", "ce", 1, {"output_dir": str(teacher_dir)})])
    given = study, "t", str(teacher_dir)
    with pytest.raises(UserError, match=r"001\.wav"):
        measure_students(*given, EVALUATION, spec, 9, tmp_path / "speed.json")
    skipping = EvaluationArguments(model="any", dataset="any", on_bad_audio="skip", max_eval_samples=3)
    assert measure_students(*given, skipping, spec, 9, tmp_path / "speed.json").clips == 2
