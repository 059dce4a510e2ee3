"""`--dry_run`: the plan against the run that it plans, and what is left on disk."""

import json
import re
import tempfile
from pathlib import Path

import datasets
import pytest
import soundfile
from run_plans import number, plan_of, sizes, table, tree
from safetensors.torch import load_file
from scripts import ROOT, run_here
from scripts import distill_options as options

from askd_hf.data import load_speech_dataset
from askd_hf.models.loading import load_processor
from askd_hf.training.held_out import HeldOutClips

MORE = ["--eval_splits", "validation", "--save_total_limit", 9]
MORE += ["--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2]


def nbytes(weight) -> int:
    return weight.numel() * weight.element_size()


def total(files) -> int:
    return sum(file.stat().st_size for file in files)


def test_the_plan_has_the_numbers_of_the_run(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    monkeypatch.setattr("askd_hf.training.held_out.SHARE", 0.25)  # of 16 clips 4 are held out
    monkeypatch.setattr("askd_hf.training.held_out.MIN_CLIPS", 4)
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", *MORE, "--self_weight", "0.3")
    status, out, err = run_here(monkeypatch, capsys, *arguments, "--dry_run")
    assert status == 0, err
    plan = plan_of(out)
    assert not (tmp_path / "run").exists()
    judged, judge = [], HeldOutClips.judge_labels
    monkeypatch.setattr(HeldOutClips, "judge_labels", lambda *args: judged.append(1) or judge(*args))
    status, printed, err = run_here(monkeypatch, capsys, *arguments)
    assert status == 0, err
    run = tmp_path / "run"

    weights = load_file(run / "model.safetensors")
    trained = sum(w.numel() for name, w in weights.items() if ".decoder." in name)
    of_teacher = load_file(teacher_dir / "model.safetensors")
    counts = [f"{sum(w.numel() for w in ws.values()):,}" for ws in (weights, of_teacher)]
    assert plan["student: parameters"].split() == counts and plan["student: trained"] == f"{trained:,}"
    assert plan["student: encoder layers"].split() == ["2", "2"]
    assert plan["student: decoder layers"].split() == ["2", "4"]
    assert plan["student: window"].split() == ["1", "s", "1", "s"]
    assert plan["student: made from"] == f"the encoder and decoder layers 0, 3 of {teacher_dir}"
    assert re.match(
        r"\d+\.\d times as fast as the teacher at batch size 1 \(\d+ tokens per clip", plan["student: speed"]
    )
    stored = [(folder / "model.safetensors").stat().st_size for folder in (run, teacher_dir)]
    # the student's is computed, without the names of the weights
    assert sizes(plan["student: on disk"]) == pytest.approx([sum(map(nbytes, weights.values())), stored[1]], abs=500)

    for name, files in (("training", "train"), ("evaluation validation", "validation")):
        seconds = sum(soundfile.info(file).duration for file in (speech_dir / files).rglob("*.wav"))
        clips = len(list((speech_dir / files).rglob("*.wav")))
        length = f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"
        assert plan[f"data: {name}"].startswith(f"{clips} clips, {length} s"), plan
    assert plan["data: little speech"].startswith(
        f"{plan['data: training'].split(', ')[1]} for training may be too little"
    )
    tokenizer = load_processor(str(teacher_dir)).tokenizer
    texts = load_speech_dataset(str(speech_dir), None, "train")["text"][:]
    tokens = [len(tokenizer(f" {text}").input_ids) - 1 for text in texts]  # the start token isn't a label
    assert plan["data: training"].endswith(f", {round(sum(tokens) / 16)} label tokens per clip")

    state = json.loads((run / "trainer_state.json").read_text())
    assert state["max_steps"] == 6  # 12 clips, batches of 3 x 2
    assert plan["schedule: steps"] == "6 of 3 x 2 clips: 3 epochs of 2 steps"
    adaptive = "adaptive: with unreliable labels the teacher keeps more weight, also in the second phase"
    assert plan["schedule: phases"] == f"{table(printed)}\n{adaptive}" and adaptive in printed
    assert plan["data: held out"] == "4 training clips, for the adaptive schedule"
    assert plan["time: held-out clips"].startswith(f"{len(judged)} measurements: at most ")
    assert " for 6 steps; " in plan["time: training"]
    of_phases = [number(plan[f"time: {name} phase"]) for name in ("teacher", "self")]
    assert all(0 < seconds < 20 for seconds in of_phases)
    per_epoch = [
        re.search(r"median of 3\), (.+) per epoch$", plan[f"time: {name} phase"]) for name in ("teacher", "self")
    ]
    assert [number(found[1]) for found in per_epoch] == pytest.approx([2 * seconds for seconds in of_phases], rel=0.1)
    assert plan["time: evaluation"].startswith("3 times, ")
    assert sum("eval_loss" in row for row in state["log_history"]) == 3

    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    assert plan["memory and disk: checkpoints"].startswith(f"{len(checkpoints)} times, ")
    files = [
        "model.safetensors",
        "optimizer.pt",
        "self_teacher.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    expected = total(checkpoints[-1] / name for name in files)
    # the headers of the tensors are large in comparison here
    assert sizes(plan["memory and disk: checkpoints"])[0] == pytest.approx(expected, rel=0.35)
    assert sizes(plan["memory and disk: peak memory"])[0] > 100e6
    assert plan["output: directory"] == f"{run} (will be created)" and plan["output: pushed"] == "nothing"
    assert plan["output: resumed from"] == "nothing: the run starts from the beginning"
    assert plan["time: after training"].startswith("evaluation of student, initial student and teacher: ")
    assert plan["time: measured speed"].startswith("of student and teacher on 6 clips: about ")
    assert "time: alignment heads" not in plan and "alignment heads [layer" not in printed  # the teacher has none
    of_plan = ("training", "held-out clips", "evaluation", "after training", "measured speed")
    parts = [
        number(re.findall(r"[0-9.]+ s", plan[f"time: {name}"])[which])
        for name, which in zip(of_plan, (0, 0, 1, 0, 0), strict=True)
    ]
    assert number(plan["time: total"].removeprefix("about ")) == pytest.approx(sum(parts), rel=0.1)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--encoder_cache_dir", "caches/encoder", "--teacher_cache_dir", "caches/labels", "--teacher_top_k", "5"],
        ["--layer_selection", "greedy", "--max_duration_in_seconds", "0.8", "--report_to", "tensorboard"],
    ],
    ids=["plain", "caches", "greedy"],
)
def test_nothing_is_left_on_disk(monkeypatch, capsys, caplog, tmp_path, teacher_dir, speech_dir, more):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    places = [tmp_path, teacher_dir, speech_dir]
    home = tmp_path.with_name("home")  # the one of the tests is shared with other processes
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    before = tree(*places)
    arguments = [f"--teacher={teacher_dir}", f"--dataset={speech_dir}", "--eval_splits=validation", "--use_cpu"]
    status, out, err = run_here(monkeypatch, capsys, *arguments, "--per_device_train_batch_size=4", "--dry_run", *more)
    assert status == 0, err
    assert tree(*places) == before
    kept = home / "askd_hf" / "audio_checks-1"
    assert plan_of(out)["output: found in the clips"] == f"kept in {kept}, for the run"
    assert {file.parent for file in home.rglob("*") if file.is_file()} == {kept}
    assert str(tmp_path / "tmp") not in out + err + caplog.text  # temporary files are named nowhere


def test_skipped_clips_are_counted_and_an_existing_run_is_kept(
    monkeypatch, capsys, caplog, tmp_path, teacher_dir, speech_dir
):
    run = tmp_path / "run"
    arguments = options(teacher_dir, speech_dir, run, "--max_duration_in_seconds", 0.8, "--save_steps", 2)
    arguments += ["--save_strategy", "steps", "--max_steps", "4", "--compare", "False"]
    durations = [soundfile.info(file).duration for file in (speech_dir / "train").rglob("*.wav")]
    longer = sum(duration > 0.8 for duration in durations)
    status, out, err = run_here(monkeypatch, capsys, *arguments, "--dry_run")
    assert status == 0, err
    assert plan_of(out)["data: training"].endswith(f"; {longer} skipped ({longer} over --max_duration_in_seconds)")
    assert f"{longer} of 16 clips are filtered out ({longer} over --max_duration_in_seconds)\n" in caplog.text
    assert run_here(monkeypatch, capsys, *arguments).returncode == 0

    before = tree(run)
    ended = run_here(monkeypatch, capsys, *arguments, "--dry_run")
    assert ended.returncode == 2
    assert f"error: {run} already contains a run (last checkpoint: checkpoint-4). Resume it" in ended.stderr
    resumed = ["--resume_from_checkpoint", run / "checkpoint-2", "--dry_run"]
    status, out, err = run_here(monkeypatch, capsys, *arguments, *resumed)
    assert status == 0, err
    plan = plan_of(out)
    assert plan["output: resumed from"] == str(run / "checkpoint-2") and "(exists)" in plan["output: directory"]
    assert plan["time: training"].endswith("for 2 steps left")
    assert plan["memory and disk: checkpoints"].startswith("1 time, ")
    # other clips than those of the checkpoint: found when the models and the data are there
    ended = [
        run_here(monkeypatch, capsys, *arguments, "--max_train_samples", 12, *more)
        for more in (resumed, [*resumed[:-1], "--output_dir", tmp_path / "other"])
    ]
    assert [one.returncode for one in ended] == [2, 2]
    errors = [one.stderr.strip().splitlines()[-1] for one in ended]
    assert errors[0] == errors[1] and "clips (number of clips)" in errors[0]
    assert tree(run) == before


def broken(folder: Path) -> list[str]:
    (folder / "audio").mkdir(parents=True)
    (folder / "audio" / "0.wav").write_bytes(b"RIFF")
    (folder / "metadata.csv").write_text("file_name,transcription\naudio/0.wav,abc\n")
    return ["--dataset", str(folder)]


MISTAKES = {
    "an option": lambda folder: ["--keep_adapter", "--lora_r", "2"],
    "a teacher": lambda folder: ["--teacher", str(folder / "nowhere")],
    "a clip": lambda folder: broken(folder / "broken"),
    "a split": lambda folder: ["--eval_splits", "nothing"],
    "layers": lambda folder: ["--decoder_layers", "9"],
    "a student": lambda folder: ["--student", str(broken(folder / "broken")[1])],
    "LoRA": lambda folder: ["--lora_r", "2", "--lora_target_modules", "nothing"],
    "the teacher cache": lambda folder: ["--teacher_cache_dir", str(folder / "full")],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_as_in_a_run(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, mistake):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("else")
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", *MISTAKES[mistake](tmp_path))
    before = tree(tmp_path)
    dry = run_here(monkeypatch, capsys, *arguments, "--dry_run")
    assert (dry.returncode, dry.stdout) == (2, "") and tree(tmp_path) == before
    real = run_here(monkeypatch, capsys, *arguments)
    messages = [ended.stderr[ended.stderr.rindex("error: ") :] for ended in (dry, real)]
    assert real.returncode == 2 and messages[0] == messages[1]


@pytest.mark.slow
def test_the_demo_has_a_plan(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status, out, err = run_here(monkeypatch, capsys, "--config", "examples/demo/demo.yaml", "--dry_run", "--use_cpu")
    assert status == 0, err
    plan = plan_of(out)
    teacher = load_file("examples/demo/teacher/model.safetensors")
    counts = {name: weight.numel() for name, weight in teacher.items()}
    without = sum(count for name, count in counts.items() if re.search(r"decoder\.layers\.[12]\.", name))
    width = len(teacher["model.decoder.layer_norm.weight"])
    without += width * (1500 - 320 + 50 * (30 - 4))  # tokens, and positions of the window
    parameters = [f"{count:,}" for count in (sum(counts.values()) - without, sum(counts.values()))]
    assert plan["student: parameters"].split() == parameters
    assert plan["data: held out"] == "10 training clips, for the adaptive schedule"
    assert plan["schedule: steps"] == "240 of 16 clips: 20 epochs of 12 steps"
    assert plan["time: held-out clips"].startswith("39 measurements: at most ")
    assert re.search(r" for 240 steps; .* if the teacher is kept to the end$", plan["time: training"])


def test_several_processes_are_refused(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    monkeypatch.setattr("askd_hf.config.ASKDConfig.world_size", 2)
    ended = run_here(monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "run"), "--dry_run")
    assert ended.returncode == 2
    assert "error: --dry_run is not supported with several processes: start it without accelerate" in ended.stderr
