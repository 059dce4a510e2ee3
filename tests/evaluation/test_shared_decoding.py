"""Transcripts of several processes: the same lines as those of one, also after a kill and in another number."""

import json
from pathlib import Path

import pytest
from datasets import load_from_disk
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


@pytest.mark.parametrize("processes", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("script", "options"), [(EVALUATE, evaluation), (PSEUDO_LABEL, labeling)])
def test_several_processes_write_what_one_writes(tmp_path, teacher_dir, speech_dir, script, options, processes):
    """Several on a machine, and two on nodes, which share a disk or have one each, with all lines in the end."""
    if script == PSEUDO_LABEL:  # a teacher with timestamps whose transcripts end
        teacher_dir = save_teacher(tmp_path / "teacher")
        seconds = [0.3, 0.4, 0.25, 0.9, 0.5, 0.2, 0.35]
        speech_dir = write_clips(tmp_path / "clips", seconds, {"speaker": list("aaaabbb")})
    printed = []
    for disks in (["one"], ["several"], ["node0", "node1"], ["shared", "shared"]):
        nodes = [tmp_path / disk for disk in disks]
        for node in nodes:
            node.mkdir(exist_ok=True)
        number = processes if disks == ["several"] else len(disks)
        done = launch(number, script, *options(teacher_dir, speech_dir, Path("found")), nodes=nodes)
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(len(done.stdout.splitlines()))
    assert printed == printed[:1] * 4  # by one process only
    one, several, node0, node1, shared = (
        tmp_path / disk / "found" for disk in ("one", "several", "node0", "node1", "shared")
    )
    expected = lines(one)
    assert sum(map(len, expected.values())) == (22 if script == EVALUATE else 7)
    assert [lines(other) for other in (several, node0, node1, shared)] == [expected] * 4
    assert files(one) == files(several) == files(node0) == files(shared)
    if script == EVALUATE:  # the first process scores
        scores = [json.loads((found / "results.json").read_text())["sets"] for found in (one, several, node0, shared)]
        assert scores == scores[:1] * 4
    else:
        datasets = [load_from_disk(found / "dataset") for found in (one, several, node0, node1, shared)]
        assert [dataset.to_dict() for dataset in datasets[1:]] == [datasets[0].to_dict()] * 4


@pytest.mark.parametrize(("script", "options"), [(EVALUATE, evaluation), (PSEUDO_LABEL, labeling)])
def test_fewer_clips_than_processes(tmp_path, script, options):
    teacher = save_teacher(tmp_path / "teacher")
    # of two clips the first is invalid: in the end there is one, and two processes have no share of the clips
    speech = write_clips(tmp_path / "clips", [2.0, 0.3], {"speaker": ["a", "a"], "text": ["ab", "ab"]})
    (speech / "audio" / "000.wav").write_bytes(b"no audio")
    more = ["--on_bad_audio", "skip"]
    if script == PSEUDO_LABEL:
        more += ["--wer_threshold", "100000"]
    found = []
    for processes in (1, 4):
        found.append(tmp_path / f"by-{processes}")
        arguments = [*options(teacher, speech, found[-1]), *more]
        done = launch(processes, script, *[word for word in arguments if word != "validation"])
        assert done.returncode == 0, done.stderr[-3000:]
    assert lines(found[1]) == lines(found[0]) and sum(map(len, lines(found[0]).values())) == 1
    skipped = [next(directory.glob("skipped*.csv")).read_text() for directory in found]
    assert skipped[0] == skipped[1] and "000.wav" in skipped[0]


def test_the_others_wait_for_a_save_that_takes_longer_than_the_timeout(tmp_path):
    teacher, speech = save_teacher(tmp_path / "teacher"), write_clips(tmp_path / "clips", [0.3], {"speaker": ["a"]})
    script = ROOT / "tests" / "support" / "slow_save.py"
    done = launch(2, script, *labeling(teacher, speech, tmp_path / "found"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("timeout 1234 s") == 2
    assert len(load_from_disk(tmp_path / "found" / "dataset")) == 1


def files(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*")}


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
