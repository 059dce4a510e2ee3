"""Latency of the parts of a model: features, encoder, decoder layers and output projection.

A clip takes one pass of the encoder over the whole window, and per token one pass of the decoder layers and one
product with the output projection, whose cost is proportional to the vocabulary.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import EncoderDecoderCache, WhisperFeatureExtractor, WhisperForConditionalGeneration

from ..data.audio import SAMPLING_RATE, extract_features
from ..data.audio_context import audio_context, context_frames
from .results import CLIP_CONTEXT, PartLatency

REPETITIONS = 3


@torch.inference_mode()
def measure_parts(
    models: Mapping[str, tuple[WhisperForConditionalGeneration, WhisperFeatureExtractor]],
    waves: Sequence[np.ndarray],
    tokens: Mapping[str, int],
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    repetitions: int = REPETITIONS,
    after_pass: Callable[[], object] = lambda: None,
) -> list[PartLatency]:
    """Return the latency of the parts of each model, for each batch size and number of threads.

    In each repetition the models take turns, so that load fluctuations affect all of them. One untimed pass precedes.

    Args:
        models: model and feature extractor by role, in evaluation mode.
        waves: clips, float32 at 16 kHz. Those of a batch are at equal distances; the median at batch size 1 of clips
            sorted by duration.
        tokens: tokens to generate per clip, by role.
        threads: numbers of threads of PyTorch. Default: the present one. Restored afterwards.
        after_pass: called after each repetition, and after the untimed one.
    """
    rows = []
    for number in threads or (torch.get_num_threads(),):
        with _threads(number):
            for size in batch_sizes:
                clips = [waves[(2 * i + 1) * len(waves) // (2 * size)] for i in range(size)]
                timed: dict[str, list[tuple[float, ...]]] = {role: [] for role in models}
                for repetition in range(repetitions + 1):
                    for role, (model, extractor) in models.items():
                        seconds = _parts(model, extractor, clips, tokens[role], role == CLIP_CONTEXT)
                        if repetition:
                            timed[role].append(seconds)
                    after_pass()
                for role, measured in timed.items():
                    medians = (statistics.median(part) for part in zip(*measured, strict=True))
                    rows.append(PartLatency(role, size, number, tokens[role], *medians))
    return rows


def synchronized_time(device: torch.device) -> float:
    """Return a time stamp in seconds, after all operations queued on the device have finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parts(
    model: WhisperForConditionalGeneration,
    extractor: WhisperFeatureExtractor,
    clips: list[np.ndarray],
    tokens: int,
    clip_context: bool,
) -> tuple[float, float, float, float]:
    """Return the seconds of features, encoder, decoder layers and projection for one batch."""
    features, feature_seconds = _timed(model, lambda: extract_features(extractor, clips)["input_features"])
    inputs = features.to(model.device, model.dtype)
    if clip_context:
        inputs = inputs[..., : context_frames(max(map(len, clips)) / SAMPLING_RATE, inputs.shape[-1])]
    with audio_context(model.model.encoder, inputs.shape[-1]):
        hidden, encoder_seconds = _timed(model, lambda: model.model.encoder(inputs).last_hidden_state)
    states, decoder_seconds = _timed(model, lambda: decode(model, hidden, tokens))
    _, projection_seconds = _timed(model, lambda: [model.proj_out(state) for state in states])
    return feature_seconds, encoder_seconds, decoder_seconds, projection_seconds


def _timed(model: WhisperForConditionalGeneration, function: Callable[[], Tensor | list]) -> tuple:
    start = synchronized_time(model.device)
    result = function()
    return result, synchronized_time(model.device) - start


def decode(model: WhisperForConditionalGeneration, hidden: Tensor, tokens: int) -> list[Tensor]:
    """Return the decoder's outputs for `tokens` steps, `(batch, 1, d_model)` each. The input is always one token."""
    ids = torch.full((len(hidden), 1), model.config.decoder_start_token_id, device=hidden.device)
    cache, states = None, []
    for _ in range(tokens):
        outputs = model.model.decoder(ids, encoder_hidden_states=hidden, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        states.append(outputs.last_hidden_state)
    assert cache is None or isinstance(cache, EncoderDecoderCache)
    return states
