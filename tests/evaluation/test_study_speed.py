"""Speed of the students of a study: measured together, kept, and measured again after a student was trained again."""

import os
import shutil

import pytest

from askd_hf.evaluation import study_speed
from askd_hf.evaluation.study import CellResult, Study
from askd_hf.evaluation.study_speed import measure_students
from askd_hf.evaluation.suites import DatasetSpec


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
        return measure_students(Study(results), "t", str(teacher_dir), spec, clips, file)

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
