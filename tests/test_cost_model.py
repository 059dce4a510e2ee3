"""`examples/benchmarks/cost_model.py` counts the operations that PyTorch counts."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from models import make_processor, make_whisper
from scripts import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig, WhisperForConditionalGeneration

from askd_hf.models.student import init_student


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cost = load_example("cost_model")
SHAPE = cost.Shape(width=32, encoder_layers=2, decoder_layers=4, mels=8, vocabulary=400, positions=60, max_tokens=48)
CLIPS, TOKENS, PADDED = 3, 8, 12


@pytest.fixture(scope="module")
def teacher() -> WhisperForConditionalGeneration:
    """Of `SHAPE`; its attention is written out, so that the counter sees all of its products."""
    config = dict(d_model=32, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, vocab_size=400)
    model = make_whisper(make_processor(), max_source_positions=60, max_target_positions=48, **config)
    model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


@pytest.fixture
def student(teacher) -> WhisperForConditionalGeneration:
    student = init_student(teacher, decoder_layers=2)
    student.set_attn_implementation("eager")
    student.model.encoder.requires_grad_(False)
    return student.train()


def batch(padded: int) -> dict[str, torch.Tensor]:
    """Features and labels, the first `TOKENS` of each clip real."""
    labels = torch.full((CLIPS, padded), -100)
    labels[:, :TOKENS] = 5
    return {"input_features": torch.randn(CLIPS, SHAPE.mels, 2 * SHAPE.positions), "labels": labels}


def counted(run) -> float:
    """FLOPs of `run` for one clip, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / CLIPS


def test_the_encoder(teacher):
    features = batch(PADDED)["input_features"]
    assert counted(lambda: teacher.model.encoder(features)) == pytest.approx(cost.encoder_forward(SHAPE), rel=0.02)


@pytest.mark.parametrize(("scenario", "padded"), [(0, SHAPE.max_tokens), (1, PADDED)])
def test_the_naive_step(teacher, student, scenario, padded):
    def step():
        inputs = batch(padded)
        with torch.no_grad():
            target = teacher(**inputs).logits.softmax(-1)
        output = student(**inputs)
        (output.loss + F.kl_div(output.logits.log_softmax(-1), target, reduction="sum")).backward()

    expected = cost.step_flops(cost.SCENARIOS[scenario], SHAPE, 2, TOKENS, PADDED)
    assert counted(step) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("scenario", cost.SCENARIOS[2:], ids=lambda scenario: scenario.name)
def test_a_step_of_our_trainer(monkeypatch, teacher, student, scenario):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    import steps

    inputs = steps.with_encoder_output(batch(PADDED), student, bf16=False)
    inputs = steps.with_teacher_columns(inputs, teacher, k=8)
    drop = ["input_features"] if scenario.reads_encoder else ["encoder_outputs"]
    drop += [] if scenario.reads_teacher else steps.TEACHER_COLUMNS
    inputs = {name: column for name, column in inputs.items() if name not in drop}
    options = steps.trainer_options(torch.device("cpu"), bf16=False, torch_compile=False)
    if scenario.self_teacher:
        step = steps.self_phase(student, "ema", options)
    else:
        step = steps.teacher_phase_ratio(student, None if scenario.reads_teacher else teacher, options)
    expected = cost.step_flops(scenario, SHAPE, 2, TOKENS, PADDED)
    assert counted(lambda: step(inputs)) == pytest.approx(expected, rel=0.02)


def test_trained_parameters_and_the_size_of_large_v3(student):
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert cost.trained_parameters(SHAPE, 2) == pytest.approx(trained, rel=0.05)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(
            WhisperConfig(
                d_model=1280,
                encoder_layers=32,
                decoder_layers=32,
                encoder_attention_heads=20,
                decoder_attention_heads=20,
                encoder_ffn_dim=5120,
                decoder_ffn_dim=5120,
                num_mel_bins=128,
                vocab_size=51_866,
            )
        )
    decoder = sum(p.numel() for p in model.model.decoder.parameters())
    assert cost.trained_parameters(cost.Shape(), 32) == pytest.approx(decoder, rel=0.01)


