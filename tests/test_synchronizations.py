"""A micro-batch of training on a GPU must not wait for it: no operation whose result the CPU needs.

Except for one in each decoder of transformers, which looks for packed sequences when it makes the causal mask.
"""

import traceback

import pytest
import torch
from models import make_processor
from speech import write_speech
from torch.utils._python_dispatch import TorchDispatchMode
from training import make_trainer

from askd_hf.data import Limits, SpeechCollator, filter_invalid_clips, load_speech_dataset

# on a GPU these copy a value, or the size of their result, to the CPU
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2")


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
        if (name in WAITING or masked or sized) and not is_of_others():
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def is_of_others() -> bool:
    """Whether it is in transformers' causal mask, or where batches are made, on the CPU."""
    stack = traceback.extract_stack()
    return any(frame.name == "find_packed_sequence_indices" or frame.filename.endswith("fetch.py") for frame in stack)


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="kd", freeze_encoder=False, hidden_weight=1.0),
        dict(preset="kd", weight_teacher_by_label_prob=True),
        dict(preset="ps-kd", snapshot_strategy="no", self_teacher="ema", self_schedule="constant"),
        dict(preset="ce"),
    ],
    ids=["hidden", "teacher", "self", "labels"],
)
def test_a_micro_batch_waits_for_nothing(tmp_path, teacher, student, options):
    processor = make_processor()
    speech = load_speech_dataset(str(write_speech(tmp_path / "speech", clips=4)), None, "train")
    collator = SpeechCollator(processor, student.config)
    clips = filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20), on_bad_audio="error")
    trainer = make_trainer(tmp_path / "run", teacher, student, max_steps=2, **options)
    trainer.train()
    model, batch = trainer.model.train(), collator(list(clips))
    trainer.state.global_step = 1  # as in its second step, the last one
    with Waits() as waits:
        trainer.compute_loss(
            model, {k: v for k, v in batch.items() if k != "clip"}, num_items_in_batch=torch.tensor(9)
        )
    assert waits.found == []
    with Waits() as waits:  # without the positions of the collator
        del batch["label_positions"], batch["clip"]
        trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(9))
    assert waits.found


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
