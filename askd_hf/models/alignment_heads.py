"""Select the alignment heads of a student: those whose word times are nearest to its teacher's.

A student copies some decoder layers of its teacher. The teacher's alignment heads in other layers are missing, and
training changes the rest. Both models read the same transcripts (teacher forcing), so that each word has two times.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import GENERATION_CONFIG_NAME

from ..data.audio import SAMPLING_RATE, waveform
from ..data.json_files import update_json
from ..errors import UserError
from ..progress import progress
from .generation_config import alignment_heads
from .student import same_encoder
from .word_times import (
    Words,
    align,
    attending,
    attention_of_heads,
    encode,
    matching_words,
    split_words,
    to_seconds,
    transcript_tokens,
)

CLIPS = 32  # of the selection after training; 16, 24 and 48 clips of LibriSpeech give the same heads


# a model, its processor, and the heads (layer, head) to compute
AttendedModel = tuple[WhisperForConditionalGeneration, WhisperProcessor, Sequence[Sequence[int]]]


class AlignedClip(NamedTuple):
    """Cross-attention and word boundaries (all starts, then all ends) of a clip, for words in both tokenizations."""

    attention: np.ndarray  # of the student, float32 `(heads of all layers, rows, positions)`
    rows: np.ndarray  # the student's rows at the boundaries, int `(boundaries,)`
    times: np.ndarray  # the teacher's times of the boundaries, seconds `(boundaries,)`


class Selection(NamedTuple):
    """The selected heads, and mean errors of word boundaries against the teacher's, in seconds."""

    heads: list[list[int]]  # [layer, head], in ascending order
    error: float
    former_error: float | None  # with the heads that the student had; None if it had none, infinite if one has NaN
    words: int
    clips: int

    def __str__(self) -> str:
        former = "" if self.former_error is None else f", before {self.former_error:.3f} s"
        if self.former_error == math.inf:
            former = "; the former heads have no times, as their attention has NaN"
        return (
            f"alignment heads [layer, head] {self.heads}: word boundaries differ from the teacher's by "
            f"{self.error:.3f} s on average{former} ({self.words:,} words in {self.clips} clips)"
        )


def select_alignment_heads(
    student: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    teacher: WhisperForConditionalGeneration,
    teacher_processor: WhisperProcessor,
    rows: Sequence[Mapping[str, Any]],
) -> Selection:
    """Select alignment heads of the student on transcribed clips. Neither model is changed.

    Args:
        student, teacher: on the device to use. The vocabularies and windows may differ.
        rows: `audio`, `clip`, `text`; for multilingual models also `language` and `task`, or those of the processors.
            Clips without words, and clips that are too long for a model, are left out.

    Raises:
        UserError: the teacher has no alignment heads, the attention of all heads is unusable, or no clip is left.
    """
    teacher_heads, former = alignment_heads(teacher), alignment_heads(student)
    if teacher_heads is None:
        name = teacher.name_or_path or "the teacher"
        raise UserError(f"{name} has no alignment heads in its generation config, so it has no word times to compare")
    heads = list(np.ndindex(student.config.decoder_layers, student.config.decoder_attention_heads))
    models = (student, processor, heads), (teacher, teacher_processor, teacher_heads)
    with attending(student, teacher):
        shared = processor.feature_extractor.to_dict() == teacher_processor.feature_extractor.to_dict()
        shared = shared and same_encoder(teacher, student)
        aligned = [_aligned_clip(*models, shared, row) for row in progress(rows, "Selecting alignment heads")]
    clips = [clip for clip in aligned if clip is not None]
    if not clips:
        raise UserError(
            f"no alignment heads can be selected: none of {len(rows)} clips has words and fits the window without NaN "
            "in the teacher's attention"
        )
    # the former heads first: they stay unless the others are better
    candidates = [*([[heads.index((layer, head)) for layer, head in former]] if former else []), best_heads(clips)]
    means = (np.stack([clip.attention[which].mean(0) for which in candidates]) for clip in clips)
    errors = boundary_errors(clips, means)
    return Selection(
        heads=[list(heads[which]) for which in candidates[int(np.argmin(errors))]],
        error=min(errors),
        former_error=errors[0] if former else None,
        words=sum(len(clip.rows) for clip in clips) // 2,
        clips=len(clips),
    )


def _aligned_clip(
    student: AttendedModel,
    teacher: AttendedModel,
    shared_encoder: bool,
    row: Mapping[str, Any],
) -> AlignedClip | None:
    """Return a clip with its boundaries. None if it has no words, is too long, or has NaN in the teacher's heads."""
    if not row["text"]:
        return None
    wave, encoded, found = waveform(row), None, []
    for model, processor, heads in (teacher, student):
        prefix, text = transcript_tokens(processor.tokenizer, row)
        too_long = len(wave) > processor.feature_extractor.chunk_length * SAMPLING_RATE
        if not text or too_long or len(prefix) + len(text) > model.config.max_target_positions:
            return None
        if encoded is None or not shared_encoder:
            encoded = encode(model, processor, wave)
        words = split_words(processor.tokenizer, text, row.get("language"), row.get("task"))
        found.append((attention_of_heads(model, *encoded, prefix, text, heads), words))
    (by_teacher, teacher_words), (by_student, student_words) = found
    mean = by_teacher.mean(0, keepdims=True)
    matches = matching_words(student_words.texts, teacher_words.texts)
    if not matches or not np.isfinite(mean).all():
        return None
    matched, teacher_matched = np.array(matches).T
    teacher_rows = _boundaries(teacher_words, teacher_matched)
    return AlignedClip(by_student, _boundaries(student_words, matched), to_seconds(align(mean)[0][teacher_rows]))


def _boundaries(words: Words, which: np.ndarray) -> np.ndarray:
    return np.concatenate([words.starts[which], words.ends[which]])


def boundary_errors(clips: Sequence[AlignedClip], means: Iterable[np.ndarray]) -> list[float]:
    """Return the mean error of all boundaries, in seconds, for each of the same sets of heads in all clips.

    Args:
        means: of each clip, the mean attention of each set, `(sets, rows, positions)`. The error of a set that has NaN
            in a clip is infinite.
    """
    totals = []
    for clip, attention in zip(clips, means, strict=True):
        usable = np.isfinite(attention).all((1, 2))
        totals.append(np.full(len(attention), np.inf))
        totals[-1][usable] = np.abs(to_seconds(align(attention[usable])[:, clip.rows]) - clip.times).sum(1)
    return (np.sum(totals, axis=0) / sum(len(clip.rows) for clip in clips)).tolist()


def best_heads(clips: Sequence[AlignedClip]) -> list[int]:
    """Rank the heads by their own error, and return the first n, for the n whose joint error is smallest.

    Raises `UserError` if all heads have NaN.
    """
    errors = boundary_errors(clips, (clip.attention for clip in clips))
    ranking = [head for head in sorted(range(len(errors)), key=lambda head: errors[head]) if errors[head] < math.inf]
    if not ranking:
        raise UserError("no alignment heads can be selected: the attention of all heads is NaN. Check the student")
    sizes = np.arange(1, len(ranking) + 1, dtype=np.float32)[:, None, None]
    joint = boundary_errors(clips, (np.cumsum(clip.attention[ranking], axis=0) / sizes for clip in clips))
    return sorted(ranking[: int(np.argmin(joint)) + 1])


def save_alignment_heads(directory: str | Path, heads: list[list[int]]) -> None:
    """Write alignment heads to the `generation_config.json` of a model. Nothing else in the file changes."""
    update_json(Path(directory) / GENERATION_CONFIG_NAME, {"alignment_heads": heads})
