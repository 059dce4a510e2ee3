"""Speculative decoding: the student proposes tokens, and the teacher accepts those it would have generated itself.

Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192); in transformers `generate(assistant_model=student)`.
"""

import contextlib
import copy
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.generation import AssistedCandidateGenerator
from transformers.utils import GENERATION_CONFIG_NAME

from ..data.json_files import update_json
from ..errors import UserError
from ..models.generation_config import no_timestamps
from ..models.student import pair_differences, same_encoder
from ..progress import progress
from .options import ASSISTANT_TOKENS
from .results import DraftLength, Speculative
from .speed import GREEDY, check_same_setup, clip_durations, clip_features, synchronized_time, timing


@torch.inference_mode()
def measure_speculative(
    teacher: WhisperForConditionalGeneration,
    student: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    dataset: Dataset,
    set_name: str,
    *,
    num_assistant_tokens: Sequence[int] = ASSISTANT_TOKENS,
    repetitions: int = 5,
    max_length: int | None = None,
) -> Speculative:
    """Measure the teacher's greedy decoding with and without the student as assistant, one clip at a time.

    A first untimed pass compares the tokens and counts the proposals. In the timed passes all variants decode each
    clip in turn; every second repetition has them in reverse order. Times are of the whole `generate`, encoder
    included, without audio decoding and feature extraction.

    If the student has the teacher's encoder, its decoder takes the teacher's encoder output; otherwise the student
    encodes the clip itself. The student stops a proposal at a token that it gives less probability than
    `assistant_confidence_threshold` of its generation config (0.4 by default in transformers).

    Args:
        processor: processor of both models.
        dataset: from `load_speech_dataset`: clips of at most one window (30 s).
        num_assistant_tokens: numbers of tokens that the student proposes at once, constant over a clip; each is
            measured.
        repetitions: timed passes over all clips.
        max_length: maximum number of tokens per clip. Default: from the teacher's generation config.

    Raises:
        UserError: vocabulary or features differ from the teacher's, the student proposed no tokens, or a clip is too
            long or can't be decoded.
        ValueError: the models differ in device, dtype or attention implementation.
    """
    check_can_assist(teacher.eval(), student.eval())
    check_same_setup({"teacher": teacher, "student": student})
    clip_durations(dataset, processor.feature_extractor.chunk_length)
    clips = clip_features(teacher, processor, dataset)
    limit = no_timestamps(teacher) | ({} if max_length is None else {"max_length": max_length})
    with as_assistant(student, teacher) as assistant, _without_warnings():

        def run(clip: Tensor, proposed: int) -> Tensor:
            # No attention mask, which Whisper ignores: with one, an assistant with an encoder loses its position in
            # the cache (transformers 5.23), proposes other tokens and can exceed its last position.
            if not proposed:
                return teacher.generate(clip[None], **GREEDY, **limit)
            _set_draft_length(assistant.generation_config, proposed)
            return teacher.generate(clip[None], **GREEDY, **limit, assistant_model=assistant)

        alone = [run(clip, 0) for clip in progress(clips, "Teacher alone")]
        same, rates = dict[int, list[bool]](), dict[int, float]()
        for number in num_assistant_tokens:
            with count_proposals() as proposals:
                shown = progress(list(zip(clips, alone, strict=True)), f"Speculative decoding, {number} at once")
                same[number] = [torch.equal(tokens, run(clip, number)) for clip, tokens in shown]
            if proposals.proposed == 0:
                raise UserError(
                    "speculative decoding: the student proposed no tokens; increase --generation_max_length"
                )
            rates[number] = proposals.accepted / proposals.proposed
        seconds = _time_interleaved(run, clips, [0, *num_assistant_tokens], repetitions, teacher.device)
    lengths = [
        _draft_length(number, sum(same[number]), rates[number], seconds[0], seconds[number])
        for number in num_assistant_tokens
    ]
    best = max(lengths, key=lambda length: length.speedup)
    return Speculative(
        set=set_name,
        clips=len(clips),
        identical=best.identical,
        acceptance_rate=best.acceptance_rate,
        speedup=best.speedup,
        teacher=timing(seconds[0]),
        assisted=best.assisted,
        num_assistant_tokens=best.num_assistant_tokens,
        draft_lengths=lengths,
        differing=[name for i, name in enumerate(dataset["clip"]) if not all(equal[i] for equal in same.values())],
    )


def _time_interleaved(
    run: Callable[[Tensor, int], Tensor],
    clips: list[Tensor],
    variants: list[int],
    repetitions: int,
    device: torch.device,
) -> dict[int, list[float]]:
    """Return the seconds of each variant for all clips, by repetition."""
    seconds = {variant: [0.0] * repetitions for variant in variants}
    for repetition in progress(range(repetitions), "Timing speculative decoding", "pass"):
        order = variants if repetition % 2 == 0 else variants[::-1]
        for clip in clips:
            for variant in order:
                start = synchronized_time(device)
                run(clip, variant)
                seconds[variant][repetition] += synchronized_time(device) - start
    return seconds


