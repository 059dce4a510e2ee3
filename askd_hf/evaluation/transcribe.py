"""Decode evaluation sets and write the transcripts to manifests."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from .. import __version__
from ..data.audio import SAMPLING_RATE, extract_features, waveform
from ..data.audio_context import audio_context, context_frames
from ..data.encoder_cache import weights_digest
from ..data.shared_disk import is_first_on_disk
from ..hub_access import local_or_hub
from ..models.generation_config import no_timestamps, set_language
from ..progress import Bar, progress_bar
from .long_form import Timestamps, check_can_transcribe, transcribe_long
from .manifest import OVERWRITE_ADVICE, Manifest, ManifestMetadata, check_comparable, read_manifests
from .model_info import describe_model
from .prepared_sets import PreparedSet
from .results import CLIP_CONTEXT, EvaluatedModel
from .shared_decoding import complete
from .speed import attention_mask

# of OpenAI's Whisper; its compression ratio of 2.4 in characters is 1.35 in tokens (transformers' documentation)
TEMPERATURE_FALLBACK = dict(
    temperature=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), compression_ratio_threshold=1.35, logprob_threshold=-1.0
)


@dataclass(frozen=True)
class Decoding:
    """Decoding settings."""

    num_beams: int = 1  # 1 is greedy
    # maximum number of tokens per clip, or per window of a long recording. None for the limit of the model's
    # generation config.
    generation_max_length: int | None = None
    timestamps: Timestamps = "none"  # "segment" or "word" timestamps are written to the manifest as `chunks`
    batch_size: int = 16
    num_workers: int = 0  # processes that decode audio and compute features; 0 for the main process
    share_work: bool = True  # whether all processes of a distributed run decode; False for this one alone
    no_repeat_ngram_size: int = 0
    temperature_fallback: bool = False

    def loop_settings(self) -> dict[str, Any]:
        """Return the settings against loops that are on."""
        settings = dict(no_repeat_ngram_size=self.no_repeat_ngram_size, temperature_fallback=self.temperature_fallback)
        return {name: value for name, value in settings.items() if value}


@dataclass
class DecodingJob:
    """A manifest to complete."""

    role: str
    model: WhisperForConditionalGeneration
    processor: WhisperProcessor
    prepared: PreparedSet
    decoding: Decoding
    manifest: Manifest
    metadata: ManifestMetadata
    is_writer: bool  # whether this process writes the manifest, alone of those that share a disk
    done: int = 0  # number of lines that it already has

    @property
    def batch_size(self) -> int:
        """Number of clips that are decoded, and appended to the manifest, at a time."""
        return self.decoding.batch_size if self.prepared.method == "short_form" else 1


def plan_jobs(
    models: dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]],
    sets: list[PreparedSet],
    decoding: Decoding,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    overwrite_advice: str = OVERWRITE_ADVICE,
) -> list[DecodingJob]:
    """Plan the decoding jobs and validate all settings before anything is decoded.

    Args:
        models: by role, `student` first, `teacher` last: the name it was loaded by, the model in float32 as loaded,
            and its processor. Moves the models to `device` and `dtype`.
        folder: directory of the manifests, `DIR/manifests`.
        overwrite: delete lines that other settings made of these sets instead of raising.
        overwrite_advice: see `Manifest`.

    Raises:
        UserError: there are manifests of other settings, or ones that the new ones aren't comparable with; a
            multilingual model has no language, or doesn't have this one; the model doesn't support the method or the
            timestamps; the disk can't be written.
    """
    jobs = []
    is_writer = is_first_on_disk(folder) if decoding.share_work else True
    for role, (name, model, processor) in models.items():
        described, weights = describe_model(name, model), weights_digest(model)
        model = model.to(device, dtype).eval()
        for prepared in sets:
            set_language(model, processor, prepared.spec.language, prepared.spec.task)
            check_can_transcribe(model, prepared.method, decoding.timestamps)
            metadata = _metadata(role, described, model, weights, prepared, decoding)
            if not _through_pipeline(prepared, decoding):  # the pipeline doesn't return generated tokens
                metadata.runtime["token_limit"] = token_limit(model, processor, decoding.generation_max_length)
            manifest = Manifest(folder, role, prepared.spec.name, overwrite_advice)
            jobs.append(DecodingJob(role, model, processor, prepared, decoding, manifest, metadata, is_writer))
    _check_plan(folder, jobs, overwrite)
    if is_writer:
        for job in jobs:
            job.done = job.manifest.prepare(job.metadata, job.batch_size, overwrite)
    if decoding.share_work:
        PartialState().wait_for_everyone()
    if not is_writer:  # the others find what it has prepared
        for job in jobs:
            job.done = len(job.manifest.rows())
    return jobs


def _through_pipeline(prepared: PreparedSet, decoding: Decoding) -> bool:
    """Return whether clips are decoded by transformers' pipeline, as long recordings and timestamps require."""
    return prepared.method != "short_form" or decoding.timestamps != "none"


