"""Create a student from a teacher's layers, and check that teacher and student fit together."""

import copy
import logging
import re

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from ..errors import UserError
from .layers import (
    COPIED_LAYERS,
    copied_decoder_layers,
    copied_encoder_layers,
    layers_to_copy,
    merged_layers,
)
from .teacher_memory import full_weights
from .window import crop_window

logger = logging.getLogger(__name__)

ADAPTER_B = re.compile(r"\.lora_(embedding_)?B\.")  # names of LoRA's second matrix, which is 0 at first


def init_student(
    teacher: WhisperForConditionalGeneration,
    decoder_layers: int | list[int] | str = 2,
    encoder_layers: int | list[int] | str | None = None,
    window_seconds: int | None = None,
    merge_encoder_layers: bool = False,
) -> WhisperForConditionalGeneration:
    """Return a float32 student with copies of some layers of `teacher` and of all other weights.

    Args:
        decoder_layers: the number of decoder layers, spread evenly, or their indices in the teacher.
        encoder_layers: the same for the encoder. None for all layers.
        window_seconds: the student's audio window. None for the teacher's. See `models.window`.
        merge_encoder_layers: True to average each dropped encoder layer into the nearest layer that is kept.

    Raises `UserError` for layers that the teacher doesn't have, and for a window that is longer than the teacher's.
    """
    config = copy.deepcopy(teacher.config)
    decoder = layers_to_copy(decoder_layers, config.decoder_layers)
    encoder = layers_to_copy(
        config.encoder_layers if encoder_layers is None else encoder_layers, config.encoder_layers, "encoder"
    )
    config.decoder_layers, config.encoder_layers = len(decoder), len(encoder)
    config.num_hidden_layers = config.encoder_layers
    config.dtype = torch.float32
    whole = encoder == list(range(teacher.config.encoder_layers))
    setattr(config, COPIED_LAYERS, {"encoder": None if whole else encoder, "decoder": decoder})
    student = WhisperForConditionalGeneration(config)

    new_index = {f"model.decoder.layers.{old}.": f"model.decoder.layers.{new}." for new, old in enumerate(decoder)}
    new_index |= {f"model.encoder.layers.{old}.": f"model.encoder.layers.{new}." for new, old in enumerate(encoder)}
    weights = {}
    for name, weight in teacher.state_dict().items():
        if ".layers." in name:
            prefix = ".".join(name.split(".")[:4]) + "."
            if prefix not in new_index:
                continue
            name = new_index[prefix] + name.removeprefix(prefix)
        weights[name] = weight
    if merge_encoder_layers:
        _merge_encoder_layers(weights, teacher, encoder)
    student.load_state_dict(weights)
    if window_seconds is not None:
        crop_window(student, window_seconds)
    student.generation_config = _generation_config(teacher, decoder)
    return student.to(teacher.device)


def _merge_encoder_layers(
    weights: dict[str, Tensor], teacher: WhisperForConditionalGeneration, kept: list[int]
) -> None:
    """Replace the weights of the student's encoder layers by means over `merged_layers`, in place."""
    layers = [layer.state_dict() for layer in teacher.model.encoder.layers]
    for new, group in enumerate(merged_layers(kept, len(layers))):
        for name in layers[0]:
            mean = torch.stack([layers[old][name].float() for old in group]).mean(0)
            weights[f"model.encoder.layers.{new}.{name}"] = mean


def _generation_config(teacher: WhisperForConditionalGeneration, kept: list[int]) -> GenerationConfig:
    """Return the teacher's generation config with the alignment heads, (layer, head), of the `kept` decoder layers.

    Word timestamps would crash on heads of missing layers.
    """
    generation_config = copy.deepcopy(teacher.generation_config)
    heads = getattr(generation_config, "alignment_heads", None)
    if heads is not None:
        heads = [[kept.index(layer), head] for layer, head in heads if layer in kept]
        if heads:
            generation_config.alignment_heads = heads
        else:
            del generation_config.alignment_heads
            logger.warning("no word timestamps: the student has none of the layers with the teacher's alignment heads")
    return generation_config


def prune_encoder(
    student: WhisperForConditionalGeneration, encoder_layers: int | list[int] | str, merge_encoder_layers: bool = False
) -> WhisperForConditionalGeneration:
    """Return a trained student with some of its encoder layers, to prune an encoder in several steps.

    The record of the copied layers stays that of the teacher's layers, which the hidden-state loss compares.
    """
    copied = copied_encoder_layers(student.config)
    whole = list(range(student.config.decoder_layers))
    pruned = init_student(student, whole, encoder_layers, merge_encoder_layers=merge_encoder_layers)
    kept = copied_encoder_layers(pruned.config)
    record = getattr(pruned.config, COPIED_LAYERS)
    record["decoder"] = copied_decoder_layers(student.config)
    if copied is not None:
        record["encoder"] = copied if kept is None else [copied[layer] for layer in kept]
    return pruned


def check_pair(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration, own_features: bool = False
) -> None:
    """Raise `UserError` if teacher and student can't share a batch, or have different vocabularies.

    Args:
        own_features: True if the batch has separate features for the teacher, so that mel bins and windows may differ.
    """
    differences = pair_differences(teacher, student, own_features)
    if differences:
        raise UserError(
            f"teacher and student don't fit together: {'; '.join(differences)}. For another vocabulary use "
            "askd_hf.models.vocabulary.with_vocabulary_of, for other mel bins "
            "or another window SpeechCollator(..., teacher_extractor=...), as the scripts do"
        )


def pair_differences(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration, own_features: bool = False
) -> list[str]:
    """Return the differences that `check_pair` rejects, such as "vocab_size: teacher 51866, student 51865"."""
    differences = []
    for name in ("vocab_size", "num_mel_bins", "max_source_positions", "decoder_start_token_id"):
        if own_features and name in ("num_mel_bins", "max_source_positions"):
            continue
        of_teacher, of_student = getattr(teacher.config, name), getattr(student.config, name)
        if of_teacher != of_student:
            differences.append(f"{name}: teacher {of_teacher}, student {of_student}")
    return differences


def same_encoder(teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration) -> bool:
    """Return whether the encoders have equal weights, compared in the teacher's dtype.

    An adapter on the student's encoder may be there if it changes nothing: as it was created, with B = 0.
    """
    same_heads = teacher.config.encoder_attention_heads == student.config.encoder_attention_heads
    changes = ADAPTER_B.search
    if any(changes(name) and weight.any() for name, weight in student.model.encoder.state_dict().items()):
        return False
    return same_heads and _same_weights(teacher.model.encoder, student.model.encoder)


def _same_weights(teacher: nn.Module, student: nn.Module) -> bool:
    """Compare in the teacher's dtype, without the student's adapter."""
    teacher_weights = full_weights(teacher)
    student_weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in student.state_dict().items()
        if ".lora_" not in name
    }
    return teacher_weights.keys() == student_weights.keys() and all(
        weight.shape == student_weights[name].shape
        and torch.equal(weight, student_weights[name].to(weight.device, weight.dtype))
        for name, weight in teacher_weights.items()
    )


def encoder_is_deterministic(config: WhisperConfig) -> bool:
    """Return whether the encoder has no SpecAugment, layerdrop or dropout in training."""
    varies = config.apply_spec_augment or config.encoder_layerdrop or config.dropout or config.attention_dropout
    return not (varies or config.activation_dropout)
