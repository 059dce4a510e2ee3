"""Which of a teacher's layers a student can do without, found out by leaving them out.

Greedy removal: starting with all layers, in each round the one whose absence raises the teacher-forced cross-entropy
on a few clips least is dropped, until as many are left as asked for. No gradients, no randomness. The encoder's layers
are probed under the whole decoder, and the decoder's on the whole encoder's outputs: training will bring the other
half back, so what a layer is worth without it says little.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration

from ..arguments import ModelArguments
from ..config import ASKDConfig, resolve_dtype
from ..data import SpeechCollator, SpeechStream
from ..errors import UserError
from .layers import evenly_spread

LAYERS_FILE = "layers.json"
CLIPS, CLIPS_AT_ONCE = 16, 4
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
    """The options with the layers that a probe, if asked for, finds in the place of numbers. Lists stay as they are.

    Of several processes the first one probes. What it finds is noted in `config.output_dir`, and a run that is resumed
    takes it from beside its checkpoint. Raises `UserError` if that is of other numbers.

    Args:
        teacher: with its full weights. To probe it is moved to where the run computes, and put in evaluation mode.
        speech: the training set, the first clips of which are heard.
        resume_from: the directory of a checkpoint.
    """
    noted_in = None if resume_from is None else Path(resume_from).parent / LAYERS_FILE
    if noted_in is not None and noted_in.is_file() != (models.layer_selection == "greedy"):
        began = "with" if noted_in.is_file() else "without"
        raise UserError(
            f"the run began {began} --layer_selection greedy: resume it likewise, or the layers are others"
        )
    if models.layer_selection != "greedy":
        if resume_from is None and config.process_index == 0:  # of another run, that was here before
            (Path(config.output_dir) / LAYERS_FILE).unlink(missing_ok=True)
        return models
    if isinstance(speech, SpeechStream):
        raise UserError(
            "--layer_selection greedy: it hears clips that have been looked at, and not those of --streaming"
        )
    given = {"encoder_layers": models.encoder_layers, "decoder_layers": models.decoder_layers}
    numbers = {name: int(layers) for name, layers in given.items() if layers is not None and "," not in layers}
    if not numbers:
        raise UserError("--layer_selection greedy: the layers are given as lists, and there is nothing to choose")
    if noted_in is not None:
        saved = json.loads(noted_in.read_text())
        if saved["asked"] != numbers:
            asked = ", ".join(f"--{name} {number}" for name, number in saved["asked"].items())
            raise UserError(f"the run began with {asked} and --layer_selection greedy: resume it with the same")
        return replace(models, **saved["found"])
    results: list[dict[str, str] | None] = [None]
    if config.process_index == 0:
        results = [_probe(numbers, teacher, speech, collator, config)]
        note = Path(config.output_dir) / LAYERS_FILE
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"asked": numbers, "found": results[0]}, indent=2) + "\n")
    (found,) = broadcast_object_list(results)
    return replace(models, **found)


def _probe(
    numbers: dict[str, int],
    teacher: WhisperForConditionalGeneration,
    speech: Dataset,
    collator: SpeechCollator,
    config: ASKDConfig,
) -> dict[str, str]:
    """Lists of layers, as options have them, for the `numbers` of layers."""
    teacher.to(config.device).eval()
    clips = min(CLIPS, len(speech))
    rows = [speech[i * len(speech) // clips] for i in range(clips)]  # of all datasets of a mix
    batches = []
    for i in range(0, len(rows), CLIPS_AT_ONCE):
        batch = collator(rows[i : i + CLIPS_AT_ONCE])
        batches.append({name: batch[name].to(config.device) for name in MODEL_INPUTS & batch.keys()})
    dtype = resolve_dtype("auto", config)
    probes = {"encoder_layers": probe_encoder, "decoder_layers": probe_decoder}
    with torch.autocast(config.device.type, dtype=dtype, enabled=dtype != torch.float32):
        found = {name: probes[name](teacher, batches, number) for name, number in numbers.items()}
    # a single layer with a comma, or it would be a number
    return {name: _listed(layers) + "," * (len(layers) == 1) for name, layers in found.items()}


def probe_encoder(
    model: WhisperForConditionalGeneration, batches: list[dict[str, Tensor]], keep: int, report: Report = print
) -> list[int]:
    """The `keep` encoder layers that greedy removal leaves, in ascending order; the model is left as it is.

    Args:
        model: in evaluation mode.
        batches: of `SpeechCollator`, `input_features` and `labels` among them, on the model's device.
        report: is given one line after another of what was found.
    """

    def cost(layers: list[int]) -> float:
        with only_layers(model.model.encoder, layers):
            return cross_entropy(model, batches)

    return _remove_greedily("encoder", cost, model.config.encoder_layers, keep, report)


def probe_decoder(
    model: WhisperForConditionalGeneration, batches: list[dict[str, Tensor]], keep: int, report: Report = print
) -> list[int]:
    """As `probe_encoder`, of the decoder. The clips are encoded once."""
    encoded = []
    for batch in batches:
        with torch.no_grad():
            states = model.model.encoder(batch["input_features"]).last_hidden_state
        rest = {name: value for name, value in batch.items() if name != "input_features"}
        encoded.append({"encoder_outputs": (states,), **rest})

    def cost(layers: list[int]) -> float:
        with only_layers(model.model.decoder, layers):
            return cross_entropy(model, encoded)

    return _remove_greedily("decoder", cost, model.config.decoder_layers, keep, report)


@contextlib.contextmanager
def only_layers(stack: nn.Module, kept: list[int]) -> Iterator[None]:
    """Within it, an encoder or decoder has only these layers, in this order. No weights are copied."""
    whole: Any = stack.layers
    stack.layers = nn.ModuleList(whole[i] for i in kept)
    try:
        yield
    finally:
        stack.layers = whole


@torch.no_grad()
def cross_entropy(model: WhisperForConditionalGeneration, batches: list[dict[str, Any]]) -> float:
    """On the labels, in nats a token."""
    total: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    for batch in batches:
        count = (batch["labels"] != -100).sum()
        total += model(**batch, use_cache=False).loss.float() * count
        tokens += count
    return float(total / tokens)


def _remove_greedily(
    kind: str, cost: Callable[[list[int]], float], available: int, keep: int, report: Report
) -> list[int]:
    kept = list(range(available))
    trials = sum(range(keep + 1, available + 1))
    with tqdm(total=trials, desc=f"Probing {kind} layers", unit="trial") as progress:
        while len(kept) > keep:
            costs = {}
            for layer in kept:
                costs[layer] = cost([other for other in kept if other != layer])
                progress.update()
            ranking = sorted(kept, key=lambda layer: costs[layer])  # of equal ones the first goes
            tried = ", ".join(f"{layer}: {costs[layer]:.3f}" for layer in ranking)
            report(f"{kind} with {len(kept)} layers, cross-entropy without layer {tried}")
            kept.remove(ranking[0])
    spread = evenly_spread(keep, available)
    report(
        f"{kind} layers {_listed(kept)}: cross-entropy {cost(kept):.3f}; spread evenly, {_listed(spread)}: "
        f"{cost(spread):.3f}; all: {cost(list(range(available))):.3f}"
    )
    return kept


def _listed(layers: list[int]) -> str:
    return ",".join(map(str, layers))
