"""ONNX exports of one model that trace it once: tracing takes seconds, the rest does not."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers import WhisperForConditionalGeneration

from askd_hf.export import onnx


@contextlib.contextmanager
def traced_once(
    model: WhisperForConditionalGeneration, directory: Path, exporter: ModuleType = onnx
) -> Iterator[pytest.MonkeyPatch]:
    """Trace a model to `directory`, and let the export of a module take copies of its graphs."""
    traced = exporter.write_graphs(model, directory)

    def copies(model: WhisperForConditionalGeneration, parts: Path) -> tuple[Path, ...]:
        for file in directory.glob("*.onnx*"):
            shutil.copy(file, parts)
        return tuple(parts / file.name for file in traced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "write_graphs", copies)
        yield patch