def _draft_length(number: int, identical: int, rate: float, alone: list[float], assisted: list[float]) -> DraftLength:
    ratios = [
        teacher_seconds / assisted_seconds for teacher_seconds, assisted_seconds in zip(alone, assisted, strict=True)
    ]
    return DraftLength(
        num_assistant_tokens=number,
        identical=identical,
        acceptance_rate=rate,
        speedup=statistics.median(ratios),
        assisted=timing(assisted),
        speedup_range=(min(ratios), max(ratios)),
    )


def _set_draft_length(config: GenerationConfig, number: int) -> None:
    """Set how many tokens an assistant proposes at once: `AssistedCandidateGenerator` reads it from its config."""
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = number, "constant"


def save_draft_length(model: str | Path, result: Speculative) -> bool:
    """Write the number of proposed tokens with the highest speedup to the student's generation config.

    Returns False, and changes nothing, if that isn't faster than the teacher alone in every repetition.

    Args:
        model: directory of the student.
    """
    if not result.is_clearly_faster:
        return False
    values = {"num_assistant_tokens": result.num_assistant_tokens, "num_assistant_tokens_schedule": "constant"}
    update_json(Path(model) / GENERATION_CONFIG_NAME, values)
    return True


def check_can_assist(teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration) -> None:
    """Raise `UserError` unless student and teacher have the same vocabulary and features."""
    if differences := pair_differences(teacher, student):
        raise UserError(
            f"--speculative is not supported for this teacher and student: {'; '.join(differences)}. A student with "
            "another window or vocabulary can't propose tokens to the teacher. Remove --speculative"
        )


@contextlib.contextmanager
def as_assistant(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration
) -> Iterator[PreTrainedModel]:
    """Yield the student as an `assistant_model` of the teacher, and restore its generation config afterwards.

    If both have the same encoder, yields the student's decoder only: `generate` passes it the teacher's encoder
    output.
    """
    own = student.generation_config
    # `generate` leaves force_unique_generate_call in the assistant's config: later transcripts would have the prompt
    student.generation_config = copy.deepcopy(own)
    try:
        yield _decoder_only(student) if same_encoder(teacher, student) else student
    finally:
        student.generation_config = own


def _decoder_only(student: WhisperForConditionalGeneration) -> WhisperForCausalLM:
    """Return a `WhisperForCausalLM` that shares the student's modules."""
    with torch.device("meta"):  # no memory for weights that are replaced
        decoder = WhisperForCausalLM(copy.deepcopy(student.config))
    decoder.model.decoder = student.model.decoder
    decoder.proj_out = student.proj_out
    decoder.generation_config = student.generation_config
    return decoder.eval()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings of assisted `generate`, which warns at every proposal of limits that it has set itself."""
    log = logging.getLogger("transformers.generation.utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass
class Proposals:
    """Number of tokens that the assistant proposed, and that the teacher accepted."""

    proposed: int = 0
    accepted: int = 0


@contextlib.contextmanager
def count_proposals() -> Iterator[Proposals]:
    """Count the proposals of all assisted calls of `generate` in the context.

    `generate` passes the number of matches only to the candidate generator, and counts a proposed end of text as the
    teacher's own token. So the proposals are compared with the tokens that were appended. The methods of the class are
    wrapped, because `generate` handles subclasses differently.
    """
    count = Proposals()
    propose, update = AssistedCandidateGenerator.get_candidates, AssistedCandidateGenerator.update_candidate_strategy

    def recording_propose(self, input_ids, **kwargs):
        candidates, logits = propose(self, input_ids, **kwargs)
        self.recorded = input_ids.shape[1], candidates[0, input_ids.shape[1] :].tolist()
        return candidates, logits

    def recording_update(self, input_ids, scores, num_matches):
        start, proposed = self.recorded
        appended = input_ids[0, start:].tolist()
        count.proposed += len(proposed)
        count.accepted += next(
            (i for i, (candidate, token) in enumerate(zip(proposed, appended, strict=False)) if candidate != token),
            min(len(proposed), len(appended)),
        )
        return update(self, input_ids, scores, num_matches)

    AssistedCandidateGenerator.get_candidates = recording_propose
    AssistedCandidateGenerator.update_candidate_strategy = recording_update
    try:
        yield count
    finally:
        AssistedCandidateGenerator.get_candidates = propose
        AssistedCandidateGenerator.update_candidate_strategy = update
