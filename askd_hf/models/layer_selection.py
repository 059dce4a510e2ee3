"""Greedy layer pruning: choose the teacher's layers that a student gets.

Starting with all layers, repeatedly remove the layer whose removal increases the teacher-forced cross-entropy on a few
clips least, until the requested number is left. There are no gradients and no random numbers. Encoder layers are
removed under the full decoder, and decoder layers on the outputs of the full encoder.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from ..arguments import ModelArguments
from ..config import ASKDConfig, resolve_dtype
from ..data import SpeechCollator, SpeechStream
from ..data.audio_context import context_of
from ..data.json_files import read_json, write_json
from ..data.shared_disk import of_main_process
from ..errors import UserError
from ..progress import progress_bar, write
from .layers import evenly_spread

LAYERS_FILE = "layers.json"
CLIPS, BATCH_SIZE = 16, 4
MODEL_INPUTS = {"input_features", "decoder_input_ids", "labels"}

Report = Callable[[str], None]


def choose_layers(
    models: ModelArguments,
    teacher: WhisperForConditionalGeneration,
    speech: Dataset | SpeechStream,
    collator: SpeechCollator,
    config: ASKDConfig,
    resume_from: str | None = None,
) -> ModelArguments:
    """Return `models` with layer counts replaced by the selected layer indices; lists are unchanged.

    With `--layer_selection spread`, `models` is returned unchanged. With several processes, rank 0 selects the layers.
    They are saved in `config.output_dir`. In a resumed run rank 0 reads them from the directory of its checkpoint.

    Args:
        teacher: with unquantized weights. It is moved to the device of the run and put in evaluation mode.
        speech: the training set, from which 16 clips are taken.
        resume_from: the directory of a checkpoint, None for a new run.

    Raises `UserError` if the options don't fit together, or differ from those of the resumed run.
    """
    saved_file = None if resume_from is None else Path(resume_from).parent / LAYERS_FILE
    saved = of_main_process(read_json(saved_file) if saved_file is not None and saved_file.is_file() else None)
    if saved_file is not None and (saved is not None) != (models.layer_selection == "greedy"):
        started = "without" if saved is None else "with"
        raise UserError(
            f"the run was started {started} --layer_selection greedy: resume it {started} this option, or the layers "
            "would differ"
        )
    if models.layer_selection != "greedy":
        if resume_from is None and config.process_index == 0:  # of an earlier run in this directory
            (Path(config.output_dir) / LAYERS_FILE).unlink(missing_ok=True)
        return models
    numbers = _numbers(models, speech)
    if saved is not None:
        if saved["asked"] != numbers:
            asked = ", ".join(f"--{name} {number}" for name, number in saved["asked"].items())
            raise UserError(f"the run was started with {asked} and --layer_selection greedy: resume it with the same")
        return replace(models, **saved["found"])
    results: list[dict[str, str] | None] = [None]
    if config.process_index == 0:
        results = [_select(numbers, teacher, speech, collator, config)]
        write_json(Path(config.output_dir) / LAYERS_FILE, {"asked": numbers, "found": results[0]})
    (found,) = broadcast_object_list(results)
    return replace(models, **found)


def _numbers(models: ModelArguments, speech: Dataset | SpeechStream) -> dict[str, int]:
    """Return the numbers of layers to select, by option. Raises `UserError` if layers can't be selected."""
    if isinstance(speech, SpeechStream):
        raise UserError("--layer_selection greedy is not supported with --streaming")
    given = {"encoder_layers": models.encoder_layers, "decoder_layers": models.decoder_layers}
    numbers = {name: int(layers) for name, layers in given.items() if layers is not None and "," not in layers}
    if not numbers:
        raise UserError(
            "--layer_selection greedy requires --decoder_layers or --encoder_layers as a number: the layers are given "
            "as lists"
        )
    return numbers


def selection_cost(
    models: ModelArguments,
    teacher: WhisperForConditionalGeneration,
    speech: Dataset | SpeechStream,
    collator: SpeechCollator,
    config: ASKDConfig,
) -> tuple[int, float]:
    """Return how many models a greedy selection compares, and the seconds of one that still has all layers.

    Raises `UserError` as `choose_layers`, whose arguments these are.
    """
    numbers = _numbers(models, speech)
    trials = sum(sum(range(keep + 1, getattr(teacher.config, name) + 1)) for name, keep in numbers.items())
    teacher.to(config.device).eval()
    batches = _batches(speech, collator, config)
    with _autocast(config):
        cross_entropy(teacher, batches)  # the first call is slower
        start = time.perf_counter()
        cross_entropy(teacher, batches)
    return trials, time.perf_counter() - start


