"""From sets of speech to manifests: what is decoded, in which order, how."""

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from ..data import Limits, filter_invalid_clips
from ..data.audio import extract_features, waveform
from ..data.columns import replace_column
from ..data.encoder_cache import weights_digest
from ..errors import UserError
from ..hub_access import local_or_hub
from ..models.generation_config import no_timestamps, set_language
from .long_form import Method, Timestamps, check_can_transcribe, join_clips, transcribe_long
from .manifest import Manifest, Settings, check_comparable, read_manifests
from .results import ModelFacts
from .speed import model_facts
from .suites import UNTRANSCRIBED, EvalSet, is_untranscribed, load_set

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """How texts are generated.

    Attributes:
        num_beams: 1 is greedy.
        generation_max_length: tokens of a clip (or of a window of a long one), at most. None: as many as the model's
            generation config says.
        timestamps: of segments or words, kept as the manifest's `chunks`.
        batch_size: clips at a time.
        num_workers: processes that decode audio and compute features; 0 is this one.
    """

    num_beams: int = 1
    generation_max_length: int | None = None
    timestamps: Timestamps = "none"
    batch_size: int = 16
    num_workers: int = 0


@dataclass
class PreparedSet:
    """The clips of a set that one method decodes, longest first: if memory is short, that shows at once.

    Attributes:
        source: where they are from; its name is that of the results and of the manifests' files.
        clips: `audio`, `text` (never None), `clip`, `duration`, `audio_key` and, where known, `speaker`.
        dropped: clips of the set that aren't decoded, by reason.
    """

    source: EvalSet
    method: Method
    clips: Dataset
    dropped: dict[str, int]

    def digest(self) -> str:
        """32 hexadecimal digits for audio, transcripts and speakers, in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.clips.remove_columns(["audio", "clip"]):
            digest.update(json.dumps([row["audio_key"], row["text"], row.get("speaker")]).encode())
        return digest.hexdigest()


def prepare_set(
    source: EvalSet,
    *,
    window: float,
    long_form: list[Method] | None = None,
    join_seconds: float | None = None,
    limit: int | None = None,
    on_bad_audio: Literal["error", "skip"] = "error",
    num_proc: int | None = None,
    report_file: Path | None = None,
) -> list[PreparedSet]:
    """Load a set and look at every clip once.

    Where a transcript is empty nobody speaks; where all are, `source.no_speech` must say so. Clips without one (None)
    are left out.

    Args:
        window: seconds that the model hears at once. Longer clips are left out and counted.
        long_form: methods for the longer clips, each a set of its own: `NAME-sequential`, `NAME-chunked`.
        join_seconds: for these methods join consecutive clips, those that somebody transcribed, to recordings of up to
            so many seconds; they take all of these.
        limit, num_proc: as in `load_set`.
        on_bad_audio, report_file: as in `filter_invalid_clips`, of audio that can't be decoded.

    Raises:
        UserError: as `load_set` and `filter_invalid_clips`, if `join_seconds` isn't over `window`, if the transcripts don't
            agree with `source.no_speech`, and if nothing is left to decode.
    """
    if join_seconds is not None and join_seconds <= window:
        raise UserError(f"--join_clips {join_seconds:g}: long recordings are over {window:g} s, the model's window")
    speech = load_set(source, limit, num_proc, text_required=not source.no_speech)
    _check_transcripts(source, speech)
    options: dict[str, Any] = dict(
        limits=Limits(math.inf), on_bad_audio=on_bad_audio, num_proc=num_proc, split=source.name
    )
    checked = filter_invalid_clips(speech, None, report_file=report_file, **options)
    bad = len(speech) - len(checked)
    dropped = {"audio that can't be decoded": bad} if bad else {}
    texts = checked["text"][:]
    checked = replace_column(checked, "text", [text or "" for text in texts])
    if None in texts and not source.no_speech:
        checked = checked.select([row for row, text in enumerate(texts) if text is not None])
        dropped["no transcript (null)"] = texts.count(None)

    short = _longest_first(checked, 0.0, window)
    long = _longest_first(checked, window, math.inf)
    prepared = []
    if len(short):
        too_long = {f"longer than {window:g} s": len(long)} if len(long) else {}
        prepared.append(PreparedSet(source, "short", short, dropped | too_long))
    name = source.name
    if long_form and join_seconds is not None:
        name += "-joined"
        transcribed = checked.select([row for row, text in enumerate(checked["text"]) if not is_untranscribed(text)])
        if len(transcribed) < len(checked):
            dropped = dropped | {UNTRANSCRIBED: len(checked) - len(transcribed)}
        joined = join_clips(transcribed, join_seconds) if len(transcribed) else transcribed
        long = _longest_first(filter_invalid_clips(joined, None, **options), 0.0, math.inf) if len(joined) else joined
    if long_form and not len(long):
        logger.warning("%s: nothing for --long_form: no clip is longer than %g s (--join_clips)", source.name, window)
    for method in long_form or []:
        if len(long):
            prepared.append(PreparedSet(dataclasses.replace(source, name=f"{name}-{method}"), method, long, dropped))
    if not prepared:
        raise UserError(
            f"{source.name}: all clips are longer than {window:g} s, what the model hears at once: evaluate them with "
            "--long_form sequential"
        )
    return prepared


def _check_transcripts(source: EvalSet, speech: Dataset) -> None:
    """Raise `UserError` if a set without speech has transcripts, or one with speech has none."""
    spoken = [row for row, text in enumerate(speech["text"]) if text and text.strip() and not is_untranscribed(text)]
    if source.no_speech and spoken:
        row = speech.select_columns(["clip", "text"])[spoken[0]]
        raise UserError(
            f"{source.name}: --no_speech, but {len(spoken)} of {len(speech)} clips have a transcript, such as "
            f"{row['clip']}: {row['text'][:40]!r}. Leave --no_speech out, or evaluate those clips apart"
        )
    if not source.no_speech and not spoken:
        raise UserError(
            f"{source.name}: not one of {len(speech)} clips has a transcript. If nobody speaks in them, say "
            "--no_speech True: any text is made up then. If somebody does, name the column of their transcripts "
            "(--text_column_name), or have them transcribed: there is nothing to score them by"
        )


def _longest_first(checked: Dataset, above: float, up_to: float) -> Dataset:
    """The clips over `above` and up to `up_to` seconds."""
    seconds = checked["duration"][:]
    order = sorted(range(len(checked)), key=lambda row: -seconds[row])
    return checked.select([row for row in order if above < seconds[row] <= up_to])


def spread_clips(sets: list[PreparedSet], number: int) -> tuple[EvalSet, Dataset]:
    """`number` clips, if there are so many, spread over the first set of short ones, and where they are from.

    Raises `UserError` if no set has short clips.
    """
    prepared = next((prepared for prepared in sets if prepared.method == "short"), None)
    if prepared is None:
        raise UserError("--speed and --speculative take clips of at most a window, and no set has any: leave them out")
    total = len(prepared.clips)
    number = min(number, total)
    return prepared.source, prepared.clips.select([i * total // number for i in range(number)])


@dataclass
class Job:
    """A manifest to be completed.

    Attributes:
        settings: its sidecar.
        done: how many of its lines are there.
    """

    role: str
    model: WhisperForConditionalGeneration
    processor: WhisperProcessor
    prepared: PreparedSet
    decoding: Decoding
    manifest: Manifest
    settings: Settings
    done: int = 0


def plan_manifests(
    models: dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]],
    sets: list[PreparedSet],
    decoding: Decoding,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> list[Job]:
    """What models still have to decode. Nothing is decoded yet, and what can be refused is refused here.

    Args:
        models: by role, `student` first, `teacher` last: what it was loaded by, the model as it was loaded, in
            float32, and its processor. The models are left on `device` in `dtype`.
        folder: of the manifests, `DIR/manifests`.
        overwrite: throw away what other settings have made of these sets; without it that is refused.

    Raises:
        UserError: there are manifests of other settings, or of other sets or roles that these can't be compared with;
            a multilingual model has no language, or not this one; the model can't do what is asked; the disk can't be
            written.
    """
    jobs = []
    for role, (name, model, processor) in models.items():
        facts, weights = model_facts(name, model), weights_digest(model)
        model = model.to(device, dtype).eval()
        for prepared in sets:
            set_language(model, processor, prepared.source.language, prepared.source.task)
            check_can_transcribe(model, prepared.method, decoding.timestamps)
            settings = _settings(role, facts, model, weights, prepared, decoding)
            if prepared.method == "short" and decoding.timestamps == "none":  # of the others only the text is known
                settings.run["token_limit"] = token_limit(model, processor, decoding.generation_max_length)
            manifest = Manifest(folder, role, prepared.source.name)
            jobs.append(Job(role, model, processor, prepared, decoding, manifest, settings))
    _check_plan(folder, jobs, overwrite)
    for job in jobs:
        at_once = decoding.batch_size if job.prepared.method == "short" else 1
        job.done = job.manifest.begin(job.settings, at_once, overwrite)
    return jobs


def _check_plan(folder: Path, jobs: list[Job], overwrite: bool) -> None:
    """Raise `UserError` if what is in `folder` couldn't be scored together with what the jobs will make."""
    planned: dict[str, dict[str, Settings]] = {}
    for job in jobs:
        if not overwrite:
            job.manifest.refuse_others(job.settings)
        planned.setdefault(job.prepared.source.name, {})[job.role] = dataclasses.replace(job.settings, complete=True)
    for name, manifests in read_manifests(folder).items():
        for role, manifest in manifests.items():
            planned.setdefault(name, {}).setdefault(role, manifest.settings())
    check_comparable(folder, planned)


