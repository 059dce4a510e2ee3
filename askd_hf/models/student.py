"""Make a student from a teacher's layers, and check that teacher and student fit together."""

import copy
import logging

import torch
from torch import nn
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from ..errors import UserError
from .layers import COPIED_LAYERS, layers_to_copy
from .teacher_memory import full_weights

logger = logging.getLogger(__name__)


def init_student(
    teacher: WhisperForConditionalGeneration,
    decoder_layers: int | list[int] | str = 2,
    encoder_layers: int | list[int] | str | None = None,
) -> WhisperForConditionalGeneration:
    """A float32 student of the chosen layers of `teacher`, all weights copied; the teacher is left as it is.

    Args:
        decoder_layers: how many (spread evenly) or which of the teacher's decoder layers to keep.
        encoder_layers: likewise; None keeps the encoder whole.
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
    student.load_state_dict(weights)
    student.generation_config = _generation_config(teacher, decoder)
    return student.to(teacher.device)


def _generation_config(teacher: WhisperForConditionalGeneration, kept: list[int]) -> GenerationConfig:
    """The teacher's, with the alignment heads (layer, head) of the decoder layers that the student has.

    Word timestamps index the decoder's layers by them, and crash where a layer is gone.
    """
    generation_config = copy.deepcopy(teacher.generation_config)
    heads = getattr(generation_config, "alignment_heads", None)
    if heads is not None:
        heads = [[kept.index(layer), head] for layer, head in heads if layer in kept]
        if heads:
            generation_config.alignment_heads = heads
        else:
            del generation_config.alignment_heads
            logger.warning("none of the teacher's alignment heads is left: the student has no word timestamps")
    return generation_config


def check_pair(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration, own_features: bool = False
) -> None:
    """Raise `UserError` unless one batch serves both models and their logits speak of the same tokens.

    Args:
        own_features: the batch has features for each of them, so they needn't have the same mel bins.
    """
    differences = pair_differences(teacher, student, own_features)
    if differences:
        raise UserError(
            f"teacher and student don't match: {'; '.join(differences)}. Another vocabulary: "
            "askd_hf.models.vocabulary.with_vocabulary_of; mel bins: SpeechCollator(..., teacher_extractor=...). "
            "The scripts do both by themselves"
        )


def pair_differences(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration, own_features: bool = False
) -> list[str]:
    """What `check_pair` refuses, in words."""
    differences = []
    for name, meaning in {
        "vocab_size": "tokens in the vocabulary",
        "num_mel_bins": "mel bins",
        "max_source_positions": "encoder positions",
        "decoder_start_token_id": "as the id of the start token",
    }.items():
        if name == "num_mel_bins" and own_features:
            continue
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs != ours:
            differences.append(f"{theirs} against {ours} {meaning}")
    return differences


def same_encoder(teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration) -> bool:
    """Whether the encoders have equal weights, up to the teacher's dtype."""
    same_heads = teacher.config.encoder_attention_heads == student.config.encoder_attention_heads
    return same_heads and _same_weights(teacher.model.encoder, student.model.encoder)


def _same_weights(teacher: nn.Module, student: nn.Module) -> bool:
    """Up to the teacher's dtype; an adapter on the student, and its names, aside."""
    theirs = full_weights(teacher)
    ours = {
        name.replace(".base_layer.", "."): weight
        for name, weight in student.state_dict().items()
        if ".lora_" not in name
    }
    return theirs.keys() == ours.keys() and all(
        weight.shape == ours[name].shape and torch.equal(weight, ours[name].to(weight.device, weight.dtype))
        for name, weight in theirs.items()
    )


def encoder_is_deterministic(config: WhisperConfig) -> bool:
    """Whether training leaves the encoder's output alone: no SpecAugment, no layerdrop, no dropout."""
    varies = config.apply_spec_augment or config.encoder_layerdrop or config.dropout or config.attention_dropout
    return not (varies or config.activation_dropout)
