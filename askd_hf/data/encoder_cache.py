"""Cache of encoder outputs on disk: the output of a frozen encoder for a clip is the same in every epoch and run.

    DIR/FINGERPRINT/settings.json   settings hashed to the fingerprint: weights, features, compute dtype
    DIR/FINGERPRINT/part-NAME.f16   one row of positions * d_model float16 values per clip; or 8-bit integers
    DIR/FINGERPRINT/part-NAME.keys  one `audio_key` per line; line i belongs to row i

A row is valid once its key is written, after the row itself was fsynced. A killed writer leaves at most an incomplete
tail, which no reader uses. Each writer makes a part of its own, named after host and process, so several processes,
nodes and runs can fill one directory at the same time, also where file locks don't work.

The outputs at all positions are stored, including those of the padding to 30 s: the encoder attends to these
positions, and the decoder attends to the outputs there. The table shows the difference of the decoder's logits from
those on uncached outputs, at the 250 label tokens of 12 clips of LibriSpeech test-other (2.4 to 18.1 s, mean 7.4 s),
whisper-tiny.en in float32:

    stored                                     max    |difference|   mean    same top token
    all 1500 positions as float16                0.0064           0.00065   250 of 250
    positions of the clip, zeros elsewhere       10.9             1.44      235
    positions of the clip only                   17.5             1.25      236
    positions of the clip and 10 s after it       8.0             0.72      241
    encoder run on the positions of the clip     20.7             1.47      234
    (all positions, encoder in bfloat16)          0.37            0.039     248
"""

import contextlib
import functools
import hashlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import PreTrainedModel, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from ..errors import UserError, disk_errors
from ..progress import progress_bar
from .audio import extract_features, waveform
from .audio_context import audio_context
from .cache_space import CacheSpace
from .encoder_store import INT8, SETTINGS_FILE, EncoderCache

FORMAT = 1  # increase it when the files or the features change: caches of another format are ignored
ENCODER_SHAPE = ("num_mel_bins", "d_model", "max_source_positions", "encoder_layers", "encoder_attention_heads")
ENCODER_SETTINGS = (*ENCODER_SHAPE, "encoder_ffn_dim", "activation_function", "scale_embedding")
NOT_IN_FEATURES = ("feature_extractor_type", "processor_class", "return_attention_mask")  # these don't change them
WAITING_BATCHES = 2  # in memory until they are written
RESERVE = 500_000_000  # bytes of disk space to leave free


def encoder_fingerprint(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, dtype_name: str, stored: str = "float16"
) -> str:
    """Return a hash, 32 hexadecimal digits, of everything that a cached output of given audio depends on.

    It covers the encoder's config and weights, the feature extractor's settings, and the dtypes. Device and attention
    implementation aren't included, as they only affect rounding.

    Args:
        model: the model with the encoder.
        processor: its processor.
        dtype_name: the compute dtype, such as "float32" or "bfloat16".
        stored: how outputs are stored, "float16" or "int8".
    """
    return _digest(_settings(model, processor, dtype_name, stored))


