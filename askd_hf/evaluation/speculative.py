"""Speculative decoding: the student proposes tokens, its teacher keeps those that it would have written itself.

Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192); in transformers it is `generate(assistant_model=student)`.
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
from tqdm.auto import tqdm
from transformers import PreTrainedModel, WhisperForCausalLM, WhisperForConditionalGeneration, WhisperProcessor
from transformers.generation import AssistedCandidateGenerator

from ..errors import UserError
from ..models.student import pair_differences, same_encoder
from .results import Speculative
from .speed import GREEDY, check_alike, clip_features, clip_seconds, now, timing


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
    """Let the teacher transcribe with and without the student's help, clip by clip, greedily.

    The first pass, which isn't timed, compares the tokens and counts the student's proposals. In the timed ones both
    ways take turns at every clip, and which comes first changes with every repetition. A time is that of the whole
    `generate`, encoder included; audio decoding and features are not counted.

    If the student has its teacher's encoder, its decoder reads the teacher's encoder output; otherwise the student
    encodes the clip for itself. How many tokens it proposes at once, and how sure it must be, is in its generation
    config: `num_assistant_tokens`, `assistant_confidence_threshold`.

    Args:
        processor: of both.
        dataset: of `load_speech_dataset`, clips of at most a window (30 s).
        set_name: for the result.
        repetitions: timed passes over all clips.
        max_length: tokens of a clip, at most. Default: that of the teacher's generation config.

    Raises:
        UserError: another vocabulary or other features than the teacher's, nothing proposed, or a clip that is too
            long or can't be decoded.
        ValueError: the models are on different devices, of different dtypes or attention.
    """
    check_can_assist(teacher.eval(), student.eval())
    check_alike({"teacher": teacher, "student": student})
    clip_seconds(dataset, processor.feature_extractor.chunk_length)
    clips = clip_features(teacher, processor, dataset)
    limit = {} if max_length is None else {"max_length": max_length}
    with as_assistant(student, teacher) as assistant, _without_warnings():
        ways = {"teacher": dict(GREEDY, **limit), "assisted": dict(GREEDY, **limit, assistant_model=assistant)}

        def run(way: str, clip: Tensor) -> Tensor:
            # Without an attention mask, which Whisper ignores: with one, an assistant that has an encoder loses its
            # place in its cache (transformers 5.23): it proposes other tokens, and can run over its last position.
            return teacher.generate(clip[None], **ways[way])

        with counting_proposals() as proposals:
            progress = tqdm(clips, "Speculative decoding", leave=False)
            identical = sum(torch.equal(run("teacher", clip), run("assisted", clip)) for clip in progress)
        if proposals.made == 0:
            raise UserError("speculative decoding: the student proposed nothing; raise max_length")
        seconds = {way: [0.0] * repetitions for way in ways}
        for repetition in tqdm(range(repetitions), "Speculative decoding, timed", leave=False):
            order = list(ways) if repetition % 2 == 0 else list(reversed(ways))
            for clip in clips:
                for way in order:
                    start = now(teacher.device)
                    run(way, clip)
                    seconds[way][repetition] += now(teacher.device) - start
    ratios = [alone / helped for alone, helped in zip(seconds["teacher"], seconds["assisted"], strict=True)]
    return Speculative(
        set=set_name,
        clips=len(clips),
        identical=identical,
        acceptance_rate=proposals.kept / proposals.made,
        times_faster=statistics.median(ratios),
        teacher=timing(seconds["teacher"]),
        assisted=timing(seconds["assisted"]),
    )


def check_can_assist(teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration) -> None:
    """Raise `UserError` unless the student's tokens and features are its teacher's."""
    if differences := pair_differences(teacher, student):
        raise UserError(
            f"no speculative decoding of this teacher with this student: {'; '.join(differences)}. Leave out "
            "--speculative"
        )


@contextlib.contextmanager
def as_assistant(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration
) -> Iterator[PreTrainedModel]:
    """The student as an `assistant_model` of its teacher; afterwards its generation config is what it was.

    With the teacher's encoder it is its decoder alone, to which `generate` gives the teacher's encoder output.
    """
    own = student.generation_config
    # `generate` leaves force_unique_generate_call in the assistant's, and its later transcripts then have the prompt
    student.generation_config = copy.deepcopy(own)
    try:
        yield _decoder_alone(student) if same_encoder(teacher, student) else student
    finally:
        student.generation_config = own


def _decoder_alone(student: WhisperForConditionalGeneration) -> WhisperForCausalLM:
    """A `WhisperForCausalLM` of the student's very modules."""
    with torch.device("meta"):  # no memory for weights that are replaced
        alone = WhisperForCausalLM(copy.deepcopy(student.config))
    alone.model.decoder = student.model.decoder
    alone.proj_out = student.proj_out
    alone.generation_config = student.generation_config
    return alone.eval()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Assisted `generate` warns at every proposal of limits that it has set itself."""
    log = logging.getLogger("transformers.generation.utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass
class Proposals:
    """Tokens that the assistant proposed, and how many of them the teacher kept."""

    made: int = 0
    kept: int = 0


@contextlib.contextmanager
def counting_proposals() -> Iterator[Proposals]:
    """Counts over all assisted calls of `generate` inside.

    `generate` tells how many proposals matched, but only the generator of candidates, and it takes an end of text for
    the teacher's own token when the assistant had proposed it. So the proposals are compared with what was appended.
    The class's methods are wrapped: it treats its own subclasses differently.
    """
    count = Proposals()
    propose, update = AssistedCandidateGenerator.get_candidates, AssistedCandidateGenerator.update_candidate_strategy

    def noted_propose(self, input_ids, **kwargs):
        candidates, logits = propose(self, input_ids, **kwargs)
        self.noted = input_ids.shape[1], candidates[0, input_ids.shape[1] :].tolist()
        return candidates, logits

    def noted_update(self, input_ids, scores, num_matches):
        start, proposed = self.noted
        appended = input_ids[0, start:].tolist()
        count.made += len(proposed)
        count.kept += next(
            (i for i, (ours, theirs) in enumerate(zip(proposed, appended, strict=False)) if ours != theirs),
            min(len(proposed), len(appended)),
        )
        return update(self, input_ids, scores, num_matches)

    AssistedCandidateGenerator.get_candidates = noted_propose
    AssistedCandidateGenerator.update_candidate_strategy = noted_update
    try:
        yield count
    finally:
        AssistedCandidateGenerator.get_candidates = propose
        AssistedCandidateGenerator.update_candidate_strategy = update