def _settings(
    role: str,
    facts: ModelFacts,
    model: WhisperForConditionalGeneration,
    weights: str,
    prepared: PreparedSet,
    decoding: Decoding,
) -> Settings:
    source = dataclasses.asdict(prepared.source)
    return Settings(
        role=role,
        facts=facts,
        set={name: source[name] for name in ("name", "dataset", "config", "split", "language", "task", "no_speech")}
        | {"on_hub": not local_or_hub(source["dataset"])},
        method=prepared.method,
        decoding=dict(
            num_beams=decoding.num_beams,
            generation_max_length=decoding.generation_max_length,
            timestamps=decoding.timestamps,
            dtype=str(model.dtype).removeprefix("torch."),
        ),
        run=dict(
            batch_size=decoding.batch_size,
            device=model.device.type,
            attention=model.config._attn_implementation,
            torch=torch.__version__,
            transformers=transformers.__version__,
            date=datetime.date.today().isoformat(),
        ),
        weights=weights,
        data=prepared.digest(),
        rows=len(prepared.clips),
        dropped=prepared.dropped,
    )


@torch.inference_mode()
def complete(job: Job) -> None:
    """Decode what a manifest lacks, and append it batch by batch."""
    clips, total, title = job.prepared.clips, len(job.prepared.clips), f"{job.role}, {job.prepared.source.name}"
    if job.done == total:
        return
    set_language(job.model, job.processor, job.prepared.source.language, job.prepared.source.task)
    rest = clips.select(range(job.done, total))
    if job.prepared.method == "short" and job.decoding.timestamps == "none":
        batches = _in_batches(job.model, job.processor, rest, job.decoding)
    else:
        batches = _through_pipeline(job, rest)
    known = iter(rest.remove_columns("audio"))
    with tqdm(total=total, initial=job.done, desc=title, unit="clip") as progress:
        for heard in batches:
            job.manifest.append([_line(next(known), what) for what in heard])
            progress.update(len(heard))
    job.manifest.finish()


