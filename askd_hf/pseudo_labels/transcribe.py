"""What the teacher hears in every clip, how sure it is, and when it is said; on disk while it is being made."""

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
from tqdm.auto import tqdm
from transformers import LogitsProcessor, WhisperForConditionalGeneration, WhisperProcessor

from ..data.audio import extract_features, waveform
from ..data.columns import replace_column
from ..errors import UserError
from ..evaluation.manifest import OVERWRITE_HINT
from ..evaluation.prepared_sets import PreparedSet
from ..evaluation.transcribe import Decoding, DecodingJob, plan_jobs
from ..models.generation_config import no_timestamps
from .options import PseudoLabelArguments

TRANSCRIPTS = "transcripts"  # their folder; not that of evaluations, whose lines say other things
ANEW = "Have it made anew, or elsewhere: askd-hf pseudo-label --overwrite True, or --output_dir"
RESOLUTION = 0.02  # seconds between two timestamps of Whisper


class GreedyLogProbs(LogitsProcessor):
    """Adds up the log-probabilities of the tokens that greedy search takes, and changes nothing.

    As in OpenAI's whisper/decoding.py they are of the distribution that is left after tokens were suppressed and the
    rules for timestamps were applied, and the end of text counts. It has to be the last processor.

    Attributes:
        total: float32 `(batch,)`.
        prompt: tokens before the first one that is generated.
    """

    def __init__(self, end: int):
        self.end = end
        self.prompt = 0
        self.total: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.total is None:
            self.prompt = input_ids.shape[1]
            self.total = torch.zeros(len(scores), device=scores.device)
        unfinished = (input_ids[:, self.prompt :] != self.end).all(1)
        self.total += unfinished * scores.float().log_softmax(-1).amax(-1)
        return scores


def plan(
    args: PseudoLabelArguments,
    teacher: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Dataset,
) -> DecodingJob:
    """What is still to be transcribed. Nothing is yet, and what can be refused is refused here.

    Args:
        teacher: as it was loaded, in float32; left where, in the dtype and with the language that `args` asks for.
        clips: of `filter_invalid_clips`.

    Raises:
        UserError: in the output directory are transcripts of another teacher, other clips or settings; the teacher
            has no language, or can't tell times.
    """
    # neither references nor speakers change a transcript. Longest first: if memory is short, that shows at once
    heard = clips.remove_columns([name for name in ("text", "speaker") if name in clips.column_names])
    heard = replace_column(heard, "text", [""] * len(clips))
    heard = replace_column(heard, "row", list(range(len(clips))))
    seconds = clips["seconds"][:]
    heard = heard.select(sorted(range(len(clips)), key=lambda row: -seconds[row]))
    try:
        (job,) = plan_jobs(
            {"teacher": (args.teacher, teacher, processor)},
            [PreparedSet(args.source(), "short_form", heard, excluded={})],
            Decoding(
                1,
                args.generation_max_length,
                "segment" if args.timestamps else "none",
                args.batch_size,
                args.num_workers,
            ),
            Path(args.output_dir) / TRANSCRIPTS,
            device=torch.device(args.device),
            dtype=args.torch_dtype(),
            overwrite=args.overwrite,
        )
    except UserError as error:  # askd-hf distill --unlabeled_dataset has neither option
        raise UserError(str(error).replace(OVERWRITE_HINT, ANEW)) from None
    return job


def transcribe(job: DecodingJob) -> list[dict[str, Any]]:
    """Transcribe what the manifest lacks, and append it batch by batch.

    Returns, in the order of the dataset and not of the manifest, for every clip: `clip`; `text`; `avg_log_prob`: of
    its tokens, timestamps and end of text included, over their number and one, as OpenAI has it; `tokens`: how many,
    without the end; `ended`: whether it did before the token limit; with timestamps `segments`: `start`, `end`
    (seconds) and `text`.

    Raises:
        UserError: a clip can't be decoded any more, the teacher's logits aren't finite, the disk is full.
    """
    clips, total, done = job.prepared.clips, len(job.prepared.clips), job.done
    if done < total:
        rest = clips.select(range(done, total))
        try:
            with tqdm(total=total, initial=done, desc="Transcribing", unit="clip") as progress:
                for heard in _in_batches(job, rest):
                    job.manifest.append(heard)
                    done += len(heard)
                    progress.update(len(heard))
        except KeyboardInterrupt:
            print(f"\n{done} of {total} clips are transcribed: the same command goes on from there", file=sys.stderr)
            raise
        job.manifest.finish()
    lines = dict(zip(clips["row"], job.manifest.rows(), strict=True))
    return [lines[row] for row in range(total)]


