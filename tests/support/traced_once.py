"""ONNX exports of one model that trace it once: tracing takes seconds, the rest does not."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import WhisperForConditionalGeneration

from askd_hf.export import onnx, onnx_graphs


@contextlib.contextmanager
def traced_once(model: WhisperForConditionalGeneration, directory: Path) -> Iterator[pytest.MonkeyPatch]:
    """Trace a model to `directory`, and let `export_onnx` take copies of its graphs."""
    traced = onnx_graphs.write_graphs(model, directory)

    def copies(model: WhisperForConditionalGeneration, parts: Path) -> tuple[Path, ...]:
        for file in directory.glob("*.onnx*"):
            shutil.copy(file, parts)
        return tuple(parts / file.name for file in traced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "write_graphs", copies)
        yield patch