def matches(cache: EncoderCache, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> bool:
    """Return whether the outputs are those of this model's current encoder with the features of this processor."""
    computed_in = cache.settings["computed_in"]
    return cache.folder.name == encoder_fingerprint(model, processor, computed_in, cache.stored)


def weights_digest(module: nn.Module) -> str:
    """Return a hash, 32 hexadecimal digits, of the names, shapes and float32 values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def feature_settings(extractor: WhisperFeatureExtractor) -> dict[str, Any]:
    """Return the settings of the feature extractor that affect the features."""
    return {name: value for name, value in extractor.to_dict().items() if name not in NOT_IN_FEATURES}


def _settings(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, dtype_name: str, stored: str
) -> dict[str, Any]:
    encoder = model.model.encoder
    settings = {
        "format": FORMAT,
        "encoder": {name: getattr(model.config, name) for name in ENCODER_SETTINGS},
        "weights": {"as float32": weights_digest(encoder), "dtype": str(encoder.dtype).removeprefix("torch.")},
        "computed_in": dtype_name,
        "features": feature_settings(processor.feature_extractor),
    }
    return settings | {"stored": stored} if stored == INT8 else settings


def _open(folder: Path, model: WhisperForConditionalGeneration, stored: str) -> EncoderCache:
    return EncoderCache(folder, model.config.max_source_positions, model.config.d_model, stored)


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def cache_encoder(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    datasets: list[Dataset],
    directory: str | Path,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    stored: str = "float16",
    compile_options: dict[str, Any] | None = None,
) -> EncoderCache:
    """Compute the encoder outputs that are missing in `directory`, once per distinct clip.

    An interrupted run loses at most one batch. With several processes, which need the same `directory`, each computes
    its share. After all have returned (the caller's barrier) each must call `reload()` to see the others' outputs.

    Args:
        model: its encoder is moved to `device` temporarily, and not cast.
        processor: its processor.
        datasets: with the columns `audio`, `clip` and `audio_key` (see `filter_invalid_clips`).
        directory: for the caches of all encoders.
        batch_size: clips per forward pass.
        device: where the encoder runs.
        dtype: float32, or the dtype of autocast: bfloat16 or float16.
        process_index, num_processes: the share of this process.
        num_workers: number of processes that decode audio and compute features; 0 for the current one.
        stored: "float16"; or "int8", for 8-bit integers with a scale per position, in half the space.
        compile_options: arguments of `torch.compile`. Default: None, for an encoder that isn't compiled.

    Raises:
        UserError: the disk is full, the features are random, an output exceeds float16, or a clip can't be decoded.
    """
    _check_deterministic(model, processor)
    settings = _settings(model, processor, str(dtype).removeprefix("torch."), stored)
    folder = Path(directory) / _digest(settings)
    _write_settings(folder, settings)
    cache = _open(folder, model, stored)
    read = ("audio", "more_audio", "clip", "audio_key")
    clips: ConcatDataset = ConcatDataset(
        [dataset.select_columns([name for name in read if name in dataset.column_names]) for dataset in datasets]
    )
    rows = _first_rows(datasets)
    space = cache.space(list(rows))
    if process_index == 0:
        size = f"{space.clips} clips, {_gigabytes(space.clips * cache.row_bytes)} on disk"
        there = f"({space.cached} of {space.clips} cached)"
        print(f"encoder cache {folder}: {size} {there}; {_gigabytes(space.free_bytes)} free", flush=True)
    _check_disk_space(folder, space)
    # divide all clips, not the missing ones: other processes may already have added some
    share = list(rows.items())[process_index::num_processes]
    cached_keys = cache.has([key for key, _ in share])
    missing = Subset(clips, [row for (_, row), cached in zip(share, cached_keys, strict=True) if not cached])
    if len(missing) > 0:
        collate = functools.partial(_collate, processor.feature_extractor)
        batches = DataLoader(missing, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
        progress = progress_bar(len(missing), "Encoder outputs")
        # a thread writes while the next batch is computed
        writer, written = ThreadPoolExecutor(max_workers=1), deque[Future]()
        # not `Module.compile`, as the encoder is the caller's
        compiled = None if compile_options is None else torch.compile(model.model.encoder, **compile_options)
        with _moved(model.model.encoder, device) as encoder, cache.open_writer() as append, progress, writer:
            for batch in batches:
                if len(written) == WAITING_BATCHES:
                    written.popleft().result()
                outputs = _encode_batch(encoder, batch, dtype, compiled)
                written.append(writer.submit(append, batch["audio_key"], outputs))
                progress.update(len(batch["audio_key"]))
            for one in written:
                one.result()
        cache.reload()
    return cache


def encoder_cache_space(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    datasets: list[Dataset],
    directory: str | Path,
    dtype: torch.dtype,
    stored: str = "float16",
) -> CacheSpace:
    """Return the disk space that `cache_encoder` takes for these arguments. Nothing is computed or written.

    Raises `UserError` if the disk is too small, or the features are random.
    """
    _check_deterministic(model, processor)
    folder = Path(directory) / encoder_fingerprint(model, processor, str(dtype).removeprefix("torch."), stored)
    space = _open(folder, model, stored).space([*_first_rows(datasets)])
    _check_disk_space(folder, space)
    return space


def _first_rows(datasets: list[Dataset]) -> dict[str, int]:
    """Return the first row of each `audio_key` in the concatenated datasets."""
    rows: dict[str, int] = {}
    for row, key in enumerate(key for dataset in datasets for key in dataset["audio_key"][:]):
        rows.setdefault(key, row)
    return rows


def find_encoder_cache(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    datasets: list[Dataset],
    directory: str | Path,
    dtype: torch.dtype,
    stored: str = "float16",
) -> EncoderCache | None:
    """Return the cache of this encoder in `directory` if it has the outputs of all clips, else None.

    Nothing is computed. The arguments are those of `cache_encoder`.
    """
    folder = Path(directory) / encoder_fingerprint(model, processor, str(dtype).removeprefix("torch."), stored)
    if not (folder / SETTINGS_FILE).is_file():
        return None
    cache = _open(folder, model, stored)
    return cache if all(cache.has(dataset["audio_key"][:]).all() for dataset in datasets) else None


def _collate(extractor: WhisperFeatureExtractor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    features = extract_features(extractor, [waveform(row) for row in rows])
    return {**features, "clip": [row["clip"] for row in rows], "audio_key": [row["audio_key"] for row in rows]}


@contextlib.contextmanager
def _moved(encoder: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """Move the encoder to `device` in evaluation mode, and restore device and mode afterwards."""
    original_device, training = encoder.device, encoder.training
    try:
        yield encoder.to(device).eval()
    finally:
        encoder.to(original_device).train(training)


def run_encoder(encoder: nn.Module, features: Tensor, compiled: Callable[..., Any] | None = None) -> Tensor:
    """Return the outputs `(clips, positions, d_model)` of a frozen encoder for features `(clips, mel bins, frames)`.

    The features may be shorter than the encoder's window. `compiled` is the compiled encoder, if it is to run.

    On a CPU two clips are run at a time. This is 20 % faster than 16 clips, whose activations don't fit in its caches.
    """
    chunk_size = 2 if features.device.type == "cpu" else len(features)
    forward = encoder if compiled is None else compiled
    with audio_context(encoder, features.shape[-1]):
        return torch.cat([forward(part).last_hidden_state for part in features.split(chunk_size)])


def _encode_batch(
    encoder: PreTrainedModel, batch: dict[str, Any], dtype: torch.dtype, compiled: Callable[..., Any] | None
) -> Tensor:
    """Return the outputs, float16 `(batch, positions, d_model)`, on the CPU."""
    with torch.no_grad(), torch.autocast(encoder.device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = run_encoder(encoder, batch["input_features"].to(encoder.device, encoder.dtype), compiled)
    outputs = outputs.to(torch.float16).cpu()
    finite = outputs.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        clips = ", ".join(clip for clip, good in zip(batch["clip"], finite, strict=True) if not good)
        raise UserError(
            f"{clips}: the encoder's output is NaN, infinite or beyond 65504, the float16 maximum. Check the clip and "
            "the model, or train without --encoder_cache_dir"
        )
    return outputs


def _check_deterministic(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Raise `UserError` if the features or the encoder output of a clip are random."""
    spec_augment, dither = model.config.apply_spec_augment, processor.feature_extractor.dither
    if spec_augment or dither:
        raise UserError(
            "--encoder_cache_dir requires deterministic features: set apply_spec_augment to False (model config, now "
            f"{spec_augment}) and dither to 0.0 (feature extractor, now {dither}), or train without the cache"
        )


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    if (folder / SETTINGS_FILE).exists():
        return
    with disk_errors(f"encoder cache {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"settings.{socket.gethostname()}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(folder / SETTINGS_FILE)


def _check_disk_space(folder: Path, space: CacheSpace) -> None:
    """Raise `UserError` if the missing outputs don't fit on the disk."""
    if space.peak_bytes > 0 and space.peak_bytes + RESERVE > space.free_bytes:
        raise UserError(
            f"encoder cache {folder}: not enough disk space. {space.clips - space.cached} clips need "
            f"{_gigabytes(space.peak_bytes)} and a reserve of {_gigabytes(RESERVE)}, {_gigabytes(space.free_bytes)} "
            "are free. Free disk space, choose a directory on another disk, use fewer clips, or train without "
            "--encoder_cache_dir"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