@torch.inference_mode()
def _in_batches(job: DecodingJob, clips: Dataset) -> Iterator[list[dict[str, Any]]]:
    """For each batch what the teacher heard in its clips."""
    model, processor, decoding = job.model, job.processor, job.decoding
    timestamps = decoding.timestamps != "none"
    # one pass a window: otherwise `generate` goes on after the last timestamp, and what it gives fits no label
    options: dict[str, Any] = dict(num_beams=1, do_sample=False, force_unique_generate_call=True)
    if not timestamps:
        options |= no_timestamps(model)
    if decoding.generation_max_length is not None:
        options["max_length"] = decoding.generation_max_length
    collate = functools.partial(_collate, processor)
    for batch in DataLoader(clips, decoding.batch_size, collate_fn=collate, num_workers=decoding.num_workers):
        features = batch["input_features"].to(model.device, model.dtype)
        mask = torch.ones_like(features[:, 0]).long()  # Whisper sees the padding's silence too
        captured = GreedyLogProbs(processor.tokenizer.eos_token_id)
        tokens = model.generate(
            features, attention_mask=mask, return_timestamps=timestamps, logits_processor=[captured], **options
        )
        heard = zip(tokens[:, captured.prompt :].tolist(), captured.total.tolist(), batch["rows"], strict=True)
        yield [_line(job, ids, log_prob, row, timestamps) for ids, log_prob, row in heard]


def _line(job: DecodingJob, ids: list[int], log_prob: float, row: dict[str, Any], timestamps: bool) -> dict[str, Any]:
    """A clip's line of the manifest, from generated tokens and the sum of their log-probabilities."""
    if not math.isfinite(log_prob):
        raise UserError(
            f"{row['clip']}: the teacher's logits are not finite; try askd-hf pseudo-label --dtype float32"
        )
    end = job.processor.tokenizer.eos_token_id
    ended = end in ids
    ids = ids[: ids.index(end)] if ended else ids
    decode = functools.partial(_text, job.processor)
    # special tokens come after the text's, as in OpenAI's `tokens < tokenizer.eot`
    line = dict(clip=row["clip"], text=decode([token for token in ids if token < end]))
    line |= dict(avg_log_prob=log_prob / (len(ids) + 1), tokens=len(ids), ended=ended)
    if timestamps:
        first = job.model.generation_config.no_timestamps_token_id + 1
        line["segments"] = segments_of(ids, first, end, row["seconds"], decode)
    return line


def _collate(processor: WhisperProcessor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    features = extract_features(processor.feature_extractor, [waveform(row) for row in rows])
    return {**features, "rows": [{"clip": row["clip"], "seconds": row["seconds"]} for row in rows]}


def _text(processor: WhisperProcessor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids).strip()


def segments_of(
    ids: list[int], first_timestamp: int, end: int, seconds: float, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """The phrases between timestamps: `start` and `end` in seconds, multiples of 0.02 within the clip, and `text`.

    The tokenizer's `decode(output_offsets=True)` leaves out a last phrase that has no end: here it ends with the clip.
    Text before any timestamp begins where the phrase before ends. What the teacher puts after the clip's end, into the
    silence that fills the window, is at its end.

    Args:
        ids: generated tokens without the end of text.
        first_timestamp: the token for 0 s.
        end: of text; tokens from here to the timestamps are neither text nor time.
        seconds: of the clip.
        decode: tokens of a phrase to its text.
    """
    last = math.floor(seconds / RESOLUTION + 1e-6)  # in steps of the resolution
    segments: list[dict[str, Any]] = []
    start = 0
    text: list[int] = []

    def close(at: int) -> None:
        if phrase := decode(text):
            segments.append(dict(start=in_seconds(start), end=in_seconds(at), text=phrase))
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


def in_seconds(steps: int) -> float:
    """Of a timestamp, as its token is written."""
    return round(steps * RESOLUTION, 2)