def _select(
    numbers: dict[str, int],
    teacher: WhisperForConditionalGeneration,
    speech: Dataset,
    collator: SpeechCollator,
    config: ASKDConfig,
) -> dict[str, str]:
    """Return the selected layers as option values, {option: "0,3"}."""
    teacher.to(config.device).eval()
    batches = _batches(speech, collator, config)
    select = {"encoder_layers": select_encoder_layers, "decoder_layers": select_decoder_layers}
    with _autocast(config):
        found = {name: select[name](teacher, batches, number) for name, number in numbers.items()}
    # a single layer with a comma, or it would be a number of layers
    return {name: _listed(layers) + "," * (len(layers) == 1) for name, layers in found.items()}


def _batches(speech: Dataset, collator: SpeechCollator, config: ASKDConfig) -> list[dict[str, Tensor]]:
    """Return the batches of the clips that the layers are selected on, on the device of the run."""
    clips = min(CLIPS, len(speech))
    rows = [speech[i * len(speech) // clips] for i in range(clips)]  # from all datasets of a mix
    batches = []
    for i in range(0, len(rows), BATCH_SIZE):
        batch = collator(rows[i : i + BATCH_SIZE])
        batches.append({name: batch[name].to(config.device) for name in MODEL_INPUTS & batch.keys()})
    return batches


def _autocast(config: ASKDConfig) -> contextlib.AbstractContextManager[None]:
    dtype = resolve_dtype("auto", config)
    return torch.autocast(config.device.type, dtype=dtype, enabled=dtype != torch.float32)


def select_encoder_layers(
    model: WhisperForConditionalGeneration, batches: list[dict[str, Tensor]], keep: int, report: Report = write
) -> list[int]:
    """Return the `keep` encoder layers that greedy pruning leaves, in ascending order. The model isn't changed.

    Args:
        model: in evaluation mode.
        batches: of `SpeechCollator`, with `input_features` and `labels`, on the model's device.
        report: called with one line of text per removed layer.
    """

    def cost(layers: list[int]) -> float:
        with only_layers(model.model.encoder, layers):
            return cross_entropy(model, batches)

    return _remove_greedily("encoder", cost, model.config.encoder_layers, keep, report)


def select_decoder_layers(
    model: WhisperForConditionalGeneration, batches: list[dict[str, Tensor]], keep: int, report: Report = write
) -> list[int]:
    """Return the `keep` decoder layers, as `select_encoder_layers` does. The clips are encoded once."""
    encoded = []
    for batch in batches:
        with torch.no_grad(), context_of(model, batch):
            states = model.model.encoder(batch["input_features"]).last_hidden_state
        rest = {name: value for name, value in batch.items() if name != "input_features"}
        encoded.append({"encoder_outputs": (states,), **rest})

    def cost(layers: list[int]) -> float:
        with only_layers(model.model.decoder, layers):
            return cross_entropy(model, encoded)

    return _remove_greedily("decoder", cost, model.config.decoder_layers, keep, report)


@contextlib.contextmanager
def only_layers(stack: nn.Module, kept: list[int]) -> Iterator[None]:
    """Reduce an encoder or decoder to these layers, in this order, inside the context. No weights are copied."""
    whole: Any = stack.layers
    stack.layers = nn.ModuleList(whole[i] for i in kept)
    try:
        yield
    finally:
        stack.layers = whole


@torch.no_grad()
def cross_entropy(model: WhisperForConditionalGeneration, batches: list[dict[str, Any]]) -> float:
    """Return the cross-entropy on the labels, in nats per token."""
    total: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    for batch in batches:
        count = (batch["labels"] != -100).sum()
        with context_of(model, batch):  # the student's window may be shorter than the teacher's
            total += model(**batch, use_cache=False).loss.float() * count
        tokens += count
    return float(total / tokens)


def _remove_greedily(
    kind: str, cost: Callable[[list[int]], float], available: int, keep: int, report: Report
) -> list[int]:
    kept = list(range(available))
    trials = sum(range(keep + 1, available + 1))
    with progress_bar(trials, f"Selecting {kind} layers", "trial") as progress:
        while len(kept) > keep:
            costs = {}
            for layer in kept:
                costs[layer] = cost([other for other in kept if other != layer])
                progress.update()
            ranking = sorted(kept, key=lambda layer: costs[layer])  # on a tie the first is removed
            tried = ", ".join(f"{layer}: {costs[layer]:.3f}" for layer in ranking)
            report(f"{kind} with {len(kept)} layers, cross-entropy without layer {tried}")
            kept.remove(ranking[0])
    spread = evenly_spread(keep, available)
    report(
        f"{kind} layer{'s' if keep > 1 else ''} {_listed(kept)}: cross-entropy {cost(kept):.3f}; spread evenly, "
        f"{_listed(spread)}: {cost(spread):.3f}; all: {cost(list(range(available))):.3f}"
    )
    return kept


def _listed(layers: list[int]) -> str:
    return ",".join(map(str, layers))
