"""Steps and models on a CUDA card against those on the CPU. `make test-gpu` runs it.

`make test` runs on the CPU what doesn't need a card, so that a change of the package breaks no test unseen.
"""

import numpy as np
import pytest
import torch
from models import save_whisper
from scripts import ROOT, load_script
from test_benchmark import benchmark
from test_synchronizations import Waits
from training import first_step, history, make_trainer, on, options
from transformers import WhisperFeatureExtractor
from transformers.utils.import_utils import enable_tf32

from askd_hf.config import ASKDConfig
from askd_hf.data.device_features import WaveformFeatures
from askd_hf.models.teacher_memory import offload
from askd_hf.projection import LMHeadInputs, chunked_distillation_loss, label_positions

AMPERE = (8, 0)  # the first that computes in bfloat16; a T4, which is older, emulates it


@pytest.mark.gpu
def test_bf16_is_the_default_where_the_card_computes_in_it(tmp_path, card):
    config = ASKDConfig(**options(tmp_path, use_cpu=False))
    assert config.bf16 is (torch.cuda.get_device_capability() >= AMPERE)
    assert config.device.type == "cuda" and config.dataloader_pin_memory
    assert not ASKDConfig(**options(tmp_path, use_cpu=False, fp16=True)).bf16
    assert not ASKDConfig(**options(tmp_path, use_cpu=True)).bf16


def test_both_models_are_on_the_device_until_the_teacher_is_released(tmp_path, teacher, student, device):
    trainer = make_trainer(tmp_path, teacher, student, **on(device))
    for model in (trainer.model, trainer.teacher):
        assert {parameter.device.type for parameter in model.parameters()} == {device}
    trainer.train()
    assert trainer.teacher is None
    assert {average.device.type for average in trainer.blend.self_teacher.parameters.values()} == {device}


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_a_step_is_the_cpus(tmp_path, teacher, student, device, freeze_encoder):
    expected = first_step(tmp_path / "cpu", teacher, student, freeze_encoder=freeze_encoder)
    measured = first_step(tmp_path / "device", teacher, student, freeze_encoder=freeze_encoder, **on(device))
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision_is_near_the_cpus(tmp_path, teacher, student, device, precision):
    if precision == "fp16" and device == "cpu":
        pytest.skip("Trainer has fp16 on GPUs only")
    if precision == "bf16" and device == "cuda" and torch.cuda.get_device_capability() < AMPERE:
        pytest.skip("this card emulates bfloat16")
    expected = first_step(tmp_path / "cpu", teacher, student)[:, :-1]
    half = on(device) | {"bf16": False, precision: True}
    measured = first_step(tmp_path / "device", teacher, student, **half)[:, :-1]
    torch.testing.assert_close(measured, expected, rtol=0.1, atol=0.05)
    assert not torch.equal(measured, expected)


@pytest.mark.gpu
def test_fp16_trains_with_its_loss_scale(tmp_path, teacher, student, card):
    # the scale begins at 2**16 and is halved at each overflow, whose update is left out
    trainer = make_trainer(tmp_path, teacher, student, max_steps=16, **on("cuda") | dict(fp16=True))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(after[name].isfinite().all() for name in before)
    assert any(not torch.equal(after[name], weight.to(after[name].device)) for name, weight in before.items())
    assert history(trainer, "loss").isfinite().all()


