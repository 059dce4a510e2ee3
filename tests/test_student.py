"""A student made of the teacher's layers."""

import pytest
import torch
from models import make_whisper

from askd_hf.errors import UserError
from askd_hf.models.generation_config import set_language
from askd_hf.models.layers import (
    copied_decoder_layers,
    copied_encoder_layers,
    is_pruned_encoder,
    layers_to_copy,
    merged_layers,
)
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.models.student import init_student, prune_encoder


@pytest.mark.parametrize(
    ("layers", "available", "expected"),
    [
        (2, 32, [0, 31]),
        (4, 32, [0, 10, 21, 31]),
        (1, 4, [3]),
        (4, 4, [0, 1, 2, 3]),
        ("3", 4, [0, 2, 3]),
        ("0,2", 4, [0, 2]),
        ([3, 1], 4, [3, 1]),
    ],
)
def test_layers_are_spread_with_first_and_last_or_taken_as_given(layers, available, expected):
    assert layers_to_copy(layers, available) == expected


@pytest.mark.parametrize("layers", [0, 5, "two", "0,4", [1, 1], [], "-1,0"])
def test_impossible_layers_are_refused(layers):
    with pytest.raises(UserError, match="--decoder_layers must be "):
        layers_to_copy(layers, 4)


def test_the_student_has_the_teachers_weights(teacher):
    student = init_student(teacher, decoder_layers=[0, 2], encoder_layers=1)
    assert (student.config.decoder_layers, student.config.encoder_layers, student.config.num_hidden_layers) == (
        2,
        1,
        1,
    )
    ours, theirs = student.state_dict(), teacher.state_dict()
    source = {"decoder.layers.0.": "decoder.layers.0.", "decoder.layers.1.": "decoder.layers.2."}
    source["encoder.layers.0."] = "encoder.layers.1."
    for name, weight in ours.items():
        for new, old in source.items():
            if new in name:
                name = name.replace(new, old)
                break
        assert torch.equal(weight, theirs[name]), name
    assert teacher.config.decoder_layers == 4


def test_a_student_of_all_layers_is_the_teacher(teacher):
    student = init_student(teacher, decoder_layers=4).eval()
    inputs = dict(input_features=torch.randn(2, 8, 100), decoder_input_ids=torch.tensor([[28, 3, 4], [28, 5, 6]]))
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, teacher(**inputs).logits)


def test_a_half_precision_teacher_gives_a_float32_student(teacher):
    student = init_student(teacher.half())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32
    assert student.proj_out.weight is student.model.decoder.embed_tokens.weight  # still tied


def test_alignment_heads_follow_their_layers_or_go(teacher):
    teacher.generation_config.alignment_heads = [[1, 0], [3, 1], [2, 1]]
    assert init_student(teacher, [1, 3]).generation_config.alignment_heads == [[0, 0], [1, 1]]
    assert not hasattr(init_student(teacher, [0]).generation_config, "alignment_heads")
    assert teacher.generation_config.alignment_heads == [[1, 0], [3, 1], [2, 1]]


def test_a_multilingual_model_needs_its_language(processor):
    model = make_whisper(processor)
    with pytest.raises(UserError, match="supports English only"):
        set_language(model, processor, "french", "transcribe")
    set_language(model, processor, "english", "transcribe")
    model.generation_config.is_multilingual = True
    with pytest.raises(UserError, match="--language is required"):
        set_language(model, processor, None, "transcribe")


def test_a_directory_without_a_processor_is_refused(tmp_path, teacher):
    teacher.save_pretrained(tmp_path)
    assert load_whisper(str(tmp_path)).config.d_model == 16
    with pytest.raises(UserError, match="no complete Whisper processor"):
        load_processor(str(tmp_path))


def test_dropped_encoder_layers_are_averaged_into_the_nearest(deep_teacher):
    merged = init_student(deep_teacher, 2, encoder_layers=2, merge_encoder_layers=True)
    theirs = [layer.state_dict() for layer in deep_teacher.model.encoder.layers]
    for new, group in enumerate([(0, 1), (2, 3)]):
        for name, weight in merged.model.encoder.layers[new].state_dict().items():
            torch.testing.assert_close(weight, (theirs[group[0]][name] + theirs[group[1]][name]) / 2)
    assert copied_encoder_layers(merged.config) == [0, 3]
    assert merged_layers([0, 2, 5], 6) == [[0, 1], [2, 3], [4, 5]]
    assert merged_layers([31], 32) == [list(range(32))]


def test_a_student_is_pruned_in_two_steps(deep_teacher):
    """The layers of the second step are named as the teacher's, which the hidden-state loss compares."""
    first = init_student(deep_teacher, 2, encoder_layers="0,1,3")
    second = prune_encoder(first, "0,2")
    assert copied_encoder_layers(second.config) == [0, 3] and second.config.decoder_layers == 2
    assert copied_decoder_layers(second.config) == copied_decoder_layers(first.config) == [0, 3]
    assert copied_encoder_layers(prune_encoder(first, 3).config) == [0, 1, 3]  # none removed
    assert copied_decoder_layers(prune_encoder(deep_teacher, "0,2").config) is None  # not made by `init_student`
    direct = init_student(deep_teacher, 2, encoder_layers="0,3")
    for name, weight in direct.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name
    assert is_pruned_encoder(second.config)