def _line(row: dict[str, Any], heard: dict[str, Any]) -> dict[str, Any]:
    """A clip's line of the manifest."""
    line = dict(clip=row["clip"], reference=row["text"], prediction=heard["text"].strip(), duration=row["duration"])
    line["seconds"] = heard["seconds"]
    if row.get("speaker") is not None:
        line["speaker"] = row["speaker"]
    line["tokens"] = heard["tokens"]
    if heard.get("chunks") is not None:
        line["chunks"] = heard["chunks"]
    return line


def _in_batches(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clips: Dataset, decoding: Decoding
) -> Iterator[list[dict[str, Any]]]:
    """For each batch what was heard in its clips: `text`, `tokens`, and the share of the `seconds` of `generate`."""
    options = dict(num_beams=decoding.num_beams, do_sample=False, return_timestamps=False, **no_timestamps(model))
    if decoding.generation_max_length is not None:
        options["max_length"] = decoding.generation_max_length
    not_text = {model.generation_config.pad_token_id, processor.tokenizer.eos_token_id}
    features_of = functools.partial(_features, processor.feature_extractor)
    sounds = clips.select_columns(["audio", "clip"])
    for batch in DataLoader(sounds, decoding.batch_size, collate_fn=features_of, num_workers=decoding.num_workers):
        features = batch.to(model.device, model.dtype)
        mask = torch.ones_like(features[:, 0]).long()  # Whisper sees the padding's silence too
        start = time.perf_counter()
        tokens = model.generate(features, attention_mask=mask, **options).tolist()
        seconds = (time.perf_counter() - start) / len(tokens)
        texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        counts = [sum(token not in not_text for token in ids) for ids in tokens]
        heard = zip(texts, counts, strict=True)
        yield [dict(text=text, tokens=count, seconds=seconds) for text, count in heard]


def _features(extractor: WhisperFeatureExtractor, rows: list[dict[str, Any]]) -> torch.Tensor:
    """`(clips, mel bins, frames)`. Labels are no use here: `SpeechCollator` would tokenize them."""
    return extract_features(extractor, [waveform(row) for row in rows])["input_features"]


def token_limit(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, max_length: int | None
) -> int | None:
    """How many tokens of a text `generate` writes at most; None if its configuration doesn't say.

    Whisper's `generate` doesn't count the prompt in `max_length`, and ends at the decoder's last position.
    """
    config = model.generation_config
    limit = max_length or config.max_new_tokens or config.max_length
    return limit and min(limit, model.config.max_target_positions - len(processor.tokenizer.prefix_tokens))


def _through_pipeline(job: Job, clips: Dataset) -> Iterator[list[dict[str, Any]]]:
    """As `_in_batches` clip by clip, for recordings of any length, and with timestamps as `chunks` if asked for."""
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
    for heard in transcripts:
        yield [dataclasses.asdict(heard)]