def _check_plan(folder: Path, jobs: list[DecodingJob], overwrite: bool) -> None:
    """Raise `UserError` if the manifests in `folder` aren't comparable with those that the jobs will write."""
    planned: dict[str, dict[str, ManifestMetadata]] = {}
    for job in jobs:
        if not overwrite:
            job.manifest.check_metadata(job.metadata)
        planned.setdefault(job.prepared.spec.name, {})[job.role] = dataclasses.replace(job.metadata, complete=True)
    for name, manifests in read_manifests(folder).items():
        for role, manifest in manifests.items():
            planned.setdefault(name, {}).setdefault(role, manifest.metadata())
    check_comparable(folder, planned)


def _metadata(
    role: str,
    described: EvaluatedModel,
    model: WhisperForConditionalGeneration,
    weights: str,
    prepared: PreparedSet,
    decoding: Decoding,
) -> ManifestMetadata:
    spec = dataclasses.asdict(prepared.spec)
    return ManifestMetadata(
        role=role,
        model=described,
        set={name: spec[name] for name in ("name", "dataset", "config", "split", "language", "task", "no_speech")}
        | {"on_hub": not local_or_hub(spec["dataset"])},
        method=prepared.method,
        decoding=dict(
            num_beams=decoding.num_beams,
            generation_max_length=decoding.generation_max_length,
            timestamps=decoding.timestamps,
            dtype=str(model.dtype).removeprefix("torch."),
            **decoding.loop_settings(),
        ),
        runtime=dict(
            batch_size=decoding.batch_size,
            device=model.device.type,
            attention=model.config._attn_implementation,
            torch=torch.__version__,
            transformers=transformers.__version__,
            askd_hf=__version__,
            date=datetime.date.today().isoformat(),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        ),
        weights=weights,
        data=prepared.digest(),
        rows=len(prepared.clips),
        excluded=prepared.excluded,
        generation_config=_generation_digest(model.generation_config, decoding.timestamps),
        long_clips=prepared.long_clips,
    )


