"""`examples/benchmarks/cost_model.py` counts the operations that PyTorch counts."""

import importlib.util
import re
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


def test_what_a_step_waits_for():
    cached, none = cost.SCENARIOS[4], cost.SCENARIOS[2]
    args = cost.CostArguments()
    assert cost.bottleneck(none, cost.Shape(), args) == "GPU"
    # 32 clips of 1,500 x 1,280 float16, 49.5 tokens x (32 x 4 + 8) bytes and 15 s x 16 kB, at 5 GB/s; and as many for
    # each of the 8 GPUs of a node, whatever their number
    one = 32 * (1500 * 1280 * 2 + 49.5 * 136 + 15 * 16e3) / 5e9
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


def test_the_cpus_decode_and_make_features():
    """1,000 hours are 240,000 clips of 15 s."""
    naive, none, encoder, both = (cost.SCENARIOS[number] for number in (1, 2, 3, 4))
    shape, args = cost.Shape(), cost.CostArguments(gpus=8)
    for scenario in (naive, none):
        hours = 10 * 240_000 * (15 / 1340 + 0.035) / 16 / 3600
        assert cost.row(scenario, shape, args)["training, h"] == pytest.approx(hours)
        assert cost.bottleneck(scenario, shape, args) == "CPU"
    features_alone = cost.CostArguments(gpus=8, decoding_speed=1e12)
    assert cost.row(none, shape, features_alone)["training, h"] == pytest.approx(1.4583, abs=1e-4)
    on_device = cost.CostArguments(gpus=8, features_ms=0)
    assert cost.cpu_seconds(none, shape, on_device) == pytest.approx(8 * 32 * 15 / 1340 / 16)
    assert cost.bottleneck(none, shape, on_device) == "GPU"
    for scenario in (encoder, both):
        assert cost.cpu_seconds(scenario, shape, args) == 0
    # as many cores as the GPUs take, at which both need the same time
    cores = cost.row(none, shape, args)["cores at full speed"]
    enough = cost.CostArguments(gpus=8, cores=cores)
    assert cost.cpu_seconds(none, shape, enough) == pytest.approx(cost.compute_seconds(none, shape, enough))
    assert cost.bottleneck(none, shape, cost.CostArguments(gpus=8, cores=cores + 1)) == "GPU"
    # a student with a window of 10 s: its features and the teacher's, of 30 s; the latter only, if its own is cached
    short = cost.CostArguments(window_seconds=10)
    assert cost.core_seconds(none, shape, short) == pytest.approx(15 / 1340 + 0.035 * 4 / 3)
    assert cost.core_seconds(encoder, shape, short) == pytest.approx(15 / 1340 + 0.035)
    assert cost.core_seconds(both, shape, short) == 0


def test_filling_the_caches_computes_features_and_writes():
    """Each node fills its own, so more nodes don't do it faster."""
    encoder, both = cost.SCENARIOS[3:5]
    shape, peak = cost.Shape(), 0.4 * 989e12
    audio, outputs, labels = 15 * 16e3, 1500 * 1280 * 2, 49.5 * 136  # bytes of a clip
    encoding = cost.encoder_forward(shape) / peak
    for gpus in (8, 64):
        (one,) = cost.cache_passes(encoder, shape, cost.CostArguments(gpus=gpus))
        assert one == pytest.approx(
            {"GPU": encoding / 8, "CPU": (15 / 1340 + 0.035) / 16, "disk": audio / 5e9 + outputs / 2e9}
        )
        hours = cost.row(encoder, shape, cost.CostArguments(gpus=gpus))["filling caches, h"]
        assert hours == pytest.approx(240_000 * (15 / 1340 + 0.035) / 16 / 3600) == pytest.approx(0.1925, abs=1e-4)
    # with enough cores the disk is the limit, and with one GPU the GPU
    many = cost.row(encoder, shape, cost.CostArguments(gpus=8, cores=64))["filling caches, h"]
    assert many == pytest.approx(240_000 * (audio / 5e9 + outputs / 2e9) / 3600)
    one_gpu = cost.row(encoder, shape, cost.CostArguments())["filling caches, h"]
    assert one_gpu == pytest.approx(240_000 * encoding / 3600)
    # the teacher's pass reads what the encoder's has written, and copies the audio
    labeling = cost.decoder_forward(shape, 32, 74.25) + cost.projection_forward(shape, 49.5)
    _, second = cost.cache_passes(both, shape, cost.CostArguments(gpus=8))
    disk = (audio + outputs) / 5e9 + (labels + audio) / 2e9
    assert second == pytest.approx({"GPU": labeling / peak / 8, "CPU": 0.0, "disk": disk})
    assert cost.row(both, shape, cost.CostArguments())["caches, GB"] == pytest.approx(
        240_000 * (outputs + labels + audio) / 1e9
    )
    # a student with another window: the teacher runs its encoder on its own audio
    first, second = cost.cache_passes(both, shape, cost.CostArguments(gpus=8, window_seconds=10))
    assert first["disk"] == pytest.approx(audio / 5e9 + outputs / 3 / 2e9)
    assert second["CPU"] == pytest.approx((15 / 1340 + 0.035) / 16)
    assert second["GPU"] == pytest.approx((labeling + cost.encoder_forward(shape)) / peak / 8)
    assert second["disk"] == pytest.approx(audio / 5e9 + (labels + audio) / 2e9)


