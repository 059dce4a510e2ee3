"""Speculative decoding: the student proposes tokens, and the teacher accepts those it would have generated itself.

Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192); in transformers `generate(assistant_model=student)`.
"""

import contextlib
import copy
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, WhisperForCausalLM, WhisperForConditionalGeneration, WhisperProcessor
from transformers.generation import AssistedCandidateGenerator

from ..errors import UserError
from ..models.student import pair_differences, same_encoder
from ..progress import progress
from .results import Speculative
from .speed import GREEDY, check_same_setup, clip_durations, clip_features, synchronized_time, timing


@torch.inference_mode()
def measure_speculative(
    teacher: WhisperForConditionalGeneration,
    student: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    dataset: Dataset,
    set_name: str,
    *,
    repetitions: int = 5,
    max_length: int | None = None,
) -> Speculative:
    """Measure the teacher's greedy decoding with and without the student as assistant, one clip at a time.

    A first untimed pass compares the tokens and counts the proposals. In the timed passes both variants decode each
    clip in turn; the first one changes with every repetition. Times are of the whole `generate`, encoder included,
    without audio decoding and feature extraction.

    If the student has the teacher's encoder, its decoder takes the teacher's encoder output; otherwise the student
    encodes the clip itself. The number of proposed tokens and the confidence they require are in the student's
    generation config: `num_assistant_tokens`, `assistant_confidence_threshold`.

    Args:
        processor: processor of both models.
        dataset: from `load_speech_dataset`: clips of at most one window (30 s).
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
    limit = {} if max_length is None else {"max_length": max_length}
    with as_assistant(student, teacher) as assistant, _without_warnings():
        variants = {"teacher": dict(GREEDY, **limit), "assisted": dict(GREEDY, **limit, assistant_model=assistant)}

        def run(variant: str, clip: Tensor) -> Tensor:
            # No attention mask, which Whisper ignores: with one, an assistant with an encoder loses its position in
            # the cache (transformers 5.23), proposes other tokens and can exceed its last position.
            return teacher.generate(clip[None], **variants[variant])

        with count_proposals() as proposals:
            pairs = ((run("teacher", clip), run("assisted", clip)) for clip in progress(clips, "Speculative decoding"))
            identical = sum(torch.equal(alone, assisted) for alone, assisted in pairs)
        if proposals.proposed == 0:
            raise UserError("speculative decoding: the student proposed no tokens; increase --generation_max_length")
        seconds = {variant: [0.0] * repetitions for variant in variants}
        for repetition in progress(range(repetitions), "Timing speculative decoding", "pass"):
            order = list(variants) if repetition % 2 == 0 else list(reversed(variants))
            for clip in clips:
                for variant in order:
                    start = synchronized_time(teacher.device)
                    run(variant, clip)
                    seconds[variant][repetition] += synchronized_time(teacher.device) - start
    ratios = [alone / assisted for alone, assisted in zip(seconds["teacher"], seconds["assisted"], strict=True)]
    return Speculative(
        set=set_name,
        clips=len(clips),
        identical=identical,
        acceptance_rate=proposals.accepted / proposals.proposed,
        speedup=statistics.median(ratios),
        teacher=timing(seconds["teacher"]),
        assisted=timing(seconds["assisted"]),
    )


def check_can_assist(teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration) -> None:
    """Raise `UserError` unless student and teacher have the same vocabulary and features."""
    if differences := pair_differences(teacher, student):
        raise UserError(
            f"--speculative is not supported for this teacher and student: {'; '.join(differences)}. Remove "
            "--speculative"
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
