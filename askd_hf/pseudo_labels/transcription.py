"""Transcribe clips with the teacher (text, average log-probability, segments), appending each batch to disk."""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LogitsProcessor, WhisperForConditionalGeneration, WhisperProcessor

from ..data.audio import extract_features, waveform
from ..data.columns import replace_column
from ..data.labels import TIME_PRECISION
from ..data.languages import word_separator
from ..errors import UserError
from ..evaluation.prepared_sets import PreparedSet
from ..evaluation.shared_decoding import complete
from ..evaluation.transcribe import Decoding, DecodingJob, is_incomplete, plan_jobs
from ..models.generation_config import no_timestamps
from ..progress import progress_bar
from .options import PseudoLabelArguments

TRANSCRIPTS_DIR = "transcripts"  # not the directory of evaluations, whose manifests have other fields
# with the name of the command, because askd-hf distill --unlabeled_dataset has no --overwrite
OVERWRITE_ADVICE = "Transcribe again or use another directory: askd-hf pseudo-label --overwrite True, or --output_dir"


class GreedyLogProbs(LogitsProcessor):
    """Sum the log-probabilities of the tokens that greedy search selects, without changing the scores.

    As in whisper/decoding.py of OpenAI, the distribution is the one after suppressed tokens and timestamp rules, and
    end of text is included. This must be the last processor. It replaces `compute_transition_scores`, which needs the
    logits of all steps in memory.

    Attributes:
        total: float32 `(batch,)`.
        prompt_length: number of tokens before the first generated one.
    """

    def __init__(self, eos_token_id: int):
        self.eos_token_id = eos_token_id
        self.prompt_length = 0
        self.total: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.total is None:
            self.prompt_length = input_ids.shape[1]
            self.total = torch.zeros(len(scores), device=scores.device)
        unfinished = (input_ids[:, self.prompt_length :] != self.eos_token_id).all(1)
        self.total += unfinished * scores.float().log_softmax(-1).amax(-1)
        return scores


def plan_transcription(
    args: PseudoLabelArguments,
    teacher: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Dataset,
) -> DecodingJob:
    """Plan the decoding job and validate all settings before anything is decoded.

    Args:
        teacher: as loaded, in float32. Its device, dtype and language are set as in `args`.
        clips: the result of `filter_invalid_clips`.

    Returns:
        The job for `transcribe`, whose clips are sorted by duration. The longest come first, so that a lack of memory
        is detected immediately.

    Raises:
        UserError: the output directory has transcripts of another teacher, clips or settings; or the teacher has no
            language or no timestamps.
    """
    # references and speakers are removed, since transcripts don't depend on them
    audio = clips.remove_columns([name for name in ("text", "speaker") if name in clips.column_names])
    audio = replace_column(audio, "text", [""] * len(clips))
    audio = replace_column(audio, "row", list(range(len(clips))))
    durations = clips["duration"][:]
    audio = audio.select(sorted(range(len(clips)), key=lambda row: -durations[row]))
    (job,) = plan_jobs(
        {"teacher": (args.teacher, teacher, processor)},
        [PreparedSet(args.source(), "short_form", audio, excluded={})],
        Decoding(1, args.generation_max_length, args.time_marks(), args.batch_size, args.num_workers),
        Path(args.output_dir) / TRANSCRIPTS_DIR,
        device=torch.device(args.device),
        dtype=args.torch_dtype(),
        overwrite=args.overwrite,
        overwrite_advice=OVERWRITE_ADVICE,
    )
    return job


