"""Transcripts of several processes: the same lines as those of one, also after a kill and in another number."""

import json
from pathlib import Path

import pytest
from processes import launch
from scripts import ROOT
from tiny_teacher import save_teacher, write_clips

EVALUATE, PSEUDO_LABEL = ROOT / "examples" / "evaluate.py", ROOT / "examples" / "pseudo_label.py"


def evaluation(teacher_dir: Path, speech_dir: Path, output_dir: Path) -> list[str]:
    words = f"--model {teacher_dir} --dataset {speech_dir} --eval_splits train validation --language en --device cpu"
    return f"{words} --batch_size 3 --generation_max_length 12 --n_resamples 20 --output_dir {output_dir}".split()


def labeling(teacher_dir: Path, speech_dir: Path, output_dir: Path) -> list[str]:
    words = f"--teacher {teacher_dir} --dataset {speech_dir} --device cpu --timestamps --concatenate --batch_size 3"
    words += " --logprob_threshold -50 --repeated_5gram_threshold 100 --compression_ratio_threshold 99"
    return f"{words} --output_dir {output_dir}".split()


def lines(directory: Path) -> dict[str, list[dict]]:
    """Return the lines of each manifest, without the times taken."""
    files = sorted(directory.rglob("*.jsonl"))
    found = {str(file.relative_to(directory)): list(map(json.loads, file.read_text().splitlines())) for file in files}
    return {
        name: [{key: value for key, value in row.items() if key != "transcription_time"} for row in rows]
        for name, rows in found.items()
    }


@pytest.mark.parametrize(("script", "options"), [(EVALUATE, evaluation), (PSEUDO_LABEL, labeling)])
def test_three_processes_write_what_one_writes(tmp_path, teacher_dir, speech_dir, script, options):
    if script == PSEUDO_LABEL:  # a teacher with timestamps whose transcripts end
        teacher_dir = save_teacher(tmp_path / "teacher")
        seconds = [0.3, 0.4, 0.25, 0.9, 0.5, 0.2, 0.35]
        speech_dir = write_clips(tmp_path / "clips", seconds, {"speaker": list("aaaabbb")})
    printed = {}
    for processes in (1, 3):
        done = launch(processes, script, *options(teacher_dir, speech_dir, tmp_path / str(processes)))
        assert done.returncode == 0, done.stderr[-3000:]
        printed[processes] = done.stdout.replace(str(tmp_path / str(processes)), "")
    expected = lines(tmp_path / "1")
    assert sum(map(len, expected.values())) == (22 if script == EVALUATE else 7)
    assert lines(tmp_path / "3") == expected
    files = [
        {str(file.relative_to(folder)) for file in folder.rglob("*")} for folder in (tmp_path / "1", tmp_path / "3")
    ]
    assert files[0] == files[1]
    assert len(printed[3].splitlines()) == len(printed[1].splitlines())  # by one process only
    if script == EVALUATE:
        scores = [json.loads((tmp_path / name / "results.json").read_text())["sets"] for name in "13"]
        assert scores[0] == scores[1]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_killed_run_is_resumed_by_another_number_of_processes(tmp_path, teacher_dir, speech_dir, before, after):
    one = launch(1, EVALUATE, *evaluation(teacher_dir, speech_dir, tmp_path / "one"), "--batch_size", "1")
    assert one.returncode == 0, one.stderr[-3000:]
    options = [*evaluation(teacher_dir, speech_dir, tmp_path / "killed"), "--batch_size", "1"]
    manifests = tmp_path / "killed" / "manifests" / "student"

    def has_begun() -> bool:
        return any(part.read_bytes().endswith(b"\n") for part in manifests.glob("*.parts/*.jsonl"))

    killed = launch(before, EVALUATE, *options, until=has_begun)
    assert killed.returncode != 0 and not (tmp_path / "killed" / "results.json").exists()
    done = launch(after, EVALUATE, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(tmp_path / "killed") == lines(tmp_path / "one") and not list(manifests.glob("*.parts"))
