"""Interleaved timing of all models on the same clips, so that load fluctuations affect all of them.

Encoder and decoder are timed separately, with greedy decoding as in `generate`. Audio decoding, feature extraction and
the copy to the device are done before: they are the same work for every model.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput

from ..data.audio import SAMPLING_RATE, extract_features, waveform
from ..data.audio_context import audio_context, context_frames
from ..errors import UserError
from ..models.generation_config import no_timestamps
from ..progress import Bar, progress_bar
from .cpu import cpu_model
from .latency import REPETITIONS, measure_parts, synchronized_time
from .memory import peak_bytes
from .results import CLIP_CONTEXT, ModelSpeed, PartLatency, Speed, Timing

GREEDY: dict[str, Any] = dict(num_beams=1, do_sample=False)


@dataclass
class _Measurements:
    """Measurements of one model at one batch size, in seconds. Lists have one entry per repetition unless stated."""

    encoder: list[float] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # of each full batch, over all repetitions
    tokens: list[int] = field(default_factory=list)  # of each batch, in the last repetition
    peak: int | None = None

    @property
    def total(self) -> list[float]:
        return [encoder + decoder for encoder, decoder in zip(self.encoder, self.decoder, strict=True)]


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, WhisperForConditionalGeneration],
    processors: Mapping[str, WhisperProcessor],
    dataset: Dataset,
    set_name: str,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    repetitions: int = 5,
    max_length: int | None = None,
) -> Speed:
    """Time all models with greedy decoding, on the device they are on.

    For each batch, the models are timed one after another; the first one changes with every repetition. One untimed
    call per model precedes. Peak memory is measured afterwards, on the batch with the most tokens: the weights of the
    model plus what the call allocates, without the other models. It is None if it can't be measured (`peak_bytes`).

    Args:
        models: by role; the speedup of each is relative to the last one (the teacher). All must have the same device,
            dtype and attention implementation.
        dataset: from `load_speech_dataset`: clips of at most one window (30 s), at least as many as the largest batch.
        batch_sizes: clips per batch; all models are measured at each size.
        repetitions: timed passes over all clips.
        max_length: maximum number of tokens per clip. Default: from each model's generation config.

    Raises:
        UserError: there are fewer clips than the largest batch has, a clip is longer than a window, or can't be
            decoded.
        ValueError: the models differ in device, dtype or attention implementation.
    """
    check_same_setup(models)
    if len(dataset) < max(batch_sizes):
        raise UserError(f"speed: batch size {max(batch_sizes)} requires at least as many clips, got {len(dataset)}")
    durations = clip_durations(dataset, min(p.feature_extractor.chunk_length for p in processors.values()))
    features = {role: clip_features(models[role].eval(), processors[role], dataset) for role in models}
    if CLIP_CONTEXT in features:
        clips = zip(features[CLIP_CONTEXT], durations, strict=True)
        features[CLIP_CONTEXT] = [clip[:, : context_frames(seconds, clip.shape[-1])] for clip, seconds in clips]
    limit = {} if max_length is None else {"max_length": max_length}
    last = list(models.values())[-1]
    threads = threads_to_measure(last.device)
    passes = repetitions * sum(math.ceil(len(dataset) / size) for size in batch_sizes)
    passes += (1 + REPETITIONS) * len(set(batch_sizes)) * max(len(threads), 1)
    rows: list[ModelSpeed] = []
    with progress_bar(passes, "Measuring speed", "pass") as bar:
        for batch_size in batch_sizes:
            measured = _time_interleaved(models, features, batch_size, repetitions, limit, bar)
            rows += _rows(measured, batch_size, sum(durations), models)
        parts = _parts(models, processors, dataset, rows, threads, bar)
    return Speed(
        set=set_name,
        clips=len(dataset),
        audio_seconds=sum(durations),
        repetitions=repetitions,
        device=device_name(last.device),
        dtype=str(last.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        attention=last.config._attn_implementation,
        rows=rows,
        parts=parts,
    )


def threads_to_measure(device: torch.device) -> list[int]:
    """Return the numbers of threads that the parts of a model are measured with; empty on an accelerator."""
    return sorted({1, torch.get_num_threads()}) if device.type == "cpu" else []


def clips_measured(clips: int, batch_sizes: Sequence[int], repetitions: int, device: torch.device) -> int:
    """Return how many clips each model takes in `measure_speed`, with untimed calls and those that measure memory."""
    of_parts = (1 + REPETITIONS) * max(len(threads_to_measure(device)), 1)
    return sum(repetitions * clips + (2 + of_parts) * size for size in batch_sizes)


def _parts(
    models: Mapping[str, WhisperForConditionalGeneration],
    processors: Mapping[str, WhisperProcessor],
    dataset: Dataset,
    rows: Sequence[ModelSpeed],
    threads: Sequence[int],
    bar: Bar,
) -> list[PartLatency]:
    """Return the latency of each part, for the mean number of tokens that each model generated.

    A model of the same shape as an earlier one, such as the initial student, is not measured.
    """
    waves = [waveform(row) for row in dataset.select_columns(["audio", "clip"])]
    tokens = {row.role: max(round(row.tokens / len(dataset)), 1) for row in rows}
    measured: dict[str, tuple[WhisperForConditionalGeneration, WhisperFeatureExtractor]] = {}
    shapes = set()
    for role, model in models.items():
        config = model.config
        layers, window = (config.encoder_layers, config.decoder_layers), config.max_source_positions
        shape = (config.d_model, layers, config.vocab_size, window, role == CLIP_CONTEXT)
        if shape not in shapes:
            measured[role] = model, processors[role].feature_extractor
            shapes.add(shape)
    return measure_parts(
        measured,
        waves,
        tokens,
        batch_sizes=sorted({row.batch_size for row in rows}),
        threads=threads,
        after_pass=bar.update,
    )


def check_same_setup(models: Mapping[str, WhisperForConditionalGeneration]) -> None:
    """Raise `ValueError` unless all models have the same device, dtype and attention implementation."""
    setups = {role: (str(m.device), m.dtype, m.config._attn_implementation) for role, m in models.items()}
    if len(set(setups.values())) > 1:
        raise ValueError(f"models must have the same device, dtype and attention implementation, got {setups}")


def clip_durations(dataset: Dataset, longest: float) -> list[float]:
    """Return the duration of each clip in seconds, from the column `duration` if there is one.

    Raises `UserError` if a clip is longer than `longest` seconds.
    """
    if "duration" in dataset.column_names:
        durations = dataset["duration"][:]
    else:
        durations = [len(waveform(row)) / SAMPLING_RATE for row in dataset.select_columns(["audio", "clip"])]
    for clip, duration in zip(dataset["clip"], durations, strict=True):
        if duration > longest:
            raise UserError(
                f"{clip}: speed requires clips of at most {longest:g} s, got {duration:.1f} s. Use another set"
            )
    return durations


def clip_features(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, dataset: Dataset
) -> list[Tensor]:
    """Return the features of each clip, `(mel bins, frames)`, on the model's device and in its dtype."""
    rows = dataset.select_columns(["audio", "clip"])
    clips = (extract_features(processor.feature_extractor, [waveform(row)])["input_features"][0] for row in rows)
    return [clip.to(model.device, model.dtype) for clip in clips]


