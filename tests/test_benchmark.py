"""`examples/benchmarks/training_step.py`: every variant runs, and they compute what they are compared for."""

import json
import sys

import pytest
import torch
from processes import run_there
from scripts import ROOT

VARIANTS = ["a", "a448", "b", "c", "d", "e", "f-ema", "f-snapshot", "g"]


def benchmark(teacher_dir, report, *arguments) -> dict:
    """The report of a run on the tiny model, whose vocabulary has 31 tokens."""
    command = f"--model {teacher_dir} --json {report} --use_cpu --batch_size 4 --label_tokens 3 12 --top_k 30"
    command += " --repetitions 2 --slow_repetitions 1"
    done = run_there(
        ROOT / "examples" / "benchmarks" / "training_step.py", *command.split(), *arguments, directory=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def comparison(teacher_dir, tmp_path_factory) -> dict:
    return benchmark(teacher_dir, tmp_path_factory.mktemp("report") / "report.json")["variants"]


def test_all_variants_are_timed(comparison):
    assert list(comparison) == VARIANTS
    for name, result in comparison.items():
        assert len(result["seconds"]) == (1 if name == "a448" else 2)
        assert all(seconds > 0 for seconds in result["seconds"])
        assert result["held_bytes"] > 0
        assert result["peak_bytes"] is None or result["peak_bytes"] >= 0


def test_what_is_compared_is_the_same_objective(comparison):
    loss = {name: result["first_loss"] for name, result in comparison.items()}
    # the preset kd is distil-whisper's 0.8*CE + T^2*KL divided by the sum of its weights
    assert loss["a"] == pytest.approx(1.8 * loss["c"], rel=1e-5)
    assert loss["a448"] == pytest.approx(loss["a"], rel=1e-5)
    assert loss["d"] == pytest.approx(loss["c"], rel=1e-4)  # the encoder's output in float16
    assert loss["e"] == pytest.approx(loss["c"], rel=1e-4)  # 30 of 31 tokens and the rest are all of them
    assert loss["g"] == pytest.approx(loss["b"], rel=1e-4)
    # the self-teacher is the student yet, from which it diverges by 0; the labels have the other 0.7
    for name in ("f-ema", "f-snapshot"):
        assert loss[name] == pytest.approx(0.7 * loss["g"], rel=1e-4)


def test_held_memory_is_that_of_what_is_needed(comparison):
    held = {name: result["held_bytes"] for name, result in comparison.items()}
    assert held["a"] == held["c"] == held["d"] > held["f-ema"] == held["f-snapshot"] > held["b"]
    assert held["e"] == held["b"] == held["g"]  # no teacher, and no copy of the student


def test_operations_are_counted_and_distillation_with_caches_takes_those_of_the_floor(comparison):
    flops = {name: sum(result["flops"]) for name, result in comparison.items()}
    assert flops["a448"] > flops["a"] > flops["c"] > flops["d"] > flops["e"]
    assert flops["e"] == pytest.approx(flops["g"], rel=0.02)
    assert {result["waits"] for result in comparison.values()} == {None}  # on a CPU nothing waits for a GPU


def test_operations_of_a_product(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    from utilization import count_flops

    layer, features = torch.nn.Linear(5, 7), torch.ones(3, 5, requires_grad=True)
    # forward, and backward for the weights and for the features
    assert count_flops(lambda: layer(features).sum().backward()) == 3 * 2 * 3 * 5 * 7


@pytest.mark.slow
def test_the_other_measurements(teacher_dir, tmp_path):
    more = "--sweep clips --sweep_values 4 8 --loss_memory --trainer_overhead 3"
    report = benchmark(teacher_dir, tmp_path / "report.json", *more.split())
    assert [row["clips"] for row in report["sweep"]] == [4, 8]
    assert all(len(seconds) == 2 for row in report["sweep"] for seconds in row["seconds"].values())
    losses = report["loss_memory"]
    assert losses["naive"]["loss"] == pytest.approx(1.8 * losses["ours"]["loss"], rel=1e-4)
    overhead = report["trainer_overhead"]
    seconds = overhead["seconds"]
    rest = seconds.pop("anything else")
    parts = {"reading batches", "training_step", "optimizer", "clipping", "self-teacher's average", "logging"}
    assert seconds.keys() <= parts and {"reading batches", "training_step", "optimizer", "clipping"} <= seconds.keys()
    assert all(part > 0 for part in seconds.values())
    assert 0 <= rest < sum(seconds.values())  # parts that overlapped would be counted twice


@pytest.mark.parametrize("quantity", ["batch", "labels", "vocabulary", "decoder_layers"])
def test_sweeps(monkeypatch, capsys, teacher_dir, tmp_path, quantity):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    import training_step as script

    values = {"batch": [2, 3], "labels": [4, 8], "vocabulary": [31, 40], "decoder_layers": [1, 2]}[quantity]
    arguments = f"--model {teacher_dir} --use_cpu --batch_size 4 --label_tokens 3 12 --top_k 8 --repetitions 1"
    arguments += f" --json {tmp_path / 'report.json'} --sweep {quantity} --sweep_values {values[0]} {values[1]}"
    monkeypatch.setattr(sys, "argv", ["training_step.py", *arguments.split()])
    script.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row[quantity] for row in report["sweep"]] == values
    assert f"{quantity}  a: median s" in capsys.readouterr().out