def gradients(device: str, gradient_scale: float, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Of the mean over 4096 tokens with respect to hidden states and weight, as the trainer asks for them.

    Args:
        gradient_scale: the loss scale.
        dtype: of autocast; None: float32.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary = 4096, 32, 1000
    hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul(0.1).to(device).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    scale = torch.tensor(gradient_scale, device=device)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        total, _ = chunked_distillation_loss(LMHeadInputs(hidden, weight), labels, gradient_scale=scale / tokens)
    (total / tokens * scale).backward()
    return [hidden.grad / scale, weight.grad / scale]


def error(measured: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative distance."""
    return max(((m - e).norm() / e.norm()).item() for m, e in zip(measured, expected, strict=True))


def test_the_loss_scale_keeps_small_gradients_in_float16(device):
    """A token's gradient at a word is of about 1 / (4096 * 1000), where float16 has few digits left."""
    expected = gradients(device, 1.0)
    scaled = error(gradients(device, 2.0**12, torch.float16), expected)
    assert scaled < 0.01
    assert error(gradients(device, 1.0, torch.float16), expected) > 3 * scaled


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_a_compiled_step_is_the_plain_one(tmp_path, teacher, student, compiling, freeze_encoder):
    device, compiled = compiling
    changes = on(device) | dict(freeze_encoder=freeze_encoder)
    expected = first_step(tmp_path / "plain", teacher, student, **changes)
    measured = first_step(tmp_path / "compiled", teacher, student, **changes | compiled)
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_an_offloaded_layer_is_pinned_and_gives_the_same(teacher):
    layer, device = teacher.model.decoder.layers[0].cuda(), torch.device("cuda")
    states, encoded = torch.randn(2, 5, 16, device=device), torch.randn(2, 50, 16, device=device)
    with torch.no_grad():
        expected = layer(states, encoder_hidden_states=encoded)
        offload([layer], device)
        weights = layer._hf_hook.weights_map
        assert all(weight.is_pinned() and weight.device.type == "cpu" for weight in weights.weights.values())
        torch.testing.assert_close(layer(states, encoder_hidden_states=encoded), expected)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_features_on_the_device_are_whispers_own(device):
    """Also with TF32, which --torch_compile turns on."""
    extractor = WhisperFeatureExtractor()
    clips = [np.random.default_rng(i).standard_normal(16_000 * i).astype(np.float32) for i in (1, 7)]
    own = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    features = WaveformFeatures.of(extractor, clips)
    if device == "cuda":
        enable_tf32(True)
        features = features.pin_memory()
    features = features.to(device, non_blocking=True)
    assert features.device.type == device
    torch.testing.assert_close(features.cpu(), own, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, dict(divergence="jensen_shannon"), dict(fp16=True)], ids=str)
def test_a_micro_batch_waits_for_nothing(tmp_path, teacher, student, device, changes):
    """Counted by PyTorch on a card, and by test_synchronizations.py on the CPU."""
    if device == "cpu" and changes.get("fp16"):
        pytest.skip("Trainer has fp16 on GPUs only")
    trainer = make_trainer(tmp_path, teacher, student, preset="kd", max_steps=2, **on(device) | changes)
    trainer.train()
    trainer.state.global_step = 1
    batch = next(iter(trainer.get_train_dataloader()))
    batch |= {"label_positions": label_positions(batch["labels"])}  # as `SpeechCollator` makes batches
    batch |= {"decoder_input_ids": trainer.runner.model_inputs(batch)["decoder_input_ids"]}
    inputs, tokens = trainer._prepare_inputs(batch), torch.tensor(9, device=device)
    model = trainer.model.train()
    if device == "cpu":
        with Waits() as waits:
            trainer.compute_loss(model, inputs, num_items_in_batch=tokens)
        assert waits.found == []
    else:
        count_waits = load_script(ROOT / "examples" / "benchmarks" / "utilization.py").count_waits
        found = count_waits(lambda: trainer.compute_loss(model, inputs, num_items_in_batch=tokens), tokens.device)
        assert found == 0


BENCHMARK = "--batch_size 8 --variants a c d e f-ema --repetitions 2 --batches 2 --bf16 --cost_table"
WHERE = {
    "cpu": "--attn_implementation eager",  # the counter doesn't see SDPA's products on a CPU
    "cuda": "--label_tokens 25 74 --top_k 32 --use_cpu no",
}


def test_a_step_of_the_size_of_large_v3(tmp_path, device, capsys):
    """Its weights are random. It needs no more memory than a card of 24 GB has; on the CPU the model is a tiny one."""
    model = "large-v3" if device == "cuda" else save_whisper(tmp_path / "tiny", encoder_ffn_dim=64, decoder_ffn_dim=64)
    report = benchmark(model, tmp_path / "report.json", *BENCHMARK.split(), *WHERE[device].split())
    of = report["variants"]
    held = {name: one["held_bytes"] / 1e9 for name, one in of.items()}
    needed = {name: held[name] + (one["peak_bytes"] or 0) / 1e9 for name, one in of.items()}
    assert held["c"] == held["d"] > held["e"]
    lines = [f"{report['machine']['device']}, {model}, batches of 8:"]
    for name, row in report["cost_table"].items():
        operations, seconds = row["flops_per_clip"], row["seconds_per_step"]["measured"]
        assert operations["counted"] == pytest.approx(operations["computed"], rel=0.05), name
        rate = 8 * operations["counted"] / seconds / 1e12
        assert rate < 2500 and seconds < 30  # no card is faster, and a slow one needs a second or two
        figures = f"{1000 * seconds:.0f} ms, {rate:.0f} TFLOP/s, {needed[name]:.1f} GB, {of[name]['waits']} waits"
        lines.append(f"  {row['row']}: {figures}")
    if device == "cuda":
        with capsys.disabled():
            print("\n" + "\n".join(lines))
        # the teacher in bfloat16, of which ours keeps the encoder's layers in the CPU's memory
        assert held["c"] - held["e"] == pytest.approx(2 * 0.913, rel=0.05)
        assert held["a"] - held["c"] == pytest.approx(2 * 0.629, rel=0.05)
        assert needed["c"] < needed["a"]
        assert max(needed[name] for name in of if name != "a") < 20
