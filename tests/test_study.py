"""`examples/study.py`: the plan, what is resumed, and a study that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cells import run_or_die
from scripts import ROOT, load_script
from speech import write_speech
from tiny_teacher import save_teacher

from askd_hf.arguments.parser import as_arguments
from askd_hf.errors import UserError
from askd_hf.evaluation.study import CellResult, SetErrors, source_digest

SCRIPT = ROOT / "examples" / "study.py"
PLAN = {
    "teachers": {"t": "a-teacher"},
    "students": {"short": {"decoder_layers": 1}},
    "training": {"own": {"dataset": "speech", "in_domain": ["known"]}, "both": {"dataset": ["speech", "more"]}},
    "methods": {"ce": {"preset": "ce", "teacher_cache_dir": None}, "kd": {"preset": "kd", "learning_rate": 1e-4}},
    "evaluation": {"known": {"dataset": "speech", "eval_splits": ["test"]}},
    "seeds": [1, 2],
    "options": {"num_train_epochs": 1, "learning_rate": 1e-3},
}


EVALUATION = PLAN["evaluation"]


@pytest.fixture(scope="module")
def study():
    return load_script(SCRIPT)


def read(study, tmp_path, **changes):
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return study.read_plan(file)


def test_there_is_a_cell_for_every_combination(study, tmp_path):
    cells = study.make_cells(read(study, tmp_path), tmp_path)
    names = [cell.name for cell in cells]
    assert names[0] == "t/teacher" and len(names) == 1 + 2 * 2 * 2
    assert names[1:3] == ["t/short/own/ce/1", "t/short/own/ce/2"]
    kd = cells[names.index("t/short/both/kd/2")].options
    assert (kd["teacher"], kd["learning_rate"], kd["seed"]) == ("a-teacher", "0.0001", "2")  # the method's, not all's
    assert kd["dataset"] == ["speech", "more"] and "in_domain" not in kd
    ce = as_arguments(cells[1].options)
    assert "--preset=ce" in ce and not [argument for argument in ce if argument.startswith("--teacher_cache_dir")]
    assert as_arguments(kd)[as_arguments(kd).index("--dataset") + 1 :][:2] == ["speech", "more"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ["ce", "askd"]}, "baselines: askd: not a method"),
        ({"training": {"own": {"in_domain": ["elsewhere"]}}}, "elsewhere: not an evaluation set"),
        ({"speed_set": "unknown"}, "unknown: not an evaluation set"),
        ({"sedes": [1]}, "sedes"),
        ({"methods": ["ce", "kd"]}, "plan.yaml: methods: must be names, each with options"),
        ({"students": {"short": 2}}, "plan.yaml: students: short: must be options"),
        ({"teachers": {"openai/whisper-tiny": "openai/whisper-tiny"}}, "teachers: a name can't be empty or contain"),
        ({"training": {"own/other": {}}}, "training: a name can't be empty or contain a slash: 'own/other'"),
    ],
)
def test_mistakes_in_the_file_are_named(study, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read(study, tmp_path, **changes)


def test_a_name_without_options_has_none(study, tmp_path):
    plan = read(study, tmp_path, methods={"default": None})
    assert study.make_cells(plan, tmp_path)[1].options["decoder_layers"] == "1"


def test_evaluation_sets_have_the_language_of_the_study(study, tmp_path):
    sets = {"french": {"dataset": "a"}, "german": {"dataset": "b", "language": "de"}}
    changes = {"options": {"language": "fr", "task": "translate"}, "training": {"own": {"dataset": "speech"}}}
    plan = read(study, tmp_path, evaluation=sets, **changes)
    study.check_cells(study.make_cells(plan, tmp_path), plan.evaluation)
    assert plan.evaluation == {
        "french": {"language": "fr", "task": "translate", "dataset": "a"},
        "german": {"language": "de", "task": "translate", "dataset": "b"},
    }


def test_finished_cells_are_read_and_half_a_line_is_not(study, tmp_path):
    cells = study.make_cells(read(study, tmp_path), tmp_path)
    results = [CellResult("t", [], "short", "own", "ce", seed, cells[seed].options, EVALUATION) for seed in (1, 2)]
    lines = [json.dumps(asdict(result)) + "\n" for result in results]
    (tmp_path / "results.jsonl").write_text(lines[0] + lines[1][:50])
    assert list(study.read_results(tmp_path, cells, EVALUATION)) == ["t/short/own/ce/1"]
    study.save_result(results[1], tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == lines[0] + lines[1]


def test_cells_of_other_code_are_named(study, tmp_path, capsys, monkeypatch):
    now = source_digest()
    results = [
        CellResult("t", [], "short", "own", "kd", seed, code=code) for seed, code in enumerate((now, "", "old"))
    ]
    study.warn_of_other_code(results[:2], tmp_path / "results.jsonl")  # of this code, and of a version without digest
    assert capsys.readouterr().err == ""
    study.warn_of_other_code(results, tmp_path / "results.jsonl")
    assert (
        "1 cells were run with other code of askd_hf, and aren't run again: t/short/own/kd/2"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(Path, "read_bytes", lambda file: b"other code")
    assert source_digest() != now


def test_options_of_a_cache_are_left_out_of_methods_without_it(study, tmp_path):
    methods = {"ce": {"preset": "ce", "teacher_cache_dir": None}, "kd": {"preset": "kd"}}
    plan = read(study, tmp_path, methods=methods, options={"num_train_epochs": 1, "teacher_top_k": 8})
    cells = study.make_cells(plan, tmp_path)
    study.check_cells(cells, plan.evaluation)
    assert {cell.method: cell.options.get("teacher_top_k") for cell in cells[1:]} == {"ce": None, "kd": "8"}


def test_a_line_of_other_options_is_refused(study, tmp_path):
    cells = study.make_cells(read(study, tmp_path), tmp_path)
    study.save_result(CellResult("t", [], "short", "own", "ce", 1, cells[1].options, EVALUATION), tmp_path)
    changed = study.make_cells(read(study, tmp_path, options={"num_train_epochs": 2, "learning_rate": 1e-3}), tmp_path)
    with pytest.raises(UserError, match="t/short/own/ce/1 was run with another value of num_train_epochs"):
        study.read_results(tmp_path, changed, EVALUATION)
    with pytest.raises(UserError, match="t/short/own/ce/1 was run with another value of evaluation"):
        study.read_results(tmp_path, cells, {"known": EVALUATION["known"] | {"num_beams": "2"}})
    moved = study.make_cells(read(study, tmp_path), tmp_path / "elsewhere")
    assert study.read_results(tmp_path, moved, EVALUATION)  # directories may change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"ce": {"preset": "ce"}, "kd": {"learnign_rate": 1}}}, "^t/short/own/kd/2: .*learnign_rate"),
        ({"options": {"num_train_epochs": 1, "window_seconds": 31}}, "^t/short/own/ce/2: .*window_seconds"),
        ({"evaluation": {"known": {"datasets": "speech"}}}, "^evaluation: known: .*datasets"),
        (
            {"training": {"own": {"dataset": "speech", "language": "fr"}}},
            "^evaluation: known: give `language`, which t/short/own/ce/1 has",
        ),
    ],
)
def test_options_of_the_last_cell_are_checked_before_the_first_runs(study, tmp_path, changes, message):
    plan = read(study, tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        study.check_cells(study.make_cells(plan, tmp_path), plan.evaluation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 10}, "seeds: must be a list such as"),
        ({"seeds": ["a"]}, "seeds: must be integers, not a"),
        ({"baselines": "kd"}, "baselines: must be a list such as"),
        (
            {"training": {"own": {"dataset": "speech", "in_domain": "known"}}},
            "training: own: in_domain: must be a list",
        ),
        ({"speed_clips": "many"}, "speed_clips: must be integers, not many"),
    ],
)
def test_values_of_another_kind_are_named(study, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read(study, tmp_path, **changes)


def test_a_set_that_does_not_exist_is_named_before_anything_runs(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read(study, tmp_path, evaluation={"known": {"dataset": "./nowhere"}})
    monkeypatch.setattr(study, "run_cells", lambda *args: pytest.fail("runs"))
    monkeypatch.setattr(sys, "argv", ["study.py", "--study", str(tmp_path / "plan.yaml")])
    with pytest.raises(UserError, match="nowhere"):
        study.main()


def test_students_stay_when_only_their_evaluation_changes(study, tmp_path):
    cells = study.make_cells(read(study, tmp_path), tmp_path)
    study.save_result(CellResult("t", [], "short", "own", "ce", 1, cells[1].options, EVALUATION), tmp_path)
    with pytest.raises(UserError, match="another value of evaluation") as error:
        study.read_results(tmp_path, cells, {"known": EVALUATION["known"] | {"num_beams": "2"}})
    assert str(tmp_path / "runs") not in str(error.value) and str(tmp_path / "evaluations") in str(error.value)


def test_a_report_alone_measures_nothing(study, tmp_path, monkeypatch):
    """Its models may be elsewhere, as those of the published results are."""
    cells = study.make_cells(read(study, tmp_path, speed_set="known"), tmp_path)
    errors = SetErrors("known", "digest", [10, 10], [1, 2], [0, 0], 0, 2, [None, None])
    study.save_result(CellResult("t", [errors], "short", "own", "ce", 1, cells[1].options, EVALUATION), tmp_path)
    monkeypatch.setattr(study, "measure_speeds", lambda *args: pytest.fail("measures"))
    argv = ["study.py", f"--config={tmp_path / 'plan.yaml'}", "--output_dir", str(tmp_path), "--report_only"]
    monkeypatch.setattr(sys, "argv", argv)  # --config is the same as --study
    study.main()
    assert "## known: 2 clips, 20 words" in (tmp_path / "study.md").read_text()
    monkeypatch.setattr(sys, "argv", [*argv, "--only", "kdd", "1"])
    with pytest.raises(UserError, match="--only: no cell has kdd in its name, such as t/short/both/kd/2"):
        study.main()


def test_a_student_of_other_options_is_not_taken_for_that_of_the_study(study, tmp_path):
    """It was trained, and its evaluation failed; then the file was changed."""
    plan = read(study, tmp_path)
    cells = study.make_cells(plan, tmp_path)
    file = study.options_file(cells[1])
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(cells[1].options | {"encoder_cache_dir": "elsewhere"}))
    assert study.read_results(tmp_path, cells, plan.evaluation) == {}
    file.write_text(json.dumps(cells[1].options | {"learning_rate": "0.5"}))
    with pytest.raises(UserError, match="t/short/own/ce/1 was run with another value of learning_rate: rename"):
        study.read_results(tmp_path, cells, plan.evaluation)
    file.write_text(json.dumps(cells[1].options | {"noise_dir": "other_noises"}))  # changes the training data
    with pytest.raises(UserError, match="another value of noise_dir"):
        study.read_results(tmp_path, cells, plan.evaluation)


@pytest.mark.parametrize("changes", [{"eval_splits": ["validation", "test"]}, {"long_form": "sequential"}])
def test_an_evaluation_is_of_one_set_and_known_before_training(study, tmp_path, changes):
    plan = read(study, tmp_path, evaluation={"known": {"dataset": "speech"} | changes})
    with pytest.raises(UserError, match="evaluation: known: must be one set of clips"):
        study.check_cells([], plan.evaluation)


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_published_results_are_of_the_published_study(study, file):
    plan = study.read_plan(file)
    cells = study.make_cells(plan, file.with_suffix(""))
    study.check_cells(cells[-1:], plan.evaluation)
    results = file.with_suffix("") / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    assert len(study.read_results(results.parent, cells, plan.evaluation)) == len(lines)


def test_a_cell_whose_process_is_killed_does_not_stop_the_others(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_cell", run_or_die)
    names = ["dies", "a", "b"]
    cells = [SimpleNamespace(name=name, student="", labels="", options={}) for name in names]
    failed = study.run_cells(cells, {}, tmp_path, processes=2)
    assert len(failed) == 1 and failed[0].startswith("dies: ")
    done = [json.loads(line)["teacher"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(done) == ["a", "b"]


def test_cells_that_finish_after_ctrl_c_are_saved(study, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        monkeypatch.setattr(study, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_cell", run_or_die)
    monkeypatch.setattr(study, "wait", interrupted)
    cells = [SimpleNamespace(name=name, student="", labels="", options={}) for name in ("a", "dies", "c")]
    with pytest.raises(SystemExit) as ended:
        study.run_cells(cells, {}, tmp_path, processes=2)
    assert ended.value.code == 130
    assert [json.loads(line)["teacher"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == ["a"]


def test_cells_wait_for_the_labels_that_another_computes(study, tmp_path):
    teacher, *cells = study.make_cells(read(study, tmp_path), tmp_path)
    first, *others = [cell for cell in cells if cell.method == "kd"]
    own = [cell for cell in others if cell.training == "own"]
    assert study.next_cell(own, [first], set()) is None
    assert study.next_cell(others, [first], set()).training == "both"  # another cache
    assert study.next_cell([teacher], [first], set()) is teacher
    assert study.next_cell(own, [first], {first.labels}) is own[0]
    for cell in own:
        cell.options["concatenate_probability"] = "0.25"
    assert study.next_cell(own, [own[0]], {first.labels}) is None  # other clips with each seed


def test_a_cell_ends_if_its_study_was_killed_while_it_started(study, monkeypatch):
    class EndedError(Exception):
        pass

    def end(status: int) -> None:
        raise EndedError(status)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(EndedError):
        study.end_with(os.getpid())  # not its parent any more


@pytest.mark.slow
def test_a_killed_study_gives_the_same_results(tmp_path):
    """Two cells at a time, killed twice with all processes and interrupted once; then compared with one run."""
    save_teacher(tmp_path / "teacher")
    write_speech(tmp_path / "speech")
    plan = PLAN | {
        "teachers": {"t": str(tmp_path / "teacher")},
        "training": {"own": {"dataset": str(tmp_path / "speech"), "in_domain": ["known"]}},
        "evaluation": {"known": {"dataset": str(tmp_path / "speech")}},
        "baselines": ["ce", "teacher"],
        "options": {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))

    def start(directory: Path) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), "--study", str(tmp_path / "plan.yaml"), "--processes", "2"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        return subprocess.Popen([*command, "--output_dir", str(directory)], env=environment, **pipes)

    def wait_for(directory: Path, done: int, process: subprocess.Popen) -> None:
        file, limit = directory / "results.jsonl", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < limit:
            if (file.read_text().count("\n") if file.exists() else 0) >= done and list(
                directory.rglob("checkpoint-*")
            ):
                return
            time.sleep(0.1)

    killed = tmp_path / "killed"
    for done, how in ((1, signal.SIGKILL), (3, signal.SIGKILL), (4, signal.SIGINT)):
        process = start(killed)
        wait_for(killed, done, process)
        os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
        assert process.wait(timeout=120) != 0
        time.sleep(2)  # its cells notice within a second
    last = start(killed)
    output, _ = last.communicate(timeout=400)
    assert last.returncode == 0, output[-3000:]
    whole = start(tmp_path / "whole")
    output, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, output[-3000:]
    tables = [(tmp_path / name / "study.md").read_text() for name in ("killed", "whole")]
    assert tables[0] == tables[1] and len(re.findall("^## ", tables[0], re.MULTILINE)) >= 2