def attention_mask(features: Tensor) -> Tensor:
    """Return a mask of ones, `(clips, frames)`. Whisper attends to the padding; `generate` warns without a mask."""
    return torch.ones(len(features), features.shape[-1], dtype=torch.long, device=features.device)


def timed_generate(
    model: WhisperForConditionalGeneration, features: Tensor, **options: Any
) -> tuple[Tensor, float, float]:
    """Return the tokens of greedy `generate`, `(clips, tokens)`, and the seconds of the encoder and of the decoder."""
    start = synchronized_time(model.device)
    with audio_context(model.model.encoder, features.shape[-1]):
        encoded = model.model.encoder(features).last_hidden_state
    between = synchronized_time(model.device)
    # a new BaseModelOutput for each call, because `generate` writes into it
    outputs = BaseModelOutput(last_hidden_state=encoded)
    tokens = model.generate(
        encoder_outputs=outputs, attention_mask=attention_mask(features), **GREEDY, **no_timestamps(model), **options
    )
    return tokens, between - start, synchronized_time(model.device) - between


def count_tokens(model: WhisperForConditionalGeneration, tokens: Tensor) -> int:
    """Return the number of generated tokens, without end-of-text and padding tokens."""
    config = model.generation_config
    fillers = torch.tensor([config.eos_token_id, config.pad_token_id], device=tokens.device)
    return int((~torch.isin(tokens, fillers)).sum())


