"""The encoder's outputs on disk: a frozen encoder gives a clip the same output in every epoch and every run.

    DIR/FINGERPRINT/settings.json    what the fingerprint is the hash of: weights, features, dtype of computing
    DIR/FINGERPRINT/part-00000.f16   rows of positions * d_model float16, one a clip
    DIR/FINGERPRINT/part-00000.keys  the clips' `audio_key`, one a line; line i belongs to row i

A row counts once its key's line is complete, which is written when the row is safe on disk. So a process may be killed
at any time; what it had begun is cut off by the next writer of the part. A writer takes the first part that nobody
else has locked: several processes and several runs can fill one directory at once.

All positions are kept, also those of the silence that pads a clip to 30 s: the encoder attends to them, the decoder to
its outputs there. Measured with whisper-tiny.en in float32 on 12 clips of LibriSpeech test-other (2.4 to 18.1 s, mean
7.4 s): the decoder's logits at the 250 label tokens, against those on the encoder's own outputs.

    what is kept                               largest, mean |difference|   same first token
    all 1500 positions as float16                0.0064    0.00065          250 of 250
    the clip's positions, the others as zeros     10.9      1.44            235
    the clip's positions, the others dropped      17.5      1.25            236
    the clip's and those of the 10 s after it      8.0      0.72            241
    the encoder restricted to the clip            20.7      1.47            234
    (all, the encoder under autocast to bfloat16   0.37     0.039           248)
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from ..errors import UserError, disk_errors
from .audio import extract_features, waveform

FORMAT = 1  # to be raised with every change of the files, or of how audio becomes features: old caches are left alone
ENCODER_SHAPE = ("num_mel_bins", "d_model", "max_source_positions", "encoder_layers", "encoder_attention_heads")
ENCODER_SETTINGS = (*ENCODER_SHAPE, "encoder_ffn_dim", "activation_function", "scale_embedding")
NOT_IN_FEATURES = ("feature_extractor_type", "processor_class", "return_attention_mask")  # these don't change them
RESERVE = 500_000_000  # bytes of the disk that are left free


class EncoderCache:
    """Outputs `(positions, width)` in `folder`, `DIR/FINGERPRINT`: filled by `cache_encoder`, found by `audio_key`.

    Pickled it is these three alone: the process that gets it opens the files for itself.
    """

    def __init__(self, folder: Path, positions: int, width: int):
        self.folder, self.positions, self.width = folder, positions, width
        self.row_bytes = 2 * positions * width
        self.reload()

    def __reduce__(self):
        return EncoderCache, (self.folder, self.positions, self.width)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def is_of(self, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> bool:
        """Whether the outputs are those of this model's encoder as it is now, with these features."""
        computed_in = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))["computed_in"]
        return self.folder.name == encoder_fingerprint(model, processor, computed_in)

    def reload(self) -> None:
        """Look at the files again, for what this and other processes have added."""
        self._parts: list[np.ndarray] = []  # memory-mapped, (rows, positions, width)
        self._places: dict[str, tuple[int, int]] = {}  # of a key: part and row
        for data in sorted(self.folder.glob("part-*.f16")):
            keys = _complete_keys(data, self.row_bytes)
            if keys:
                self._places.update((key, (len(self._parts), row)) for row, key in enumerate(keys))
                shape = (len(keys), self.positions, self.width)
                self._parts.append(np.memmap(data, np.float16, mode="r", shape=shape))

    def read(self, keys: list[str]) -> Tensor:
        """A copy of some outputs: float16 `(clips, positions, width)`. Raises `UserError` if one isn't there."""
        missing = [key for key in keys if key not in self]
        if missing:
            raise UserError(
                f"encoder cache {self.folder}: no output for {len(missing)} of {len(keys)} clips (audio_key "
                f"{missing[0]}, ...). All were there before training: start again, which computes what is missing"
            )
        outputs = np.empty((len(keys), self.positions, self.width), np.float16)
        for output, key in zip(outputs, keys, strict=True):
            part, row = self._places[key]
            output[:] = self._parts[part][row]
        return torch.from_numpy(outputs)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[list[str], Tensor], None]]:
        """A function that appends clips: their keys, and their outputs as float16 `(clips, positions, width)`."""
        with contextlib.ExitStack() as stack:
            with disk_errors(f"encoder cache {self.folder}"):
                part = self._lock_part(stack)
                keys_there = _complete_keys(part, self.row_bytes)
                data, lines = (stack.enter_context(FileIO(part.with_suffix(end), "ab")) for end in (".f16", ".keys"))
                # what a killed writer left unfinished; no reader has looked at it
                data.truncate(len(keys_there) * self.row_bytes)
                lines.truncate(sum(len(key) + 1 for key in keys_there))

            def append(keys: list[str], outputs: Tensor) -> None:
                with disk_errors(f"encoder cache {self.folder}"):
                    # in this order, so that a key never stands for a row that isn't on the disk
                    _write(data, outputs.contiguous().numpy().tobytes())
                    _write(lines, "".join(f"{key}\n" for key in keys).encode("ascii"))

            yield append

    def _lock_part(self, stack: contextlib.ExitStack) -> Path:
        numbers = itertools.count()
        while True:
            part = self.folder / f"part-{next(numbers):05d}.f16"
            with contextlib.suppress(Timeout):
                stack.enter_context(FileLock(part.with_suffix(".lock"), timeout=0))
                return part


