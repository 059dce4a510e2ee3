"""The probe for the layers that a student can do without."""

import json

import pytest
import torch
from models import make_whisper
from training import Clips, collate

from askd_hf.arguments import ModelArguments
from askd_hf.config import ASKDConfig
from askd_hf.errors import UserError
from askd_hf.models.layer_selection import (
    choose_layers,
    cross_entropy,
    only_layers,
    select_decoder_layers,
    select_encoder_layers,
)
from askd_hf.models.student import init_student


@pytest.fixture
def deep(processor):
    """With 5 encoder and 5 decoder layers."""
    return make_whisper(processor, encoder_layers=5, decoder_layers=5).eval()


@pytest.fixture
def batches(deep):
    rows = Clips(deep.config, clips=6).rows
    batches = [collate(rows[:4]), collate(rows[4:])]
    return [{name: batch[name] for name in ("input_features", "labels")} for batch in batches]


def make_identity(layer) -> None:
    """All that a layer adds to what it is given becomes 0."""
    for name in ("self_attn", "encoder_attn"):
        if hasattr(layer, name):
            for parameter in getattr(layer, name).out_proj.parameters():
                parameter.data.zero_()
    for parameter in layer.fc2.parameters():
        parameter.data.zero_()


def plain_cross_entropy(model, batches):
    total = tokens = 0
    with torch.no_grad():
        for batch in batches:
            log_probs = model(**batch).logits.log_softmax(-1)
            for clip, labels in enumerate(batch["labels"].tolist()):
                for i, label in enumerate(labels):
                    if label != -100:
                        total, tokens = total - log_probs[clip, i, label].item(), tokens + 1
    return total / tokens


def test_the_cross_entropy_is_over_all_tokens_and_of_the_layers_that_are_left(deep, batches):
    assert cross_entropy(deep, batches) == pytest.approx(plain_cross_entropy(deep, batches), rel=1e-5)
    before = list(deep.model.encoder.layers)
    with only_layers(deep.model.encoder, [0, 3]), only_layers(deep.model.decoder, [1, 2, 4]):
        without = cross_entropy(deep, batches)
    student = init_student(deep, decoder_layers=[1, 2, 4], encoder_layers=[0, 3]).eval()
    assert without == pytest.approx(plain_cross_entropy(student, batches), rel=1e-5)
    assert all(a is b for a, b in zip(deep.model.encoder.layers, before, strict=True))


@torch.no_grad()
def with_own_labels(model, batches, tokens: int = 8):
    """The batches labelled by what the model itself finds most probable: its layers' absence costs something."""
    labelled = []
    for batch in batches:
        labels = torch.empty(len(batch["labels"]), 0, dtype=torch.long)
        for _ in range(tokens):
            start = torch.full((len(labels), 1), model.config.decoder_start_token_id)
            logits = model(batch["input_features"], decoder_input_ids=torch.cat([start, labels], dim=1)).logits
            labels = torch.cat([labels, logits[:, -1:].argmax(-1)], dim=1)
        labelled.append(batch | {"labels": labels})
    return labelled


@pytest.mark.parametrize("useless", [0, 1, 4])
@pytest.mark.parametrize(("probe", "stack"), [(select_encoder_layers, "encoder"), (select_decoder_layers, "decoder")])
def test_a_layer_that_does_nothing_is_the_first_to_go(deep, batches, probe, stack, useless):
    make_identity(getattr(deep.model, stack).layers[useless])
    batches = with_own_labels(deep, batches)
    lines = []
    assert probe(deep, batches, 4, lines.append) == [layer for layer in range(5) if layer != useless]
    whole = cross_entropy(deep, batches)
    assert lines[0].startswith(f"{stack} with 5 layers, cross-entropy without layer {useless}: {whole:.3f}, ")
    assert lines[1].startswith(f"{stack} layers ") and lines[1].endswith(f"; all: {whole:.3f}")


@pytest.mark.parametrize(("probe", "stack"), [(select_encoder_layers, "encoder"), (select_decoder_layers, "decoder")])
def test_each_round_drops_the_layer_whose_absence_costs_least(deep, batches, probe, stack):
    expected = list(range(5))
    while len(expected) > 2:
        costs = {}
        for layer in expected:
            rest = [other for other in expected if other != layer]
            layers = dict(decoder_layers=list(range(5)), encoder_layers=list(range(5))) | {f"{stack}_layers": rest}
            costs[layer] = plain_cross_entropy(init_student(deep, **layers).eval(), batches)
        expected.remove(min(costs, key=costs.get))
    weights = {name: weight.clone() for name, weight in deep.state_dict().items()}
    assert probe(deep, batches, 2, lambda line: None) == expected
    assert all(torch.equal(weight, weights[name]) for name, weight in deep.state_dict().items())


def test_numbers_are_probed_lists_stay_and_a_resumed_run_has_the_layers_it_began_with(tmp_path, deep, capsys):
    config = ASKDConfig(output_dir=str(tmp_path), use_cpu=True)
    rows = Clips(deep.config, clips=20).rows
    heard = []

    def collator(clips):
        heard.extend(clip["clip"] for clip in clips)
        return collate(clips)

    def chosen(resume_from=None, layer_selection="greedy", **options) -> tuple[str | None, str]:
        models = ModelArguments(layer_selection=layer_selection, **options)
        models = choose_layers(models, deep, rows, collator, config, resume_from)
        return models.encoder_layers, models.decoder_layers

    for lists in (dict(decoder_layers="0,2"), dict(decoder_layers="0,2", encoder_layers="3,")):
        with pytest.raises(UserError, match="the layers are given as lists"):
            chosen(**lists)
    heard.clear()
    encoder, decoder = chosen(decoder_layers="1", encoder_layers="2")
    spread = [i * 20 // 16 for i in range(16)]
    assert heard == [f"clip-{i}" for i in spread]
    batch = collate([rows[i] for i in spread])
    batches = [{name: batch[name] for name in ("input_features", "labels")}]
    assert encoder == ",".join(map(str, select_encoder_layers(deep, batches, 2)))
    (layer,) = select_decoder_layers(deep, batches, 1)
    assert decoder == f"{layer}," and init_student(deep, decoder).config.decoder_layers == 1
    out = capsys.readouterr().out
    assert f"encoder layers {encoder}: " in out and f"decoder layer {layer}: " in out
    # not probed again, and not for other numbers
    heard.clear()
    checkpoint = str(tmp_path / "checkpoint-3")
    assert chosen(checkpoint, decoder_layers="1", encoder_layers="2") == (encoder, decoder) and not heard
    with pytest.raises(UserError, match="the run was started with --encoder_layers 2, --decoder_layers 1 and"):
        chosen(checkpoint, decoder_layers="1", encoder_layers="3")
    with pytest.raises(
        UserError, match="the run was started with --layer_selection greedy: resume it with this option"
    ):
        chosen(checkpoint, "spread", decoder_layers="1", encoder_layers="2")
    with pytest.raises(UserError, match="the run was started without --layer_selection greedy"):
        chosen(str(tmp_path / "other" / "checkpoint-3"), decoder_layers="1", encoder_layers="2")
    assert json.loads((tmp_path / "layers.json").read_text())["found"]["decoder_layers"] == decoder
    assert chosen(None, "spread", decoder_layers="1") == (None, "1")
    assert not (tmp_path / "layers.json").exists()  # it was another run's
