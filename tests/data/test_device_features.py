"""Features that are computed where the batch is moved to equal those of the worker processes."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from soft_labels import speech
from speech import write_speech
from test_caches import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from training import history
from transformers import WhisperFeatureExtractor, WhisperProcessor

from askd_hf.arguments.augment import AugmentArguments
from askd_hf.data import SpeechCollator
from askd_hf.data.augment import Augmenter
from askd_hf.data.device_features import WaveformFeatures, attention_mask
from askd_hf.errors import UserError
from askd_hf.models.student import init_student


def waves(*seconds: float) -> list[np.ndarray]:
    """Noise that gets louder, so that the loudest frame is the last one."""
    rng = np.random.default_rng(0)
    lengths = [round(16_000 * second) for second in seconds]
    return [(rng.standard_normal(n) * np.linspace(0.001, 0.3, n)).astype(np.float32) for n in lengths]


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("seconds", [(0.01, 0.4, 1.9), (2.0, 1.0), (2.5, 0.7), (30.0,)])
def test_they_equal_whispers_own(mel_bins, seconds):
    """Shorter than the window of 2 s, as long, and longer, which is cut."""
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=2 if max(seconds) < 30 else 30)
    clips = waves(*seconds)
    own = extractor(clips, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    features = WaveformFeatures.of(extractor, clips).to("cpu")
    assert features.shape == own.input_features.shape
    assert torch.allclose(features, own.input_features, atol=1e-5)
    assert torch.equal(attention_mask(clips, extractor), own.attention_mask)
    assert WaveformFeatures.of(extractor, clips).to("cpu", torch.float16).dtype == torch.float16


@pytest.mark.parametrize("setting", [dict(dither=0.1), dict(padding_value=0.5)], ids=str)
def test_settings_that_the_features_would_ignore_are_refused_before_training(processor, student, setting):
    ((name, value),) = setting.items()
    message = rf"--features_on_device requires a feature extractor with {name} 0\.0, got {value} .*: set it to 0\.0"
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1, **setting)
    collator = SpeechCollator(processor, student.config, features_on_device=True)
    with pytest.raises(UserError, match=message):  # a teacher's own
        dataclasses.replace(collator, teacher_extractor=extractor)
    odd = WhisperProcessor(extractor, processor.tokenizer)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(collator, processor=odd)
    dataclasses.replace(collator, processor=odd, features_on_device=False)


def test_the_product_with_the_mel_filters_has_no_low_precision():
    """On a GPU a float32 product may be one of TF32: `torch.backends` says so, for all of the process."""
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
                products.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Products():
        features = WaveformFeatures.of(WhisperFeatureExtractor(chunk_length=2), waves(1.0, 0.5)).to("cpu")
    assert products == [torch.float64]
    assert features.dtype == torch.float32


@pytest.fixture
def rows(tmp_path):
    clips = speech(write_speech(tmp_path / "speech", 8))
    return [row | {"rng_key": (3, 0, number)} for number, row in enumerate(clips)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(teacher_extractor="same"),
        dict(teacher_extractor="other"),
        dict(teacher_extractor="same", augmenter=True),
        dict(shortest_context=0.5),
        dict(spec_augment=True, shortest_context=0.5),
    ],
)
def test_batches_are_the_same_once_moved(processor, student, rows, options):
    options = dict(options)
    extractors = {"same": processor.feature_extractor, "other": WhisperFeatureExtractor(6, chunk_length=1)}
    student.config.apply_spec_augment = options.pop("spec_augment", False)
    if "teacher_extractor" in options:
        options["teacher_extractor"] = extractors[options["teacher_extractor"]]
    if options.get("augmenter"):
        options["augmenter"] = Augmenter(AugmentArguments(augmentations=["noise"], augment_probability=1.0), 16_000)
    collator = SpeechCollator(processor, student.config, **options)
    deferred = dataclasses.replace(collator, features_on_device=True)
    for clips in (rows, [{key: row[key] for key in row if key != "rng_key"} for row in rows]):  # and in evaluation
        batch, on_device = collator(clips), send_to_device(deferred(clips), "cpu")
        assert batch.keys() == on_device.keys()
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(value.float(), on_device[name].float(), atol=1e-5), name
                assert value.shape == on_device[name].shape, name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_computes_none_in_its_workers_and_learns_the_same(
    tmp_path, processor, teacher, rows, monkeypatch, workers
):
    student = init_student(teacher, decoder_layers=1)
    clips = speech(tmp_path / "speech")
    losses = []
    for on_device in (False, True):
        collator = SpeechCollator(processor, student.config, features_on_device=on_device)
        if on_device:
            monkeypatch.setattr(
                "askd_hf.data.collator.extract_features", lambda *_: pytest.fail("features in the collator")
            )
        trainer = make_trainer(
            tmp_path / str(on_device), student, clips, collator, teacher, clips, max_steps=4, adaptive_window=1,
            dataloader_num_workers=workers, teacher_schedule="adaptive", eval_strategy="steps", eval_steps=2,
            predict_with_generate=False,
        )  # fmt: skip
        trainer.train()
        evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        assert len(evaluated) == 2
        losses.append(torch.cat([history(trainer, "loss", "teacher_weight").flatten(), torch.tensor(evaluated)]))
    assert torch.allclose(*losses, atol=1e-4)
