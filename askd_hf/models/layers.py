"""The teacher's layers that a student has, and the layers that the hidden-state loss compares."""

from typing import NamedTuple

from transformers import WhisperConfig

from ..errors import UserError

# Field in the config of a student of `init_student`: {"encoder": [0, 3], "decoder": [0, 3]}, the copied teacher layers
# (encoder None if all were copied), and "trained": True once the trainer has saved the student.
COPIED_LAYERS = "copied_teacher_layers"


class LayerPairs(NamedTuple):
    """Indices of matched layers in `hidden_states`, where 0 is the input of the first layer. Both are equally long."""

    student: list[int]
    teacher: list[int]


def matched_layers(student_layers: int, teacher_layers: int, copied: list[int] | None = None) -> LayerPairs:
    """Return the hidden states of the encoders that the hidden-state loss compares.

    Each student layer is matched to the teacher layer that it was copied from. The last is always matched to the
    teacher's last, whose output after the final layer norm is the input of the decoder's cross-attention. The
    teacher's last layer is matched to no other layer, as its output before the norm isn't in `hidden_states`.

    Args:
        copied: the teacher layer of each student layer. None for evenly spread layers, as `init_student` copies them.
    """
    copied = evenly_spread(student_layers, teacher_layers) if copied is None else copied
    before = [(i + 1, layer + 1) for i, layer in enumerate(copied[:-1]) if layer < teacher_layers - 1]
    student, teacher = zip(*before, (student_layers, teacher_layers), strict=True)
    return LayerPairs(list(student), list(teacher))


def merged_layers(kept: list[int], available: int) -> list[list[int]]:
    """Return for each kept layer the layers that are merged into it: itself, and the dropped ones nearest to it.

    A layer between two kept ones at the same distance belongs to the earlier one.
    """
    groups: list[list[int]] = [[] for _ in kept]
    for layer in range(available):
        nearest = min(range(len(kept)), key=lambda i: (abs(kept[i] - layer), kept[i]))
        groups[nearest].append(layer)
    return groups


def layers_to_copy(layers: int | list[int] | str, available: int, kind: str = "decoder") -> list[int]:
    """Return the indices of the teacher layers that the student gets.

    Args:
        layers: a number, spread evenly, or a list: `2`, `"2"`, `[0, 31]`, `"0,31"`, or `"31,"` for a single layer.
        available: the number of the teacher's layers.
        kind: encoder or decoder, for the message.

    Raises `UserError` for layers that the teacher doesn't have.
    """
    try:
        if isinstance(layers, str):
            layers = [int(i) for i in layers.removesuffix(",").split(",")] if "," in layers else int(layers)
    except ValueError:
        raise UserError(f"--{kind}_layers must be a number or a list such as 0,1,31, got {layers!r}") from None
    if isinstance(layers, int):
        if not 1 <= layers <= available:
            raise UserError(
                f"--{kind}_layers must be between 1 and {available}, the number of the teacher's layers, got {layers}"
            )
        return evenly_spread(layers, available)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < available for i in layers):
        raise UserError(
            f"--{kind}_layers must be distinct layers from 0 to {available - 1}, the teacher's last, got {layers}"
        )
    return list(layers)


def evenly_spread(layers: int, available: int) -> list[int]:
    """Return evenly spread indices with the first and the last layer (Distil-Whisper, Gandhi et al. 2023, section 4).

    A single layer is the last, as the final layer norm and all later layers were trained on its output.
    """
    if layers == 1:
        return [available - 1]
    return [round(i * (available - 1) / (layers - 1)) for i in range(layers)]


def copied_encoder_layers(config: WhisperConfig) -> list[int] | None:
    """Return the teacher encoder layers that `init_student` copied. None if it copied all or made no such student."""
    return (getattr(config, COPIED_LAYERS, None) or {}).get("encoder")


def copied_decoder_layers(config: WhisperConfig) -> list[int] | None:
    """Return the teacher decoder layers that `init_student` copied. None if it didn't make the student."""
    return (getattr(config, COPIED_LAYERS, None) or {}).get("decoder")


def is_pruned_encoder(config: WhisperConfig) -> bool:
    """Return whether the encoder has only some of its teacher's layers and has not been trained since."""
    return copied_encoder_layers(config) is not None and not getattr(config, COPIED_LAYERS).get("trained")
