"""A micro-batch of training on a GPU must not wait for it.

No operation has a result that the CPU needs, and no tensor is made of values in the CPU's memory.
"""

import traceback
from types import SimpleNamespace

import pytest
import torch
from models import make_processor
from speech import write_speech
from torch.utils._python_dispatch import TorchDispatchMode
from training import Clips, collate, make_trainer

from askd_hf.data import Limits, SpeechCollator, filter_invalid_clips, load_speech_dataset
from askd_hf.training.loss_sums import gradient_scale

# on a GPU these copy a value, or the size of their result, to the CPU; the last one copies a new tensor to the GPU
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique",
    "_unique2",
    "lift_fresh",
)


class Waits(TorchDispatchMode):
    """Notes the operations that would wait."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        sized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if (name in WAITING or masked or sized) and not makes_batches():
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def makes_batches() -> bool:
    """Whether it is where batches are made, on the CPU."""
    return any(frame.filename.endswith("fetch.py") for frame in traceback.extract_stack())


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="kd", freeze_encoder=False, hidden_weight=1.0),
        dict(preset="kd", weight_teacher_by_label_prob=True),
        dict(preset="ps-kd", snapshot_strategy="no", self_teacher="ema", self_schedule="constant"),
        dict(preset="ce"),
        dict(preset="kd", divergence="reverse_kl"),
        dict(preset="kd", divergence="jensen_shannon"),
        dict(preset="kd", divergence="skewed_kl"),
        dict(preset="kd", loss_scale=2.0**10),
    ],
    ids=["hidden", "teacher", "self", "labels", "reverse KL", "Jensen-Shannon", "skewed KL", "loss scale"],
)
def test_a_micro_batch_waits_for_nothing(tmp_path, teacher, student, options):
    processor = make_processor()
    speech = load_speech_dataset(str(write_speech(tmp_path / "speech", clips=4)), None, "train")
    collator = SpeechCollator(processor, student.config)
    clips = filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20), on_bad_audio="error")
    scale = options.get("loss_scale")
    options = {name: value for name, value in options.items() if name != "loss_scale"}
    trainer = make_trainer(tmp_path / "run", teacher, student, max_steps=2, **options)
    trainer.train()
    trainer.accelerator.scaler = None if scale is None else loss_scaler(scale)
    model, batch = trainer.model.train(), collator(list(clips))
    trainer.state.global_step = 1  # as in its second step, the last one
    tokens = torch.tensor(9)
    del batch["clip"]
    with Waits() as waits:
        trainer.compute_loss(model, dict(batch), num_items_in_batch=tokens)
    assert waits.found == []
    del batch["label_positions"]
    with Waits() as waits:  # without the positions of the collator
        trainer.compute_loss(model, batch, num_items_in_batch=tokens)
    assert set(waits.found) == {"nonzero"}


def loss_scaler(scale: float) -> torch.amp.GradScaler:
    """That of fp16, which accelerate refuses on a CPU, after the first backward pass."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    return scaler


def test_the_factor_of_the_gradient_is_that_of_the_loss():
    accelerator = SimpleNamespace(device=torch.device("cpu"), scaler=None)
    assert gradient_scale(accelerator, torch.tensor(9)) == 1.0
    accelerator.scaler = loss_scaler(2.0**10)
    for tokens, factor in ((torch.tensor(9), 2.0**10 / 9), (4, 2.0**8), (0, 2.0**10), (None, 2.0**10)):
        torch.testing.assert_close(gradient_scale(accelerator, tokens), torch.tensor(factor))
    accelerator.scaler.update(2.0**5)  # after an overflow
    assert gradient_scale(accelerator, None) == 2.0**5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_causal_mask_is_the_usual_one(tmp_path, teacher, student, attention):
    student.set_attn_implementation(attention)
    runner = make_trainer(tmp_path, teacher, student).runner
    rows = collate(Clips(student.config, clips=3).rows)
    ours = runner.model_inputs({name: rows[name] for name in ("input_features", "labels")})
    usual = {name: value for name, value in ours.items() if name != "past_key_values"}
    with torch.no_grad():
        assert torch.equal(runner.student.eval()(**ours).logits, runner.student(**usual).logits)
        # a token sees nothing of those after it
        ours["decoder_input_ids"] = ours["decoder_input_ids"][:, :5]
        first = runner.student(**ours).logits
    torch.testing.assert_close(first, runner.student(**usual).logits[:, :5], rtol=0, atol=1e-5)


def test_more_micro_batches_per_update_wait_no_more(tmp_path, teacher, student):
    """The whole loop of Trainer, which looks at the loss of each micro-batch by default."""
    processor = make_processor()
    speech = load_speech_dataset(str(write_speech(tmp_path / "speech", clips=8)), None, "train")
    collator = SpeechCollator(processor, student.config)
    clips = filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20), on_bad_audio="error")
    waits = {}
    for name, pieces, more in (("one", 1, {}), ("four", 4, {}), ("filter", 4, dict(logging_nan_inf_filter=True))):
        options = dict(max_steps=2, per_device_train_batch_size=8 // pieces, gradient_accumulation_steps=pieces)
        trainer = make_trainer(tmp_path / name, teacher, student, preset="kd", **options, **more)
        trainer.train_dataset, trainer.data_collator = clips, collator
        with Waits() as found:
            trainer.train()
        waits[name] = len(found.found)
    assert waits["one"] == waits["four"] < waits["filter"]
