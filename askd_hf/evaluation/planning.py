"""Propose the window, the vocabulary and the layers of a student that is as fast and as small as required.

Speed doesn't depend on the weights, so a model of the teacher's shape with random weights is measured. The parts are
timed once (features and encoder by window, decoder layers, projection), added up for every candidate, and the proposed
candidate is measured as a whole. The layers of an encoder, and of a decoder, take equally long, so of many only
`TIMED_LAYERS` are timed.
"""

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from ..data.audio import SAMPLING_RATE, extract_features
from ..data.encoder_cache import run_encoder
from ..errors import UserError
from ..models.window import POSITIONS_PER_SECOND, features_of
from ..progress import progress
from .latency import decode, measure_parts

WINDOWS = (20, 15, 12, 10, 8, 6, 5, 4, 3, 2)  # seconds
# tokens; if the transcripts are known, those above `--vocabulary auto`
VOCABULARIES = (20_000, 15_000, 10_000, 6_000, 3_000)
ENOUGH_TOKENS = 20_000  # more bring little on other speech: examples/guides/fast-students.md
DECODER_LAYERS = (4, 3, 2, 1)
TIMED_TOKENS = 4  # decoder steps per measurement
SECONDS_PER_PART, REPETITIONS = 1.5, 7
TIMED_LAYERS, FEW_LAYERS = 2, 6  # layers that are timed of an encoder or decoder with more than `FEW_LAYERS`
LONGEST_PASS = 2.0  # seconds; a model that takes longer is measured once, and such a teacher is not run as a whole
CPU = torch.device("cpu")
LOST = 0.01  # share of the clips that may be longer than the window without counting as a loss


@dataclass(frozen=True)
class Candidate:
    """The shape of a student, with its expected cost.

    Attributes:
        window: seconds.
        vocabulary: number of tokens.
        encoder_layers, decoder_layers: numbers of layers.
        parameters: number of weights.
        seconds: expected latency of a batch.
        speedup: latency of the teacher / `seconds`.
        fitting: share of the clips that fit in the window; 1 if the clips are unknown.
    """

    window: int
    vocabulary: int
    encoder_layers: int
    decoder_layers: int
    parameters: int = 0
    seconds: float = 0.0
    speedup: float = 0.0
    fitting: float = 1.0


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a model, per batch.

    Attributes:
        features, encoder, stem: by window; the encoder with all layers, and its convolutions alone.
        decoder: by window: seconds per token of the decoder without layers, and of each layer.
        cross_attention: by window: the same, once per clip: keys and values of the encoder's outputs.
        projection: seconds per token and per token of the vocabulary.
        encoder_layers: number of the encoder's layers.
        tokens: generated tokens per clip.
    """

    features: dict[int, float]
    encoder: dict[int, float]
    stem: dict[int, float]
    decoder: dict[int, tuple[float, float]]
    cross_attention: dict[int, tuple[float, float]]
    projection: float
    encoder_layers: int
    tokens: int

    def of(self, shape: Candidate) -> float:
        """Return the expected latency of a model in seconds per batch."""
        stem, (without_layers, layer) = self.stem[shape.window], self.decoder[shape.window]
        layers = (self.encoder[shape.window] - stem) * shape.encoder_layers / self.encoder_layers
        step = without_layers + layer * shape.decoder_layers + self.projection * shape.vocabulary
        without_layers, layer = self.cross_attention[shape.window]
        once = without_layers + layer * shape.decoder_layers
        return self.features[shape.window] + stem + layers + once + self.tokens * step


def teacher_shape(config: WhisperConfig) -> Candidate:
    window = config.max_source_positions // POSITIONS_PER_SECOND
    return Candidate(window, config.vocab_size, config.encoder_layers, config.decoder_layers)


def random_model(config: WhisperConfig, few_layers: bool = False) -> WhisperForConditionalGeneration:
    """Return a model of this shape with random weights.

    Args:
        few_layers: True for `TIMED_LAYERS` layers in place of more than `FEW_LAYERS`.
    """
    config = copy.deepcopy(config)
    for name in ("encoder_layers", "decoder_layers") if few_layers else ():
        number = getattr(config, name)
        setattr(config, name, TIMED_LAYERS if number > FEW_LAYERS else number)
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 0)  # theirs may be beyond a smaller vocabulary
    return WhisperForConditionalGeneration(config).eval()


@torch.inference_mode()
def measure_costs(
    model: WhisperForConditionalGeneration,
    extractor: WhisperFeatureExtractor,
    windows: Sequence[int],
    batch_size: int,
    tokens: int,
) -> Costs:
    """Measure the parts of a model of the teacher's shape at these windows.

    Args:
        model: of `random_model`, with all layers or few.
        extractor: of the teacher.
        windows: seconds; the teacher's is among them.
        tokens: generated tokens per clip.
    """
    config, encoder, decoder = model.config, model.model.encoder, model.model.decoder
    wave = np.random.default_rng(0).standard_normal(SAMPLING_RATE * 2).astype(np.float32) * 0.1
    features, full, stem, steps, once = {}, {}, {}, {}, {}
    layers = encoder.layers, decoder.layers
    for window in progress(windows, "Measuring windows", "window"):
        short = features_of(extractor, window)
        features[window] = _seconds(lambda: extract_features(short, [wave] * batch_size))  # noqa: B023
        inputs = torch.zeros(batch_size, config.num_mel_bins, 2 * window * POSITIONS_PER_SECOND)
        full[window] = _seconds(lambda: run_encoder(encoder, inputs))  # noqa: B023
        encoder.layers = layers[0][:0]
        stem[window] = _seconds(lambda: run_encoder(encoder, inputs))  # noqa: B023
        encoder.layers = layers[0]
        hidden = torch.zeros(batch_size, window * POSITIONS_PER_SECOND, config.d_model)
        one, two = (_decoder_seconds(model, layers[1][:count], hidden) for count in (1, 2))
        decoder.layers = layers[1]
        once[window], steps[window] = (
            (max(2 * of_one - of_two, 0.0), max(of_two - of_one, 0.0)) for of_one, of_two in zip(one, two, strict=True)
        )
    state = torch.zeros(batch_size, 1, config.d_model)
    projection = _seconds(lambda: model.proj_out(state)) / config.vocab_size
    return Costs(features, full, stem, steps, once, projection, config.encoder_layers, tokens)


def _decoder_seconds(
    model: WhisperForConditionalGeneration, layers: nn.ModuleList, hidden: torch.Tensor
) -> tuple[float, float]:
    """Return the seconds per clip, for the keys and values of the encoder's outputs, and per token."""
    model.model.decoder.layers = layers
    first, more = (_seconds(lambda: decode(model, hidden, tokens)) for tokens in (1, 1 + TIMED_TOKENS))  # noqa: B023
    token = max(more - first, 0.0) / TIMED_TOKENS
    return max(first - token, 0.0), token


