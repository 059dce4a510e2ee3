"""How fast models transcribe: all of them on the same clips, taking turns, so that the machine's moods meet them all.

A clip is encoded and decoded as `generate` does it, greedily, each half timed on its own. Audio is decoded and its
features are computed and moved to the device beforehand: they are the same work for every model.
"""

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..data.audio import SAMPLING_RATE, extract_features, waveform
from ..errors import UserError
from ..models.generation_config import no_timestamps
from .memory import peak_bytes, weight_bytes
from .results import ModelFacts, Speed, SpeedOfModel, Timing

GREEDY: dict[str, Any] = dict(num_beams=1, do_sample=False)
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors calls them


@dataclass
class _Measured:
    """One model at one batch size; the lists have an entry a repetition."""

    encoder: list[float] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # of the full batches of all repetitions
    tokens: list[int] = field(default_factory=list)  # of every batch, in the last repetition
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
    """Time all models where they are, with greedy decoding.

    Batch by batch the models take turns; who begins changes with every repetition. Each has a call that isn't timed
    before. Peak memory is measured afterwards, on the batch with the most tokens: the model's weights and what a batch
    takes above them, as if the other models weren't there; None where it can't be told (see `peak_bytes`).

    Args:
        models: by role; the last one (the teacher) is what the others are compared with. All on one device, in one
            dtype and with one implementation of attention.
        processors: by the same roles.
        dataset: of `load_speech_dataset`, clips of at most a window (30 s), at least as many as the largest batch.
        set_name: for the result.
        batch_sizes: clips a batch; all models are measured at each.
        repetitions: timed passes over all clips.
        max_length: tokens of a clip, at most. Default: that of each model's generation config.

    Raises:
        UserError: too few clips for a batch, a clip longer than a window, or one that can't be decoded.
        ValueError: models of different devices, dtypes or attention.
    """
    check_alike(models)
    if len(dataset) < max(batch_sizes):
        raise UserError(f"speed: {len(dataset)} clips can't fill a batch of {max(batch_sizes)}: take more clips")
    seconds = clip_seconds(dataset, min(p.feature_extractor.chunk_length for p in processors.values()))
    features = {role: clip_features(models[role].eval(), processors[role], dataset) for role in models}
    limit = {} if max_length is None else {"max_length": max_length}
    rows = []
    for batch_size in batch_sizes:
        measured = _take_turns(models, features, batch_size, repetitions, limit)
        rows += _rows(measured, batch_size, sum(seconds), models)
    last = list(models.values())[-1]
    return Speed(
        set=set_name,
        clips=len(dataset),
        audio_seconds=sum(seconds),
        repetitions=repetitions,
        device=device_name(last.device),
        dtype=str(last.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        attention=last.config._attn_implementation,
        rows=rows,
    )


def check_alike(models: Mapping[str, WhisperForConditionalGeneration]) -> None:
    """Raise `ValueError` unless a comparison of the models' speed is one of the models alone."""
    conditions = {role: (str(m.device), m.dtype, m.config._attn_implementation) for role, m in models.items()}
    if len(set(conditions.values())) > 1:
        raise ValueError(f"models in different conditions (device, dtype, attention) can't be compared: {conditions}")


def clip_seconds(dataset: Dataset, longest: float) -> list[float]:
    """The clips' lengths, of the column `duration` if there is one.

    Raises `UserError` for one over `longest` seconds.
    """
    if "duration" in dataset.column_names:
        seconds = dataset["duration"][:]
    else:
        seconds = [len(waveform(row)) / SAMPLING_RATE for row in dataset.select_columns(["audio", "clip"])]
    for clip, length in zip(dataset["clip"], seconds, strict=True):
        if length > longest:
            raise UserError(
                f"{clip}: {length:.1f} s. Speed is measured on clips of at most {longest:g} s: give another set"
            )
    return seconds


def clip_features(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, dataset: Dataset
) -> list[Tensor]:
    """Every clip's features `(mel bins, frames)` on the model's device and in its dtype."""
    rows = dataset.select_columns(["audio", "clip"])
    clips = (extract_features(processor.feature_extractor, [waveform(row)])["input_features"][0] for row in rows)
    return [clip.to(model.device, model.dtype) for clip in tqdm(clips, "Features", len(dataset), leave=False)]


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that the device was told to do is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def all_frames(features: Tensor) -> Tensor:
    """A mask of ones `(clips, frames)`: Whisper sees the padding's silence too, and `generate` warns without one."""
    return torch.ones(len(features), features.shape[-1], dtype=torch.long, device=features.device)


def transcribe_in_halves(
    model: WhisperForConditionalGeneration, features: Tensor, **options: Any
) -> tuple[Tensor, float, float]:
    """The tokens `(clips, longest)` as `generate` gives them, and the seconds of the encoder and of the decoder."""
    start = now(model.device)
    encoded = model.model.encoder(features).last_hidden_state
    between = now(model.device)
    # a new BaseModelOutput every time, because `generate` writes into it
    outputs = BaseModelOutput(last_hidden_state=encoded)
    tokens = model.generate(
        encoder_outputs=outputs, attention_mask=all_frames(features), **GREEDY, **no_timestamps(model), **options
    )
    return tokens, between - start, now(model.device) - between


def count_tokens(model: WhisperForConditionalGeneration, tokens: Tensor) -> int:
    """How many were generated, without the end of the text and what fills the batch up."""
    config = model.generation_config
    fillers = torch.tensor([config.eos_token_id, config.pad_token_id], device=tokens.device)
    return int((~torch.isin(tokens, fillers)).sum())


def _take_turns(
    models: Mapping[str, WhisperForConditionalGeneration],
    features: Mapping[str, list[Tensor]],
    batch_size: int,
    repetitions: int,
    limit: dict[str, int],
) -> dict[str, _Measured]:
    roles = list(models)
    clips = len(features[roles[0]])
    starts = range(0, clips, batch_size)
    measured = {role: _Measured() for role in roles}

    def run(role: str, start: int) -> tuple[Tensor, float, float]:
        batch = torch.stack(features[role][start : start + batch_size])
        return transcribe_in_halves(models[role], batch, **limit)

    for role in roles:
        run(role, 0)  # the first call is slower
    progress = tqdm(total=repetitions * len(starts), desc=f"Speed, batches of {batch_size}", leave=False)
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
            progress.update()
    progress.close()
    for role, model in models.items():
        counts = measured[role].tokens
        longest = starts[counts.index(max(counts))]
        above = peak_bytes(lambda: run(role, longest), model.device)  # noqa: B023
        measured[role].peak = None if above is None else above + weight_bytes(model)
    return measured


def _rows(
    measured: Mapping[str, _Measured], batch_size: int, audio_seconds: float, models: Mapping[str, Any]
) -> list[SpeedOfModel]:
    reference = measured[list(models)[-1]].total
    rows = []
    for role, result in measured.items():
        ratios = [theirs / ours for theirs, ours in zip(reference, result.total, strict=True)]
        total = timing(result.total)
        rows.append(
            SpeedOfModel(
                role=role,
                batch_size=batch_size,
                encoder=timing(result.encoder),
                decoder=timing(result.decoder),
                total=total,
                latency=statistics.median(result.latencies),
                rtfx=audio_seconds / total.median,
                tokens=sum(result.tokens),
                peak_memory_mb=None if result.peak is None else result.peak / 1e6,
                times_faster=statistics.median(ratios) if len(measured) > 1 else None,
            )
        )
    return rows


def timing(seconds: list[float]) -> Timing:
    """Of the repetitions' seconds."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def device_name(device: torch.device) -> str:
    """As its maker calls it, where that is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")  # Python's own `platform.processor()` is empty on Linux
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---- the models ----


def model_facts(name: str, model: WhisperForConditionalGeneration) -> ModelFacts:
    """What the comparison says about a model besides its speed.

    Args:
        name: the directory or Hub id that it was loaded from, or in other words what it was made of.
    """
    files = _weight_files(name)
    return ModelFacts(
        name=name,
        parameters=model.num_parameters(),
        megabytes=sum(file.stat().st_size for file in files) / 1e6 if files else None,
        encoder_layers=model.config.encoder_layers,
        decoder_layers=model.config.decoder_layers,
        stored_dtype=_stored_dtype(files),
    )


def _stored_dtype(files: list[Path]) -> str | None:
    """Of the floating-point tensors in safetensors files; several where they differ, None without files."""
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return ", ".join(sorted(STORED[name] for name in found & STORED.keys())) or None


def _weight_files(name: str) -> list[Path]:
    """The safetensors files that `from_pretrained(name)` reads; empty if they aren't here, or not all of them."""
    whole = _model_file(name, SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = _model_file(name, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [_model_file(name, shard) for shard in sorted(shards)]
    return [] if None in files else files


def _model_file(name: str, file: str) -> Path | None:
    """A file of a local directory, or of a Hub model in the cache; None if it isn't there."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory / file if (directory / file).is_file() else None
    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:  # of a model that was just made the name is none of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None