def transcribe(job: DecodingJob) -> list[dict[str, Any]]:
    """Transcribe the clips that are missing in the manifest, and append the results batch by batch.

    Returns:
        For each clip, in the order of the dataset:

        clip: its name.
        text: the transcript.
        avg_logprob: sum of the log-probabilities of all tokens, timestamps and end of text included, divided by
            `tokens` + 1, as in OpenAI Whisper.
        tokens: number of tokens without end of text.
        ended: whether end of text was generated before the token limit.
        segments: list of `start` and `end` (seconds) and `text`; only with timestamps.
        words: the same for words; only with word timestamps.

    Raises `UserError` if a clip can no longer be decoded, the teacher's logits aren't finite, or the disk is full.
    """
    clips, total, done = job.prepared.clips, len(job.prepared.clips), job.done

    def count(number: int) -> None:
        nonlocal done
        done += number
        progress.update(number)

    if is_incomplete(job):
        decode = functools.partial(_transcribe_batches, job)
        try:
            with progress_bar(total, "Transcribing", done=done) as progress:
                complete(job.manifest, clips, job.done, job.decoding.batch_size, decode, count, job.is_writer)
        except KeyboardInterrupt:
            print(f"\n{done} of {total} clips are transcribed; run the same command again to resume", file=sys.stderr)
            raise
    by_row = dict(zip(clips["row"], map(_with_current_names, job.manifest.rows()), strict=True))
    return [by_row[row] for row in range(total)]


def _with_current_names(line: dict[str, Any]) -> dict[str, Any]:
    """Rename the field `avg_log_prob` of manifests of earlier versions."""
    return {"avg_logprob" if name == "avg_log_prob" else name: value for name, value in line.items()}