def _seconds(function: Callable[[], object]) -> float:
    """Return the median time of a call, without the first one unless that takes more than `SECONDS_PER_PART`."""

    def timed() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    first = timed()
    if first > SECONDS_PER_PART:
        return first
    times: list[float] = []
    while len(times) < REPETITIONS and sum(times) < SECONDS_PER_PART:
        times.append(timed())
    return statistics.median(times)


def windows_up_to(whole: int, durations: Sequence[float] = ()) -> list[int]:
    """Return the windows to compare, in seconds: the teacher's, and shorter ones, the longest first.

    Args:
        durations: of the clips in seconds. The shortest windows that all of them, and 99 % of them, fit in are added.
    """
    shorter = {*WINDOWS}
    if durations:
        shorter |= {math.ceil(seconds) for seconds in np.quantile(durations, (1 - LOST, 1), method="higher").tolist()}
    return [whole, *sorted((seconds for seconds in shorter if 0 < seconds < whole), reverse=True)]


def candidates(
    config: WhisperConfig,
    costs: Costs,
    durations: Sequence[float] = (),
    vocabularies: Mapping[int, int] | None = None,
) -> list[Candidate]:
    """Return all students that can be made, with their expected cost.

    Args:
        config: of the teacher.
        durations: of the clips in seconds; empty if unknown.
        vocabularies: the size of `--vocabulary auto` by window; empty or None if the transcripts are unknown.
    """
    whole = teacher_shape(config)
    encoders = range(whole.encoder_layers, max(whole.encoder_layers // 2, 1) - 1, -1)
    decoders = [layers for layers in DECODER_LAYERS if layers <= whole.decoder_layers]
    weights, baseline = _Weights.of(config), costs.of(whole)
    found: list[Candidate] = []
    shapes: list[Candidate] = []
    for window in costs.features:
        fewest = vocabularies[window] if vocabularies else min(VOCABULARIES)
        smaller = sorted({fewest, *(size for size in VOCABULARIES if size > fewest)}, reverse=True)
        sizes = [whole.vocabulary, *(size for size in smaller if size < whole.vocabulary)]
        shapes += itertools.starmap(Candidate, itertools.product([window], sizes, encoders, decoders))
    for shape in shapes:
        fitting = sum(d <= shape.window for d in durations) / len(durations) if durations else 1.0
        seconds = costs.of(shape)
        changes: dict[str, Any] = dict(parameters=weights.count(shape), seconds=seconds, fitting=fitting)
        found.append(replace(shape, speedup=baseline / seconds, **changes))
    return found


@dataclass(frozen=True)
class _Weights:
    """Numbers of weights: of one layer, of one token or position, and of everything else."""

    encoder_layer: int
    decoder_layer: int
    width: int
    rest: int

    @classmethod
    def of(cls, config: WhisperConfig) -> "_Weights":
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
        encoder, decoder = (
            sum(weight.numel() for weight in layers[0].parameters())
            for layers in (model.model.encoder.layers, model.model.decoder.layers)
        )
        rest = model.num_parameters() - config.encoder_layers * encoder - config.decoder_layers * decoder
        rest -= config.d_model * (config.vocab_size + config.max_source_positions)
        return cls(encoder, decoder, config.d_model, rest)

    def count(self, shape: Candidate) -> int:
        rows = shape.vocabulary + shape.window * POSITIONS_PER_SECOND
        layers = shape.encoder_layers * self.encoder_layer + shape.decoder_layers * self.decoder_layer
        return self.rest + layers + rows * self.width


def reaching(found: list[Candidate], speedup: float | None, max_parameters: float | None) -> list[Candidate]:
    """Return the candidates that reach the target, those that lose least first.

    One decoder layer in place of two costs most accuracy, then each removed encoder layer. A small vocabulary costs
    much on other speech, and a removed decoder layer a little everywhere (examples/guides/fast-students.md). So
    candidates with one decoder layer come last. The others are sorted by their encoder layers, the clips that don't
    fit, their tokens up to `ENOUGH_TOKENS`, decoder layers, window and tokens.

    Args:
        speedup: minimum; None for any.
        max_parameters: maximum, in millions; None for any number.

    Raises `UserError` if there is none.
    """
    most = float("inf") if max_parameters is None else 1e6 * max_parameters
    good = [shape for shape in found if shape.speedup >= (speedup or 0.0) and shape.parameters <= most]
    if not good:
        fastest, smallest = max(found, key=lambda s: s.speedup), min(found, key=lambda s: s.parameters)
        raise UserError(
            f"no student of this teacher reaches the target: the fastest reaches {fastest.speedup:.1f}x, the smallest "
            f"has {smallest.parameters / 1e6:.1f} M parameters. Choose a smaller teacher or a lower target"
        )

    def loss(shape: Candidate) -> tuple[float, ...]:
        lost = round(max(1.0 - shape.fitting - LOST, 0.0), 2)
        first = shape.decoder_layers == 1, -shape.encoder_layers, lost, -min(shape.vocabulary, ENOUGH_TOKENS)
        return *first, -shape.decoder_layers, -shape.window, -shape.vocabulary

    return sorted(good, key=loss)


def measured_speedup(
    config: WhisperConfig, extractor: WhisperFeatureExtractor, shape: Candidate, batch_size: int, costs: Costs
) -> float:
    """Return the latency of the teacher / that of the candidate, measured in turns with random weights.

    The latency of a teacher that takes longer than `LONGEST_PASS` is the expected one.
    """
    student = copy.deepcopy(config)
    student.max_source_positions = shape.window * POSITIONS_PER_SECOND
    student.vocab_size = shape.vocabulary
    student.encoder_layers, student.decoder_layers = shape.encoder_layers, shape.decoder_layers
    shapes = {"student": (student, features_of(extractor, shape.window))}
    if not teacher_is_estimated(config, costs):
        shapes["teacher"] = config, extractor
    repetitions = 3 if shape.seconds <= LONGEST_PASS else 1
    seconds = random_latencies(shapes, batch_size, costs.tokens, repetitions=repetitions)
    return seconds.get("teacher", costs.of(teacher_shape(config))) / seconds["student"]


def teacher_is_estimated(config: WhisperConfig, costs: Costs) -> bool:
    """Return whether the teacher takes too long to be measured as a whole."""
    return costs.of(teacher_shape(config)) > LONGEST_PASS


def random_latencies(
    shapes: Mapping[str, tuple[WhisperConfig, WhisperFeatureExtractor]],
    batch_size: int,
    tokens: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    repetitions: int = 3,
) -> dict[str, float]:
    """Return the seconds per batch of models with random weights, measured in turns, by role.

    Args:
        shapes: config and feature extractor by role.
        tokens: generated tokens per clip.
    """
    wave = np.random.default_rng(0).standard_normal(SAMPLING_RATE * 2).astype(np.float32) * 0.1
    models = {
        role: (random_model(config).to(device, dtype), extractor) for role, (config, extractor) in shapes.items()
    }
    rows = measure_parts(
        models, [wave], dict.fromkeys(models, tokens), batch_sizes=(batch_size,), repetitions=repetitions
    )
    return {row.role: row.total for row in rows}
