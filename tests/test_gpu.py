"""What only a CUDA card shows. `make test-gpu` runs it; `make test` leaves it out."""

import warnings

import numpy as np
import pytest
import torch
from training import history, make_trainer, options
from transformers import WhisperFeatureExtractor

from askd_hf.config import ASKDConfig
from askd_hf.data.device_features import WaveformFeatures
from askd_hf.projection import LMHeadInputs, chunked_distillation_loss, label_positions

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def card(monkeypatch):
    # asked here and not at import: a process that has asked for CUDA can't fork any that use it
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA card")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or float32 convolutions aren't the CPU's


def first_step(tmp_path, teacher, student, **changes) -> torch.Tensor:
    """The terms of the first step, of all clips at once and before any update, and the norm of its gradient."""
    once = dict(max_steps=1, per_device_train_batch_size=16, teacher_phase_ratio=1.0, dataloader_num_workers=0)
    trainer = make_trainer(tmp_path, teacher, student, **(once | changes))
    trainer.train()
    return history(trainer, "blend_loss", "ce_loss", "teacher_loss", "teacher_ce", "grad_norm")


def test_bf16_is_the_default_where_the_card_computes_in_it(tmp_path):
    able = torch.cuda.get_device_capability() >= (8, 0)  # Ampere; a T4, which is older, emulates it
    config = ASKDConfig(**options(tmp_path, use_cpu=False))
    assert config.bf16 is able
    assert config.device.type == "cuda" and config.dataloader_pin_memory
    assert not ASKDConfig(**options(tmp_path, use_cpu=False, fp16=True)).bf16
    assert not ASKDConfig(**options(tmp_path, use_cpu=True)).bf16


def test_both_models_are_on_the_card_until_the_teacher_is_released(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, use_cpu=False, dataloader_num_workers=0)
    for model in (trainer.model, trainer.teacher):
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    trainer.train()
    assert trainer.teacher is None
    assert {average.device.type for average in trainer.blend.self_teacher.parameters.values()} == {"cuda"}


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_a_step_is_the_cpus(tmp_path, teacher, student, freeze_encoder):
    changes = dict(bf16=False, freeze_encoder=freeze_encoder)
    expected = first_step(tmp_path / "cpu", teacher, student, **changes)
    measured = first_step(tmp_path / "card", teacher, student, use_cpu=False, **changes)
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision_is_near_the_cpus(tmp_path, teacher, student, precision):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card emulates bfloat16")
    expected = first_step(tmp_path / "cpu", teacher, student)[:, :-1]
    half = {"bf16": False, precision: True}
    measured = first_step(tmp_path / "card", teacher, student, use_cpu=False, **half)[:, :-1]
    torch.testing.assert_close(measured, expected, rtol=0.1, atol=0.05)


def test_fp16_trains_with_its_loss_scale(tmp_path, teacher, student):
    # the scale begins at 2**16 and is halved at each overflow, whose update is left out
    trainer = make_trainer(
        tmp_path, teacher, student, use_cpu=False, fp16=True, bf16=False, max_steps=16, dataloader_num_workers=0
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(after[name].isfinite().all() for name in before)
    assert any(not torch.equal(after[name], weight.to(after[name].device)) for name, weight in before.items())
    assert history(trainer, "blend_loss").isfinite().all()


def gradients(gradient_scale: float, device: str = "cuda", dtype: torch.dtype | None = None) -> list[torch.Tensor]:
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
    with torch.autocast(device, dtype, enabled=dtype is not None):
        total, _ = chunked_distillation_loss(
            LMHeadInputs(hidden, weight), labels, gradient_scale=gradient_scale / tokens
        )
    (total / tokens * gradient_scale).backward()
    return [hidden.grad / gradient_scale, weight.grad / gradient_scale]


def error(measured: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative distance."""
    return max(((m - e).norm() / e.norm()).item() for m, e in zip(measured, expected, strict=True))


def test_the_loss_scale_keeps_small_gradients_in_float16():
    """A token's gradient at a word is of about 1 / (4096 * 1000), where float16 has few digits left."""
    expected = gradients(1.0)
    scaled = error(gradients(2.0**12, dtype=torch.float16), expected)
    assert scaled < 0.01
    assert error(gradients(1.0, dtype=torch.float16), expected) > 3 * scaled


def test_a_compiled_step_is_the_plain_one(tmp_path, teacher, student):
    changes = dict(use_cpu=False, bf16=False)
    expected = first_step(tmp_path / "plain", teacher, student, **changes)
    compiled = first_step(
        tmp_path / "compiled", teacher, student, torch_compile=True, torch_compile_backend="inductor", **changes
    )
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-4)


def test_features_on_the_card_are_whispers_own():
    extractor = WhisperFeatureExtractor()
    clips = [np.random.default_rng(i).standard_normal(16_000 * i).astype(np.float32) for i in (1, 7)]
    own = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    features = WaveformFeatures.of(extractor, clips).pin_memory().to("cuda", non_blocking=True)
    assert features.device.type == "cuda"
    torch.testing.assert_close(features.cpu(), own, rtol=0.0, atol=1e-4)


def test_a_micro_batch_waits_for_the_causal_masks_only(tmp_path, teacher, student):
    """One of the student and one of the teacher, in transformers; see test_synchronizations.py."""
    trainer = make_trainer(
        tmp_path, teacher, student, use_cpu=False, preset="kd", max_steps=2, dataloader_num_workers=0
    )
    trainer.train()
    trainer.state.global_step = 1
    batch = next(iter(trainer.get_train_dataloader()))
    batch["label_positions"] = label_positions(batch["labels"])
    inputs = trainer._prepare_inputs(batch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=torch.tensor(9, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) <= 2
