"""Select the alignment heads of a student: those whose word times are nearest to its teacher's.

A student copies some decoder layers of its teacher. The teacher's alignment heads in other layers are missing, and
training changes the rest. Both models read the same transcripts (teacher forcing), so that each word has two times.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..data.audio import SAMPLING_RATE, waveform
from ..data.json_files import write_json
from ..data.text import written_language
from ..errors import UserError
from ..progress import progress
from .generation_config import existing_heads
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


class AlignedClip(NamedTuple):
    """A clip with the boundaries, starts and ends, of the words that student and teacher both split it into."""

    attention: np.ndarray  # of the student, float32 `(heads of all layers, rows, positions)`
    rows: np.ndarray  # the student's rows at the boundaries, int `(boundaries,)`
    times: np.ndarray  # the teacher's times of the boundaries, seconds `(boundaries,)`


class Selection(NamedTuple):
    """The selected heads, and mean errors of word boundaries against the teacher's, in seconds."""

    heads: list[list[int]]  # [layer, head], in ascending order
    error: float
    former_error: float | None  # with the heads that the student had; None if it had none
    words: int
    clips: int

    def __str__(self) -> str:
        former = "" if self.former_error is None else f", before {self.former_error:.3f} s"
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
    heads = existing_heads(
        getattr(teacher.generation_config, "alignment_heads", None),
        teacher.config.decoder_layers,
        teacher.config.decoder_attention_heads,
    )
    if heads is None:
        name = teacher.name_or_path or "the teacher"
        raise UserError(f"{name} has no alignment heads in its generation config, so it has no word times to compare")
    models = (student, processor), (teacher, teacher_processor)
    with attending(student, teacher):
        shared = processor.feature_extractor.to_dict() == teacher_processor.feature_extractor.to_dict()
        shared = shared and same_encoder(teacher, student)
        aligned = [_aligned_clip(*models, heads, shared, row) for row in progress(rows, "Selecting alignment heads")]
    clips = [clip for clip in aligned if clip is not None]
    if not clips:
        raise UserError(f"no alignment heads can be selected: none of {len(rows)} clips has words and fits the window")
    former = existing_heads(
        getattr(student.generation_config, "alignment_heads", None),
        student.config.decoder_layers,
        student.config.decoder_attention_heads,
    )
    per_layer = student.config.decoder_attention_heads
    candidates = [best_heads(clips), *([[layer * per_layer + head for layer, head in former]] if former else [])]
    errors = boundary_errors(clips, candidates)
    return Selection(
        heads=[list(divmod(head, per_layer)) for head in candidates[int(np.argmin(errors))]],
        error=min(errors),
        former_error=errors[1] if former else None,
        words=sum(len(clip.rows) for clip in clips) // 2,
        clips=len(clips),
    )


def _aligned_clip(
    student: tuple[WhisperForConditionalGeneration, WhisperProcessor],
    teacher: tuple[WhisperForConditionalGeneration, WhisperProcessor],
    teacher_heads: list[list[int]],
    shared_encoder: bool,
    row: Mapping[str, Any],
) -> AlignedClip | None:
    """Return a clip with its boundaries; None if it has no words or is too long."""
    if not row["text"]:
        return None
    wave, encoded, found = waveform(row), None, []
    for model, processor in (teacher, student):
        prefix, text = transcript_tokens(processor.tokenizer, row)
        too_long = len(wave) > processor.feature_extractor.chunk_length * SAMPLING_RATE
        if not text or too_long or len(prefix) + len(text) > model.config.max_target_positions:
            return None
        if encoded is None or not shared_encoder:
            encoded = encode(model, processor, wave)
        words = split_words(processor.tokenizer, text, written_language(row))
        found.append((attention_of_heads(model, *encoded, prefix, text), words))
    (by_teacher, teacher_words), (by_student, words) = found
    columns = align(np.mean([by_teacher[layer, head] for layer, head in teacher_heads], axis=0)[None])[0]
    matches = matching_words(words.texts, teacher_words.texts)
    if not matches or not np.isfinite(by_teacher).all():
        return None
    mine, theirs = np.array(matches).T
    rows, teacher_rows = _boundaries(words, mine), _boundaries(teacher_words, theirs)
    return AlignedClip(by_student.reshape(-1, *by_student.shape[2:]), rows, to_seconds(columns[teacher_rows]))


def _boundaries(words: Words, which: np.ndarray) -> np.ndarray:
    return np.concatenate([words.starts[which], words.ends[which]])


def boundary_errors(clips: Sequence[AlignedClip], sets: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean error of all boundaries, in seconds, for each set of heads.

    Args:
        sets: indices into the first axis of `AlignedClip.attention`. The error of a set with a head that has NaN is
            infinite.
    """
    total, count = np.zeros(len(sets)), 0
    for clip in clips:
        means = np.stack([clip.attention[list(heads)].mean(0) for heads in sets])
        usable = np.isfinite(means).all((1, 2))
        total[~usable] = np.inf
        times = to_seconds(align(means[usable])[:, clip.rows])
        total[usable] += np.abs(times - clip.times).sum(1)
        count += len(clip.rows)
    return (total / count).tolist()


def best_heads(clips: Sequence[AlignedClip]) -> list[int]:
    """Return the set of heads with the smallest error of those that consist of the best single heads."""
    heads = range(len(clips[0].attention))
    errors = boundary_errors(clips, [[head] for head in heads])
    ranking = sorted((head for head in heads if np.isfinite(errors[head])), key=lambda head: errors[head])
    if not ranking:
        raise UserError("no alignment heads can be selected: the attention of all heads is NaN. Check the student")
    sets = [ranking[: number + 1] for number in range(len(ranking))]
    return sorted(sets[int(np.argmin(boundary_errors(clips, sets)))])


def save_alignment_heads(directory: str | Path, heads: list[list[int]]) -> None:
    """Write alignment heads to the `generation_config.json` of a model. Nothing else in the file changes."""
    file = Path(directory) / "generation_config.json"
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"alignment_heads": heads})
