"""Parameter count, layers, and size and dtype of the stored weights of an evaluated model."""

import json
from pathlib import Path

from safetensors import safe_open
from transformers import WhisperForConditionalGeneration
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..models.window import window_seconds
from .results import EvaluatedModel

STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names


def describe_model(name: str, model: WhisperForConditionalGeneration) -> EvaluatedModel:
    """Return the size of a model."""
    files = _weight_files(name)
    return EvaluatedModel(
        name=name,
        parameters=model.num_parameters(),
        size_mb=sum(file.stat().st_size for file in files) / 1e6 if files else None,
        encoder_layers=model.config.encoder_layers,
        decoder_layers=model.config.decoder_layers,
        stored_dtype=_stored_dtype(files),
        window=window_seconds(model),
        vocabulary=model.config.vocab_size,
    )


def _stored_dtype(files: list[Path]) -> str | None:
    """Return the dtypes of the floating-point tensors in safetensors files, comma-separated; None without files."""
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return ", ".join(sorted(STORED_DTYPES[name] for name in found & STORED_DTYPES.keys())) or None


def _weight_files(name: str) -> list[Path]:
    """Return the safetensors files that `from_pretrained(name)` reads; empty if one of them isn't stored locally."""
    whole = _local_file(name, SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = _local_file(name, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [_local_file(name, shard) for shard in sorted(shards)]
    return [] if None in files else files


def _local_file(name: str, file: str) -> Path | None:
    """Return a file of a local directory, or of a Hub model in the cache; None if it doesn't exist locally."""
    try:
        found = cached_file(str(Path(name).expanduser()), file, local_files_only=True)
    except OSError:  # no such file, model or Hub id
        return None
    return None if found is None else Path(found)