def test_the_table_says_that_it_is_computed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost_model.py", "--hours", "10"])
    cost.main()
    out = capsys.readouterr().out
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in out.splitlines() if "| " in line}
    tokens, padded = cost.clip_tokens(cost.CostArguments())
    for scenario in cost.SCENARIOS:
        expected = cost.step_flops(scenario, cost.Shape(), 2, tokens, padded) / 1e9
        assert float(cells[scenario.name].replace(",", "")) == pytest.approx(expected, abs=0.06), scenario.name
    assert "Computed, not measured" in out


def test_a_student_with_its_own_window_and_vocabulary(teacher, monkeypatch):
    """Counted: the teacher's encoder on its whole window, and everything of the student at its own size."""
    small = cost.Shape(
        width=32, encoder_layers=2, decoder_layers=4, mels=8, vocabulary=100, positions=30, max_tokens=48
    )
    config = dict(d_model=32, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, vocab_size=100)
    model = make_whisper(make_processor(), max_source_positions=30, max_target_positions=48, **config)
    model.set_attn_implementation("eager")
    student = init_student(model.requires_grad_(False), decoder_layers=2)
    student.set_attn_implementation("eager")
    student.model.decoder.requires_grad_(True)
    student.model.encoder.requires_grad_(False)
    features = torch.randn(CLIPS, SHAPE.mels, 2 * SHAPE.positions)
    labels = torch.full((CLIPS, TOKENS), 5)

    def step():
        with torch.no_grad():
            target = teacher(input_features=features, labels=labels).logits[..., :100]
        short = features[..., : 2 * small.positions]
        output = student(input_features=short, labels=labels)
        F.kl_div(output.logits.log_softmax(-1), target.softmax(-1), reduction="sum").backward()

    scenario = cost.Scenario("", 1, teacher=True)
    expected = cost.step_flops(scenario, SHAPE, 2, TOKENS, TOKENS, small)
    # the teacher here projects all 400 tokens
    expected += cost.projection_forward(SHAPE, TOKENS) - cost.projection_forward(small, TOKENS)
    assert counted(step) == pytest.approx(expected, rel=0.02)


def test_the_plan_of_several_sizes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost_model.py", "--plan"])
    cost.main()
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| 1")]
    assert [row[:2] for row in rows] == [
        [hours, gpus] for hours in ("1,000", "10,000", "100,000") for gpus in ("1", "8", "64")
    ]
    assert "Computed, not measured" in out


def test_what_a_step_waits_for():
    cached, none = cost.SCENARIOS[4], cost.SCENARIOS[2]
    args = cost.CostArguments()
    assert cost.bottleneck(none, cost.Shape(), args) == "GPU"
    # 32 clips of 1,500 x 1,280 float16 at 5 GB/s, and as many for each of the 8 GPUs of a node, whatever their number
    one = 32 * (1500 * 1280 * 2 + cost.teacher_cache_bytes(49.5, 32)) / 5e9
    for gpus, share in ((1, 1), (8, 8), (64, 8)):
        args = cost.CostArguments(gpus=gpus)
        assert cost.read_seconds(cached, cost.Shape(), args) == pytest.approx(share * one)
        assert cost.bottleneck(cached, cost.Shape(), args) == "disk"
    slow = cost.CostArguments(gpus=2, network_bandwidth=0.1)
    assert cost.bottleneck(none, cost.Shape(), slow) == "network"
    gradients = 4 * cost.trained_parameters(cost.Shape(), 2)
    assert cost.network_seconds(cost.Shape(), slow) == pytest.approx(gradients / 0.1e9)
    assert cost.network_seconds(cost.Shape(), cost.CostArguments()) == 0
    assert cost.check_hours(cost.CostArguments(hours=1340 * 16, gpus=64)) == pytest.approx(1 / 8)