@torch.inference_mode()
def _transcribe_batches(job: DecodingJob, clips: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Yield the manifest lines of each batch."""
    model, processor, decoding = job.model, job.processor, job.decoding
    timestamps, words = decoding.timestamps != "none", decoding.timestamps == "word"
    # One pass per window: otherwise `generate` decodes again from the last timestamp, and the result can be longer
    # than a label.
    options: dict[str, Any] = dict(num_beams=1, do_sample=False, force_unique_generate_call=True)
    if not timestamps:
        options |= no_timestamps(model)
    if decoding.generation_max_length is not None:
        options["max_length"] = decoding.generation_max_length
    collate = functools.partial(_collate, processor, words)
    for batch in DataLoader(clips, decoding.batch_size, collate_fn=collate, num_workers=decoding.num_workers):
        features = batch["input_features"].to(model.device, model.dtype)
        mask = torch.ones_like(features[:, 0]).long()  # Whisper attends to the padding too
        captured = GreedyLogProbs(processor.tokenizer.eos_token_id)
        if words:  # of the clip alone, as words are aligned with the audio
            mask = batch["attention_mask"].to(model.device)
        generate = functools.partial(
            model.generate, features, attention_mask=mask, logits_processor=[captured], **options
        )
        if words:
            tokens, times = _generate_with_times(model, generate)
        else:
            tokens = generate(return_timestamps=timestamps)
            times = torch.zeros(tokens.shape)
        start = captured.prompt_length
        generated = zip(tokens[:, start:].tolist(), times[:, start:].tolist(), strict=True)
        clips_of_batch = zip(generated, captured.total.tolist(), batch["rows"], strict=True)
        yield [_line(job, *pair, log_prob, row) for pair, log_prob, row in clips_of_batch]


def _generate_with_times(
    model: WhisperForConditionalGeneration, generate: Callable[..., dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return the tokens and the time at which each ends, in seconds: `(clips, tokens)` both."""
    attention = model.config._attn_implementation
    try:
        outputs = generate(return_timestamps=True, return_token_timestamps=True)
    finally:
        if model.config._attn_implementation != attention:  # `generate` has switched to one that returns its weights
            model.set_attn_implementation(attention)
    return outputs["sequences"], outputs["token_timestamps"]


def _line(
    job: DecodingJob, ids: list[int], times: list[float], log_prob: float, row: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest line of a clip from its generated tokens and the sum of their log-probabilities.

    Args:
        times: the end of each token in seconds; only read with word timestamps.
    """
    if not math.isfinite(log_prob):
        raise UserError(
            f"{row['clip']}: the teacher's logits are not finite; try askd-hf pseudo-label --dtype float32"
        )
    end = job.processor.tokenizer.eos_token_id
    ended = end in ids
    ids = ids[: ids.index(end)] if ended else ids
    decode = functools.partial(_text, job.processor)
    # ids of special tokens are greater than those of text: OpenAI's `tokens < tokenizer.eot`
    line = dict(clip=row["clip"], text=decode([token for token in ids if token < end]))
    line |= dict(avg_logprob=log_prob / (len(ids) + 1), tokens=len(ids), ended=ended)
    timestamps = job.decoding.timestamps
    if timestamps != "none":
        first = job.model.generation_config.no_timestamps_token_id + 1
        line["segments"] = segments_of(ids, first, end, row["duration"], decode)
    if timestamps == "word":
        pieces = job.processor.tokenizer.convert_ids_to_tokens(ids)
        tokens = [(i, piece, at) for i, piece, at in zip(ids, pieces, times, strict=False)]
        line["words"] = words_of(tokens, end, row["duration"], decode, has_spaces(job.model.generation_config))
    return line


def _collate(processor: WhisperProcessor, with_mask: bool, rows: list[dict[str, Any]]) -> dict[str, Any]:
    features = extract_features(processor.feature_extractor, [waveform(row) for row in rows], with_mask)
    return {**features, "rows": [{"clip": row["clip"], "duration": row["duration"]} for row in rows]}


def _text(processor: WhisperProcessor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids).strip()


def segments_of(
    ids: list[int], first_timestamp: int, end: int, duration: float, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """Return the segments between timestamps: `start` and `end` in seconds, multiples of 0.02, and `text`.

    A last segment without end ends with the clip; `decode(output_offsets=True)` of the tokenizer would drop it. Text
    without a start timestamp starts where the previous segment ends. Timestamps after the clip, in the padding of the
    window, are set to its end.

    Args:
        ids: generated tokens without end of text.
        first_timestamp: the token of 0 s.
        end: the token of end of text. Ids between it and the timestamps are other special tokens, which are ignored.
        duration: of the clip, seconds.
    """
    last = math.floor(duration / TIME_PRECISION + 1e-6)  # in steps of TIME_PRECISION
    segments: list[dict[str, Any]] = []
    start = 0
    text: list[int] = []

    def close(at: int) -> None:
        if decoded := decode(text):
            segments.append(dict(start=to_seconds(start), end=to_seconds(at), text=decoded))
        text.clear()

    for token in ids:
        if token < end:
            text.append(token)
        elif token >= first_timestamp:
            at = max(start, min(token - first_timestamp, last))
            close(at)
            start = at
    close(last)
    return segments


def has_spaces(config: GenerationConfig) -> bool:
    """Return whether the texts of a model with this config separate words by spaces."""
    # an English-only model has neither language nor task
    return bool(word_separator(getattr(config, "language", None), getattr(config, "task", None)))


def words_of(
    tokens: list[tuple[int, str, float]], end: int, duration: float, decode: Callable[[list[int]], str], spaced: bool
) -> list[dict[str, Any]]:
    """Return the words: `start` and `end` in seconds, and `text` with the punctuation that follows it.

    A token lasts from the end of the token before it, as in the pipeline of Transformers. The time of punctuation is
    the pause behind a word, and not part of it.

    Args:
        tokens: id, piece of the vocabulary and end in seconds, without end of text.
        end: the id of end of text; greater ids are timestamps and special tokens.
        spaced: whether the language separates words by spaces. Without, each character is a word.
    """
    words: list[dict[str, Any]] = []
    ids: list[int] = []
    start = spoken = before = 0.0

    def close() -> None:
        if decoded := decode(ids):
            words.append(dict(start=round(start, 2), end=round(max(spoken, start), 2), text=decoded))
        ids.clear()

    for token, piece, at in tokens:
        at = max(min(at, duration), before)
        if token >= end:
            close()
        else:
            # the bytes of a character may be several tokens
            begins = piece.startswith("Ġ") if spaced else "\ufffd" not in decode(ids)
            if ids and begins:
                close()
            start = start if ids else before
            ids.append(token)
            if any(letter.isalnum() or letter == "\ufffd" for letter in decode([token])):
                spoken = at
        before = at
    close()
    return words


def to_seconds(steps: int) -> float:
    """Convert a number of timestamp steps to seconds, rounded as in the timestamp token."""
    return round(steps * TIME_PRECISION, 2)