def printed(monkeypatch, capsys, *options: str) -> list[list[str]]:
    """The cells of the table that the program prints."""
    monkeypatch.setattr(sys, "argv", ["cost_model.py", *options])
    cost.main()
    out = capsys.readouterr().out
    assert "Computed, not measured" in out
    return cells(out)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_the_plan_of_several_sizes(monkeypatch, capsys):
    """Hours of 8 GPUs, by hand: the check, the caches, and the limit of each way to train."""
    found = {(row[0], row[1]): row[2:] for row in printed(monkeypatch, capsys, "--plan")[2:]}
    assert [*found] == [(hours, gpus) for hours in ("1,000", "10,000", "100,000") for gpus in ("1", "8", "64")]
    check, audio, outputs, labels = 1000 / 1340 / 16, 240e3, 3.84e6, 6732
    features = 240_000 * (15 / 1340 + 0.035) / 16 / 3600
    second = 240_000 * ((audio + outputs) / 5e9 + (labels + audio) / 2e9) / 3600
    for nodes in (1, 8):
        none = (check + 10 * features) / nodes
        encoder = (check + 10 * 240_000 * (audio + outputs) / 5e9 / 3600) / nodes + features
        both = (check + 10 * 240_000 * (audio + outputs + labels) / 5e9 / 3600) / nodes + features + second
        expected = [f"{none:.2f}, 0, CPU", f"{encoder:.2f}, 0.9, disk", f"{both:.2f}, 1.0, disk"]
        assert found["1,000", str(8 * nodes)] == expected
    assert [cell.split(", ")[-1] for cell in found["1,000", "1"]] == ["GPU", "GPU", "disk"]


def test_the_guide_has_the_tables_of_the_program(monkeypatch, capsys):
    guide = (ROOT / "examples" / "guides" / "speed.md").read_text().partition("## Computed: large-v3")[2]
    plan = printed(monkeypatch, capsys, "--plan")
    assert all(row in cells(guide) for row in plan)
    heads, _, *rows = printed(monkeypatch, capsys)
    tables = {row[0]: row[1:] for row in cells(guide)}
    for row in rows:
        values = dict(zip(heads, row, strict=True))
        flops, hours, caches, waits, speedup = tables[row[0]]
        assert flops == f"{float(values['GFLOP per clip'].replace(',', '')):,.0f}"
        assert (hours, waits, speedup) == (values["in all, h"], values["waits for"], row[-1])
        assert caches == (f"{float(values['caches, GB']):.0f} GB" if values["caches, GB"] else "")
    by_name = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    assert "would read 10 GB/s with both caches, and take 6.4 cores without a cache" in guide
    assert by_name["ours, both cached"]["read at full speed, GB/s"] == "10.3"
    assert by_name["ours, no caches"]["cores at full speed"] == "6.4"
    assert "Eight GPUs take 51 cores" in guide
    eight = {row[0]: dict(zip(heads, row, strict=True)) for row in printed(monkeypatch, capsys, "--gpus", "8")}
    assert eight["ours, no caches"]["cores at full speed"] == "50.9"


@pytest.mark.parametrize(
    ("options", "without", "encoder"),
    [
        ("--cores 64", "0.62", "0.69"),
        ("--features_ms 0", "0.65", "0.72"),
        ("--features_ms 14 --decoding_speed 3200", "0.80", "0.69"),
    ],
)
def test_the_guides_other_machines(monkeypatch, capsys, options, without, encoder):
    guide = " ".join((ROOT / "examples" / "guides" / "speed.md").read_text().split())
    assert re.search(rf"`{options}`: {without} (hours without a cache, {encoder} with|and {encoder}\))", guide)
    rows = {(row[0], row[1]): row[2:] for row in printed(monkeypatch, capsys, "--plan", *options.split())}
    assert [cell.split(",")[0] for cell in rows["1,000", "8"]][:2] == [without, encoder]
