"""Run a Whisper encoder on less audio than its window.

`WhisperEncoder` accepts only features of its whole window. Its convolutions and layers take any length, and its
position embeddings are a table with one row per 0.02 s, so a shorter input needs only the first rows.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

FRAMES_PER_SECOND = 100
FRAMES_PER_POSITION = 2
CONTEXT_MARGIN = 0.64  # seconds of audio context behind the end of the longest clip, in training at least


@contextlib.contextmanager
def audio_context(encoder: Any, frames: int) -> Iterator[None]:
    """Make `encoder` accept features of `frames` frames, at most those of its window, within the block.

    Args:
        encoder: a `WhisperEncoder`.
        frames: even number of frames of 0.01 s.

    Raises `ValueError` if `frames` is odd or exceeds the window.
    """
    window = encoder.embed_positions
    positions = frames // FRAMES_PER_POSITION
    if frames % FRAMES_PER_POSITION or not 1 <= positions <= window.num_embeddings:
        raise ValueError(
            f"frames must be even and at most {FRAMES_PER_POSITION * window.num_embeddings}, got {frames}"
        )
    if positions == window.num_embeddings:
        yield
        return
    config = encoder.config  # read by the encoder alone within the block
    encoder.embed_positions = nn.Embedding.from_pretrained(window.weight[:positions])
    config.max_source_positions = positions
    try:
        yield
    finally:
        encoder.embed_positions = window
        config.max_source_positions = window.num_embeddings


def context_of(model: Any, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the encoder takes the batch's features, which may be shorter than its window.

    Cached outputs of the encoder need none.
    """
    if "input_features" not in batch:
        return contextlib.nullcontext()
    return audio_context(model.model.encoder, batch["input_features"].shape[-1])


def context_frames(seconds: float, window: int) -> int:
    """Return the frames of an audio context for clips of up to `seconds` seconds: with the margin, even.

    Args:
        window: frames of the model's window, the maximum.
    """
    positions = math.ceil((seconds + CONTEXT_MARGIN) * FRAMES_PER_SECOND / FRAMES_PER_POSITION)
    return min(FRAMES_PER_POSITION * positions, window)