def _complete_keys(data: Path, row_bytes: int) -> list[str]:
    """The keys of the rows of a part that count, in their order."""
    file = data.with_suffix(".keys")
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]  # behind the last newline is nothing, or half a key
    # a power cut can leave zeros in a line
    keys = [key.decode("ascii") for key in itertools.takewhile(bytes.isalnum, lines)]
    return keys[: data.stat().st_size // row_bytes]


def _write(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def encoder_fingerprint(model: WhisperForConditionalGeneration, processor: WhisperProcessor, dtype_name: str) -> str:
    """32 hexadecimal digits for all that the encoder's output for given audio depends on.

    They stand for the encoder's config and weights, the feature extractor's settings and the dtype of computing, such
    as "float32" or "bfloat16". Device and implementation of attention don't count: they only change roundings.
    """
    return _digest(_settings(model, processor, dtype_name))


def weights_digest(module: nn.Module) -> str:
    """32 hexadecimal digits for the names, shapes and values of all weights, as float32."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def feature_settings(extractor: WhisperFeatureExtractor) -> dict[str, Any]:
    """All that features depend on besides the audio."""
    return {name: value for name, value in extractor.to_dict().items() if name not in NOT_IN_FEATURES}


def _settings(model: WhisperForConditionalGeneration, processor: WhisperProcessor, dtype_name: str) -> dict[str, Any]:
    encoder = model.model.encoder
    return {
        "format": FORMAT,
        "encoder": {name: getattr(model.config, name) for name in ENCODER_SETTINGS},
        "weights": {"as float32": weights_digest(encoder), "dtype": str(encoder.dtype).removeprefix("torch.")},
        "computed_in": dtype_name,
        "features": feature_settings(processor.feature_extractor),
    }


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
) -> EncoderCache:
    """Compute the encoder's outputs that aren't in `directory` yet, each distinct clip once.

    Ctrl-C or a kill loses a batch at most. Of several processes each computes its share; when all have returned (the
    barrier is the caller's) each must `reload()` to see the others'. All need the same `directory`.

    Args:
        model: its encoder is moved to `device` meanwhile, and never cast.
        datasets: with the columns `audio`, `clip` and `audio_key` (see `filter_invalid_clips`).
        dtype: float32, or that of autocast: bfloat16, float16.
        num_workers: processes that decode audio and make features. 0: this one.

    Raises:
        UserError: no room on the disk, augmented features, an output beyond float16, a clip that can't be decoded.
    """
    _refuse_augmentation(model, processor)
    settings = _settings(model, processor, str(dtype).removeprefix("torch."))
    folder = Path(directory) / _digest(settings)
    _write_settings(folder, settings)
    cache = EncoderCache(folder, model.config.max_source_positions, model.config.d_model)
    clips: ConcatDataset = ConcatDataset(
        [dataset.select_columns(["audio", "clip", "audio_key"]) for dataset in datasets]
    )
    first: dict[str, int] = {}
    for row, key in enumerate(key for dataset in datasets for key in dataset["audio_key"][:]):
        first.setdefault(key, row)
    _check_room(cache, list(first), verbose=process_index == 0)
    # shares of all clips and not of the missing ones, which grow fewer while other processes start
    share = list(first.items())[process_index::num_processes]
    missing = Subset(clips, [row for key, row in share if key not in cache])
    if len(missing) > 0:
        collate = functools.partial(_collate, processor.feature_extractor)
        batches = DataLoader(missing, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
        progress = tqdm(total=len(missing), desc="Encoding", unit="clip", disable=process_index > 0)
        with _ready(model.model.encoder, device) as encoder, cache.writing() as append, progress:
            for batch in batches:
                append(batch["audio_key"], _encode(encoder, batch, dtype))
                progress.update(len(batch["audio_key"]))
        cache.reload()
    return cache


def _collate(extractor: WhisperFeatureExtractor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    features = extract_features(extractor, [waveform(row) for row in rows])
    return {**features, "clip": [row["clip"] for row in rows], "audio_key": [row["audio_key"] for row in rows]}


@contextlib.contextmanager
def _ready(encoder: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """The encoder on `device` in evaluation mode; afterwards where and as it was."""
    before, training = encoder.device, encoder.training
    try:
        yield encoder.to(device).eval()
    finally:
        encoder.to(before).train(training)


def encode(encoder: nn.Module, features: Tensor) -> Tensor:
    """The output `(clips, positions, d_model)` for `(clips, mel bins, frames)`, of an encoder that isn't trained.

    On a CPU two clips at a time: a fifth faster than 16, whose activations don't stay in its caches.
    """
    at_once = 2 if features.device.type == "cpu" else len(features)
    return torch.cat([encoder(part).last_hidden_state for part in features.split(at_once)])


def _encode(encoder: PreTrainedModel, batch: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Float16 `(batch, positions, d_model)` on the CPU."""
    with torch.no_grad(), torch.autocast(encoder.device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = encode(encoder, batch["input_features"].to(encoder.device, encoder.dtype))
    outputs = outputs.to(torch.float16).cpu()
    finite = outputs.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        clips = ", ".join(clip for clip, good in zip(batch["clip"], finite, strict=True) if not good)
        raise UserError(
            f"{clips}: the encoder's output is NaN, infinite or beyond 65504, the largest number of float16. Look at "
            "the clip and at the model, or train without --encoder_cache_dir"
        )
    return outputs


def _refuse_augmentation(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    spec_augment, dither = model.config.apply_spec_augment, processor.feature_extractor.dither
    if spec_augment or dither:
        raise UserError(
            f"the encoder's output can't be cached: with apply_spec_augment {spec_augment} (the model's config) and "
            f"dither {dither} (the feature extractor's) a clip's features are others in every epoch. Switch them off, "
            "or train without --encoder_cache_dir"
        )


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    if (folder / "settings.json").exists():
        return
    with disk_errors(f"encoder cache {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"settings.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(folder / "settings.json")


def _check_room(cache: EncoderCache, keys: list[str], verbose: bool) -> None:
    """Say how big the cache will be; raise `UserError` if the disk is too small for what is missing."""
    there = sum(key in cache for key in keys)
    needed, free = (len(keys) - there) * cache.row_bytes, shutil.disk_usage(cache.folder).free
    total, missing, reserve, left = (f"{n / 1e9:.2f} GB" for n in (len(keys) * cache.row_bytes, needed, RESERVE, free))
    if verbose:
        size = f"{len(keys)} clips, {total} on disk ({there} of {len(keys)} there)"
        print(f"encoder cache {cache.folder}: {size}; {left} free", flush=True)
    if needed > 0 and needed + RESERVE > free:
        raise UserError(
            f"encoder cache {cache.folder}: no room on the disk. {len(keys) - there} clips need {missing}, {reserve} "
            f"stay in reserve, {left} are free. Make room, name a directory on another disk, take fewer clips, or "
            "train without --encoder_cache_dir"
        )
