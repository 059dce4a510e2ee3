"""Clips that training never sees, and what they tell of the labels: may these take the teacher's place?

Where the teacher's first choice is the label, both ask the student for the same. What counts is where they disagree.
There the student, which has learnt from both on other clips, decides: is the label its first choice, not counting the
teacher's? What can be learnt from labels, a style or words that the teacher doesn't know, carries over to clips that
weren't trained on. Random errors don't, however well the student has memorized those of the training set. A rank,
unlike a cross-entropy, isn't better for a student that has become unsure, which is all that noisy labels teach.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from ..data import SpeechStream
from ..objective import TopK
from ..projection import LMHeadInputs, capture_lm_head_inputs
from ..schedule import LabelsJudged
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)

SHARE = 0.05  # of the training set
MOST_CLIPS = 128
FEWEST_CLIPS = 8  # fewer tell nothing, and would be missed
TOKEN_CHUNK_SIZE = 256  # projected onto the vocabulary
ROWS_OF_A_STREAM = 1000  # read in search of clips, as many as its shuffling reads ahead


def hold_out(dataset: Any) -> tuple[Any, Sequence[Any]]:
    """The training set without the clips that are kept out of it, and these: 5 % of it, at most 128.

    They are the same in all runs on the same data. Clips without speech aren't among them; one that comes in several
    rows leaves the training set with all of them. Of a stream it is 5 % of its first 1000 rows. Where this would be
    fewer than 8 clips, or the length isn't known, none are held out, and a warning is logged.
    """
    if isinstance(dataset, SpeechStream):
        chosen: Sequence[Any]
        training, chosen, speech = dataset.hold_out(SHARE, ROWS_OF_A_STREAM)
    elif hasattr(dataset, "__len__"):
        training, chosen, speech = _hold_out_rows(dataset)
    else:
        logger.warning("teacher_schedule adaptive: the length of the training set isn't known, so it is linear")
        return dataset, []
    if len(chosen) >= FEWEST_CLIPS:
        return training, chosen
    logger.warning(
        "teacher_schedule adaptive: %d clips are too few to keep some out of training (it takes %d), so it is linear",
        speech,
        math.ceil(FEWEST_CLIPS / SHARE),
    )
    return dataset, []


def _hold_out_rows(dataset: Any) -> tuple[Any, Any, int]:
    """The training rows, the held-out ones, and how many clips with speech there are."""
    clips, rows = _speech(dataset)
    number = min(int(SHARE * len(rows)), MOST_CLIPS)
    chosen = sorted(np.random.default_rng(0).permutation(list(rows.values()))[:number].tolist())
    names = {clips[row] for row in chosen}
    others = [row for row, name in enumerate(clips) if name not in names]
    if isinstance(dataset, Dataset):
        return dataset.select(others), dataset.select(chosen), len(rows)
    return Subset(dataset, others), Subset(dataset, chosen), len(rows)


def _speech(dataset: Any) -> tuple[Sequence[Any], dict[Any, int]]:
    """For each row whose clip it is; and for each clip with speech its first row."""
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    clips = dataset["audio_key"][:] if "audio_key" in columns else range(len(dataset))
    silent = dataset["negative"][:] if "negative" in columns else itertools.repeat(False, len(dataset))
    rows: dict[Any, int] = {}
    for row, (clip, is_silent) in enumerate(zip(clips, silent, strict=True)):
        if not is_silent:
            rows.setdefault(clip, row)
    return clips, rows


@dataclass
class HeldOutBatch:
    """A batch of the collator, and the teacher's first choices at its label tokens once they are known."""

    inputs: dict[str, Any]
    choices: Tensor | None = None

    def keep_encoded(self, encoded: Tensor) -> None:
        """Have the output of a frozen encoder, `(batch, positions, d_model)`, in CPU memory in place of features."""
        if "encoder_outputs" not in self.inputs:
            kept = {name: value for name, value in self.inputs.items() if not name.endswith("input_features")}
            self.inputs = kept | {"encoder_outputs": encoded.cpu()}


