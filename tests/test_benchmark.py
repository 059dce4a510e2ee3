"""`examples/benchmarks/training_step.py`: every variant runs, and they compute what they are compared for."""

import json
import statistics
import sys

import pytest
import torch
from models import save_whisper
from processes import run_there
from scripts import ROOT
from test_synchronizations import Waits

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
def report(tmp_path_factory) -> dict:
    """Of a model whose products the counter sees: on a CPU not those of SDPA."""
    directory = tmp_path_factory.mktemp("report")
    shape = dict(d_model=32, encoder_ffn_dim=128, decoder_ffn_dim=128, init_std=0.1)
    teacher = save_whisper(directory / "whisper", **shape)
    more = "--attn_implementation eager --cost_table --peak_tflops 0.001"
    return benchmark(teacher, directory / "report.json", *more.split())


@pytest.fixture
def comparison(report) -> dict:
    return report["variants"]


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


@pytest.mark.parametrize("variant", ["c", "d", "e", "f-ema", "f-snapshot"])
def test_our_batches_have_the_positions_of_the_label_tokens(monkeypatch, teacher_dir, variant):
    """Without them a step would look for them, which waits for a GPU."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    from comparison import VARIANTS, BenchmarkArguments, columns_for, prepare

    bench = prepare(BenchmarkArguments(str(teacher_dir), label_tokens=[3, 12], top_k=8, use_cpu=True))
    update = VARIANTS[variant].build(bench, bench.student)
    update(columns_for(variant, bench, 0))
    with Waits() as waits:
        update(columns_for(variant, bench, 0))
    assert "nonzero" not in waits.found


def test_operations_of_a_product(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    from utilization import count_flops

    layer, features = torch.nn.Linear(5, 7), torch.ones(3, 5, requires_grad=True)
    # forward, and backward for the weights and for the features
    assert count_flops(lambda: layer(features).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_the_rows_of_the_cost_model_are_measured_beside_computed(report):
    rows = [row["row"] for row in report["cost_table"].values()]
    assert rows[0] == "naive, padded to 448" and rows[-1] == "ours, self phase" and len(rows) == 6
    tokens = [number for batch in report["label_tokens"] for number in batch]
    for name, row in report["cost_table"].items():
        flops, seconds = row["flops_per_clip"], row["seconds_per_step"]
        assert flops["counted"] == pytest.approx(sum(report["variants"][name]["flops"]) / len(tokens))
        assert flops["computed"] == pytest.approx(flops["counted"], rel=0.03), name
        assert seconds["measured"] == statistics.median(report["variants"][name]["seconds"])
        # 4 clips at 40 % of 989 TFLOP/s, and what moves besides
        assert seconds["computed"] > 4 * flops["computed"] / (0.4 * 989e12)


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