def _time_interleaved(
    models: Mapping[str, WhisperForConditionalGeneration],
    features: Mapping[str, list[Tensor]],
    batch_size: int,
    repetitions: int,
    limit: dict[str, int],
    bar: Bar,
) -> dict[str, _Measurements]:
    roles = list(models)
    clips = len(features[roles[0]])
    starts = range(0, clips, batch_size)
    measured = {role: _Measurements() for role in roles}

    def run(role: str, start: int) -> tuple[Tensor, float, float]:
        clips = features[role][start : start + batch_size]
        longest = max(clip.shape[-1] for clip in clips)
        batch = torch.stack([_pad(clip, longest) for clip in clips])
        return timed_generate(models[role], batch, **limit)

    for role in roles:
        run(role, 0)  # untimed: the first call is slower
    for repetition in range(repetitions):
        first = repetition % len(roles)
        for result in measured.values():
            result.encoder.append(0.0)
            result.decoder.append(0.0)
            result.tokens.clear()
        for start in starts:
            for role in roles[first:] + roles[:first]:
                tokens, encoder, decoder = run(role, start)
                result = measured[role]
                result.encoder[-1] += encoder
                result.decoder[-1] += decoder
                result.tokens.append(count_tokens(models[role], tokens))
                if start + batch_size <= clips:
                    result.latencies.append(encoder + decoder)
            bar.update()
    for role, model in models.items():
        counts = measured[role].tokens
        longest = starts[counts.index(max(counts))]
        above = peak_bytes(lambda: run(role, longest), model.device)  # noqa: B023
        measured[role].peak = None if above is None else above + model.get_memory_footprint()
    return measured


def _pad(features: Tensor, frames: int) -> Tensor:
    """Return the features of a clip with the value of silence up to `frames`."""
    return torch.nn.functional.pad(features, (0, frames - features.shape[-1]), value=float(features.min()))


def _rows(
    measured: Mapping[str, _Measurements], batch_size: int, audio_seconds: float, models: Mapping[str, Any]
) -> list[ModelSpeed]:
    baseline = measured[list(models)[-1]].total
    rows = []
    for role, result in measured.items():
        ratios = [base / own for base, own in zip(baseline, result.total, strict=True)]
        total = timing(result.total)
        rows.append(
            ModelSpeed(
                role=role,
                batch_size=batch_size,
                encoder=timing(result.encoder),
                decoder=timing(result.decoder),
                total=total,
                latency=statistics.median(result.latencies),
                rtfx=audio_seconds / total.median,
                tokens=sum(result.tokens),
                peak_memory_mb=None if result.peak is None else result.peak / 1e6,
                speedup=statistics.median(ratios) if len(measured) > 1 else None,
            )
        )
    return rows


def timing(seconds: list[float]) -> Timing:
    """Return median and range of the seconds of the repetitions."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def device_name(device: torch.device) -> str:
    """Return the product name of the device, if known."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