class HeldOutClips:
    """Held-out rows as batches, which are made once and stay in CPU memory."""

    def __init__(self, rows: Sequence[Any]):
        self.rows = rows
        self._batches: list[HeldOutBatch] | None = None

    def batches(self, collator: Callable[[list[Any]], dict[str, Any]], args: TrainingArguments) -> list[HeldOutBatch]:
        """This process's part of them."""
        if self._batches is None:
            mine = [self.rows[row] for row in range(args.process_index, len(self.rows), args.world_size)]
            size = args.per_device_eval_batch_size
            batches = [collator(mine[start : start + size]) for start in range(0, len(mine), size)]
            # names aren't needed, nor which rows of a stream can't be used: they are never trained on
            self._batches = [HeldOutBatch({k: v for k, v in b.items() if isinstance(v, Tensor)}) for b in batches]
        return self._batches

    @torch.no_grad()
    def judge_labels(
        self, runner: ModelRunner, model: nn.Module, collator: Callable[[list[Any]], dict[str, Any]]
    ) -> LabelsJudged:
        """The student's judgment on the labels of these clips, over all processes.

        Args:
            model: the student as it is trained now, wrapped or not.
        """
        args, accelerator = runner.args, runner.accelerator
        student = accelerator.unwrap_model(model, keep_torch_compile=False)
        training = student.training
        student.eval()
        counts = torch.zeros(4, device=args.device)
        for held_out in self.batches(collator, args):
            inputs = send_to_device(held_out.inputs, args.device)
            label_mask = inputs["labels"] != -100
            batch = runner.model_inputs(inputs)
            with accelerator.autocast():
                runner.encode(student, batch, with_states=False)
                if held_out.choices is None:  # the teacher runs once
                    held_out.choices = first_choices(runner.teacher_target(inputs, batch, label_mask)[0])
                if "encoder_outputs" in batch:
                    batch.pop("input_features", None)
                with capture_lm_head_inputs(student, label_mask) as captured:
                    student(**batch)
                counts += judge(captured[0], inputs, held_out.choices, student.config.eos_token_id)
            if runner.encoder_is_fixed():  # so does the encoder
                held_out.keep_encoded(batch["encoder_outputs"][0])
        student.train(training)
        return LabelsJudged(*accelerator.reduce(counts, reduction="sum").tolist())


def first_choices(target: LMHeadInputs | TopK) -> Tensor:
    """The most probable token at each of a soft target's tokens: `(tokens,)`."""
    if isinstance(target, TopK):
        return target.token_ids[:, 0]
    hidden, weight = target.in_compute_dtype()
    return torch.cat([(chunk @ weight.T).argmax(-1) for chunk in hidden.split(TOKEN_CHUNK_SIZE)])


def judge(student: LMHeadInputs, inputs: dict[str, Tensor], choices: Tensor, end_of_text: int) -> Tensor:
    """What the student makes of the labels of a batch: `LabelsJudged`, `(4,)`.

    Only text counts, and where it ends, in clips with speech.

    Args:
        student: at the label tokens.
        inputs: with `labels` `(batch, longest)`, and `no_speech` `(batch,)` where there are clips without.
        choices: the teacher's `first_choices` at the label tokens.
        end_of_text: behind it in the vocabulary are only tokens that aren't text.
    """
    labels = inputs["labels"]
    real = labels != -100
    counted = real & (labels <= end_of_text)
    if "no_speech" in inputs:
        counted &= ~inputs["no_speech"][:, None]
    disputed = torch.zeros_like(real)
    disputed[real] = choices != labels[real]
    disputed &= counted
    at = disputed[real]
    stands = torch.zeros_like(real)
    stands[disputed] = upheld(student._replace(hidden=student.hidden[at]), labels[disputed], choices[at])
    disputes = disputed.sum(1)
    share = stands.sum(1) / disputes.clamp(min=1)
    return torch.stack([share.sum(), (disputes > 0).sum(), disputes.sum(), counted.sum()])


def upheld(student: LMHeadInputs, labels: Tensor, contradicted_by: Tensor) -> Tensor:
    """Whether each label is the student's first choice, if not before `contradicted_by`: `(tokens,)` bool."""
    hidden, weight = student.in_compute_dtype()
    answers = []
    for h, label, other in zip(*(t.split(TOKEN_CHUNK_SIZE) for t in (hidden, labels, contradicted_by)), strict=True):
        logits = h @ weight.T
        of_label = logits.gather(-1, label[:, None])[:, 0]
        answers.append(of_label >= logits.scatter(-1, other[:, None], -torch.inf).amax(-1))
    return torch.cat(answers)