def _generation_digest(config: GenerationConfig, timestamps: Timestamps) -> str:
    """Return a hash of the settings of `generate` that change the texts, or the times if there are times of words."""
    ignored = {"transformers_version", "language", "task"}  # `set` has language and task
    ignored |= set() if timestamps == "word" else {"alignment_heads"}
    settings = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in ignored and not name.startswith(("_", "num_assistant_tokens"))
    }
    content = json.dumps(settings, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def run_jobs(jobs: list[DecodingJob]) -> None:
    """Decode the clips that the manifests lack, with one progress bar."""
    total, done = sum(len(job.prepared.clips) for job in jobs), sum(job.done for job in jobs)
    if not any(map(is_incomplete, jobs)):
        return
    with progress_bar(total, "Transcribing", done=done) as bar:
        for job in jobs:
            if is_incomplete(job):
                bar.set_postfix_str(f"{job.role}, {job.prepared.spec.name}")
                _run(job, bar)
        bar.set_postfix_str("")


def is_incomplete(job: DecodingJob) -> bool:
    """Return whether the manifest of any process lacks lines. All processes that share the work must ask."""
    lacks_lines = job.done < len(job.prepared.clips)
    return any(gather_object([lacks_lines])) if job.decoding.share_work else lacks_lines


def run_job(job: DecodingJob) -> None:
    """Decode the clips that the manifest lacks."""
    run_jobs([job])


@torch.inference_mode()
def _run(job: DecodingJob, bar: Bar) -> None:
    """Decode the clips that the manifest lacks, and append them batch by batch."""
    set_language(job.model, job.processor, job.prepared.spec.language, job.prepared.spec.task)
    decode = functools.partial(_batches_of_lines, job)
    is_writer, share_work = job.is_writer, job.decoding.share_work
    complete(job.manifest, job.prepared.clips, job.done, job.batch_size, decode, bar.update, is_writer, share_work)


def _batches_of_lines(job: DecodingJob, clips: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Yield the manifest lines of each batch."""
    if _through_pipeline(job.prepared, job.decoding):
        transcripts = _pipeline_transcripts(job, clips)
        batches = iter(lambda: list(itertools.islice(transcripts, job.batch_size)), [])
    else:
        batches = generate_batches(job.model, job.processor, clips, job.decoding, job.role == CLIP_CONTEXT)
    rows = iter(clips.remove_columns("audio"))
    for batch in batches:
        yield [_line(next(rows), transcript) for transcript in batch]


def _line(row: dict[str, Any], transcript: dict[str, Any]) -> dict[str, Any]:
    """Return a clip's line of the manifest."""
    line = dict(
        clip=row["clip"],
        reference=row["text"],
        prediction=transcript["text"].strip(),
        duration=row["duration"],
        transcription_time=transcript["transcription_time"],
    )
    if row.get("speaker") is not None:
        line["speaker"] = row["speaker"]
    line["tokens"] = transcript["tokens"]
    if transcript.get("chunks") is not None:
        line["chunks"] = transcript["chunks"]
    return line


def generate_batches(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Dataset,
    decoding: Decoding,
    clip_context: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the transcripts of each batch: `text`, `tokens`, and `transcription_time` of `generate` in seconds.

    Args:
        clip_context: whether the audio context is that of the longest clip in the batch, in place of the window.
    """
    options = dict(num_beams=decoding.num_beams, do_sample=False, return_timestamps=False, **no_timestamps(model))
    if decoding.generation_max_length is not None:
        options["max_length"] = decoding.generation_max_length
    if decoding.no_repeat_ngram_size:
        options["no_repeat_ngram_size"] = decoding.no_repeat_ngram_size
    if decoding.temperature_fallback:
        options |= TEMPERATURE_FALLBACK
    not_text = {model.generation_config.pad_token_id, processor.tokenizer.eos_token_id}
    collate = functools.partial(_features, processor.feature_extractor, clip_context)
    audio = clips.select_columns(["audio", "clip"])
    for batch in DataLoader(audio, decoding.batch_size, collate_fn=collate, num_workers=decoding.num_workers):
        features = batch.to(model.device, model.dtype)
        start = time.perf_counter()
        # a seed per batch, so that a resumed run samples the same texts
        seeded = fixed_seed(model.device) if decoding.temperature_fallback else contextlib.nullcontext()
        with audio_context(model.model.encoder, features.shape[-1]), seeded:
            tokens = model.generate(features, attention_mask=attention_mask(features), **options).tolist()
        transcription_time = (time.perf_counter() - start) / len(tokens)
        texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        counts = [sum(token not in not_text for token in ids) for ids in tokens]
        yield [
            dict(text=text, tokens=count, transcription_time=transcription_time)
            for text, count in zip(texts, counts, strict=True)
        ]


@contextlib.contextmanager
def fixed_seed(device: torch.device) -> Iterator[None]:
    """Seed all random numbers within the block, and restore the state of those of the CPU and of a CUDA device."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _features(extractor: WhisperFeatureExtractor, clip_context: bool, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Return features, `(clips, mel bins, frames)`. `SpeechCollator` would also tokenize the transcripts.

    Args:
        clip_context: True to cut them behind the longest clip.
    """
    waves = [waveform(row) for row in rows]
    features = extract_features(extractor, waves)["input_features"]
    if not clip_context:
        return features
    return features[..., : context_frames(max(map(len, waves)) / SAMPLING_RATE, features.shape[-1])]


def token_limit(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, max_length: int | None
) -> int | None:
    """Return the maximum number of text tokens that `generate` writes; None if its configuration has no limit.

    Whisper's `generate` doesn't count the prompt in `max_length`, and stops at the decoder's last position.
    """
    config = model.generation_config
    limit = max_length or config.max_new_tokens or config.max_length
    return limit and min(limit, model.config.max_target_positions - len(processor.tokenizer.prefix_tokens))


def _pipeline_transcripts(job: DecodingJob, clips: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the transcripts, as `generate_batches`, with `chunks` if timestamps are requested."""
    transcripts = transcribe_long(
        job.model,
        job.processor,
        clips,
        job.prepared.method,
        batch_size=job.decoding.batch_size,
        timestamps=job.decoding.timestamps,
        num_beams=job.decoding.num_beams,
        max_length=job.decoding.generation_max_length,
    )
    for transcript in transcripts:
        yield dataclasses.asdict(transcript)
