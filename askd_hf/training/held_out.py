"""Measure on held-out clips whether the labels are reliable, for the adaptive schedule.

A label is disputed if it isn't the teacher's most probable token. The student, which was trained on both labels and
teacher on other clips, upholds a disputed label if it is its most probable token, ignoring the teacher's. Systematic
differences, such as a style or words that the teacher lacks, can be learned from labels and generalize to held-out
clips. Random errors don't generalize, even if the student has memorized those of the training set.

The measure is a rank rather than a cross-entropy, because a cross-entropy also improves when noisy labels make the
student less confident.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from ..data import SpeechStream
from ..data.device_features import WaveformFeatures
from ..objective import TopK
from ..projection import LMHeadInputs, capture_lm_head_inputs
from ..schedule import LabelsJudged
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)

SHARE = 0.05  # of the training set
MAX_CLIPS = 128
MIN_CLIPS = 8  # with fewer the measurement is too noisy
TOKEN_CHUNK_SIZE = 256  # tokens per projection onto the vocabulary
ROWS_OF_A_STREAM = 1000  # the default shuffle buffer


def hold_out(dataset: Any) -> tuple[Any, Sequence[Any]]:
    """Split the training set into the rest and the held-out clips: 5 % of the clips, at most 128.

    The choice is the same in all runs on the same data. Clips without speech aren't held out. All rows of a held-out
    clip are removed from the training set, also those of clips joined with it. For a stream it is 5 % of its first
    1000 rows. If this is fewer than 8 clips, or if the length is unknown, no clips are held out and a warning is
    logged.
    """
    if isinstance(dataset, SpeechStream):
        chosen: Sequence[Any]
        # read by one process only; all hold out the same clips
        found = [dataset.choose_held_out(SHARE, ROWS_OF_A_STREAM) if PartialState().is_main_process else None]
        ((chosen, speech),) = broadcast_object_list(found)
        training = dataset.without(chosen)
    elif hasattr(dataset, "__len__"):
        training, chosen, speech = _hold_out_rows(dataset)
    else:
        logger.warning("--teacher_schedule is linear, not adaptive: the length of the training set is unknown")
        return dataset, []
    if len(chosen) >= MIN_CLIPS:
        return training, chosen
    logger.warning(
        "--teacher_schedule is linear, not adaptive: to hold out clips requires %d clips, got %d. Nothing needs to be "
        "done",
        math.ceil(MIN_CLIPS / SHARE),
        speech,
    )
    return dataset, []


def _hold_out_rows(dataset: Any) -> tuple[Any, Any, int]:
    """Return the training rows, the held-out rows and the number of clips with speech."""
    clips, rows = _speech(dataset)
    joined = dataset["joined_keys"][:] if "joined_keys" in _columns(dataset) else [None] * len(dataset)
    number = min(int(SHARE * len(rows)), MAX_CLIPS)
    chosen = sorted(np.random.default_rng(0).permutation(list(rows.values()))[:number].tolist())
    names = {clips[row] for row in chosen}
    others = [row for row, name in enumerate(clips) if names.isdisjoint(joined[row] or [name])]
    if isinstance(dataset, Dataset):
        return dataset.select(others), dataset.select(chosen), len(rows)
    return Subset(dataset, others), Subset(dataset, chosen), len(rows)


def _columns(dataset: Any) -> list[str]:
    return dataset.column_names if isinstance(dataset, Dataset) else []


def _speech(dataset: Any) -> tuple[Sequence[Any], dict[Any, int]]:
    """Return the clip of each row, and the first row of each single clip with speech."""
    columns = _columns(dataset)
    clips = dataset["audio_key"][:] if "audio_key" in columns else range(len(dataset))
    joined = dataset["joined_keys"][:] if "joined_keys" in columns else itertools.repeat(None, len(dataset))
    silent = dataset["no_speech"][:] if "no_speech" in columns else itertools.repeat(False, len(dataset))
    rows: dict[Any, int] = {}
    for row, (clip, is_silent, keys) in enumerate(zip(clips, silent, joined, strict=True)):
        if not is_silent and keys is None:
            rows.setdefault(clip, row)
    return clips, rows


@dataclass
class HeldOutBatch:
    """A batch of the collator."""

    inputs: dict[str, Any]
    # the teacher's most probable token at each label token. None before the first measurement.
    choices: Tensor | None = None

    def keep_encoded(self, encoded: Tensor) -> None:
        """Replace the features by the output of a frozen encoder, `(batch, positions, d_model)`, in CPU memory."""
        if "encoder_outputs" not in self.inputs:
            kept = {name: value for name, value in self.inputs.items() if not name.endswith("input_features")}
            self.inputs = kept | {"encoder_outputs": encoded.cpu()}


class HeldOutClips:
    """The held-out rows, as batches that are collated once and stay in CPU memory."""

    def __init__(self, rows: Sequence[Any]):
        self.rows = rows
        self._batches: list[HeldOutBatch] | None = None

    def batches(self, collator: Callable[[list[Any]], dict[str, Any]], args: TrainingArguments) -> list[HeldOutBatch]:
        """Return the batches of this process."""
        if self._batches is None:
            own_rows = [self.rows[row] for row in range(args.process_index, len(self.rows), args.world_size)]
            size = args.per_device_eval_batch_size
            batches = [collator(own_rows[start : start + size]) for start in range(0, len(own_rows), size)]
            # without the names of clips and the skipped rows of a stream
            self._batches = [
                HeldOutBatch({k: v for k, v in b.items() if isinstance(v, Tensor | WaveformFeatures)}) for b in batches
            ]
        return self._batches

    @torch.no_grad()
    def judge_labels(
        self, runner: ModelRunner, model: nn.Module, collator: Callable[[list[Any]], dict[str, Any]]
    ) -> LabelsJudged:
        """Measure the labels of all held-out clips with the current student. Returns the sums over all processes."""
        args, accelerator = runner.args, runner.accelerator
        student = accelerator.unwrap_model(model, keep_torch_compile=False)
        training = student.training
        student.eval()
        counts = torch.zeros(4, device=args.device)
        for held_out in self.batches(collator, args):
            inputs = send_to_device(held_out.inputs, args.device)
            positions = runner.positions_of(inputs)
            batch = runner.model_inputs(inputs)
            with accelerator.autocast():
                runner.encode(student, batch, with_states=False)
                if held_out.choices is None:  # the teacher runs once per clip
                    held_out.choices = first_choices(runner.teacher_target(inputs, batch, positions)[0])
                if "encoder_outputs" in batch:
                    batch.pop("input_features", None)
                with capture_lm_head_inputs(student, positions) as captured:
                    student(**batch)
                counts += judge(captured[0], inputs, held_out.choices, student.config.eos_token_id)
            if runner.encoder_is_fixed():  # a frozen encoder, too
                held_out.keep_encoded(batch["encoder_outputs"][0])
        student.train(training)
        return LabelsJudged(*accelerator.reduce(counts, reduction="sum").tolist())


def first_choices(target: LMHeadInputs | TopK) -> Tensor:
    """Return the most probable token at each position of a soft target, `(tokens,)`."""
    if isinstance(target, TopK):
        return target.token_ids[:, 0]
    hidden, weight = target.in_compute_dtype()
    return torch.cat([(chunk @ weight.T).argmax(-1) for chunk in hidden.split(TOKEN_CHUNK_SIZE)])


def judge(student: LMHeadInputs, inputs: dict[str, Tensor], choices: Tensor, end_of_text: int) -> Tensor:
    """Return the fields of `LabelsJudged` for a batch, `(4,)`.

    Only text tokens and the end of text count, in clips with speech.

    Args:
        student: at the label tokens.
        inputs: with `labels` `(batch, tokens)`, and `no_speech` `(batch,)` bool if there are clips without speech.
        choices: the teacher's `first_choices` at the label tokens.
        end_of_text: the id of the end of text. Higher ids are special tokens.
    """
    labels = inputs["labels"]
    label_mask = labels != -100
    counted = label_mask & (labels <= end_of_text)
    if "no_speech" in inputs:
        counted &= ~inputs["no_speech"][:, None]
    disputed = torch.zeros_like(label_mask)
    disputed[label_mask] = choices != labels[label_mask]
    disputed &= counted
    at = disputed[label_mask]
    is_upheld = torch.zeros_like(label_mask)
    is_upheld[disputed] = upheld(student._replace(hidden=student.hidden[at]), labels[disputed], choices[at])
    disputes = disputed.sum(1)
    share = is_upheld.sum(1) / disputes.clamp(min=1)
    return torch.stack([share.sum(), (disputes > 0).sum(), disputes.sum(), counted.sum()])


def upheld(student: LMHeadInputs, labels: Tensor, choices: Tensor) -> Tensor:
    """Return whether each label is the student's most probable token apart from `choices`, `(tokens,)` bool."""
    hidden, weight = student.in_compute_dtype()
    results = []
    for h, label, choice in zip(*(t.split(TOKEN_CHUNK_SIZE) for t in (hidden, labels, choices)), strict=True):
        logits = h @ weight.T
        label_logit = logits.gather(-1, label[:, None])[:, 0]
        results.append(label_logit >= logits.scatter(-1, choice[:, None], -torch.inf).amax(-1))
    return torch.cat(results)
