"""Which layers of the teacher a student has, and which of them the hidden-state loss compares."""

from typing import NamedTuple

from transformers import WhisperConfig

from ..errors import UserError

# In the config of a student that `init_student` made: {"encoder": [0, 3], "decoder": [0, 3]}, the teacher's layers
# that it copied (encoder None if all were), and "trained" once the trainer has saved it.
COPIED_LAYERS = "copied_teacher_layers"


class LayerPairs(NamedTuple):
    """Matched layers, by their index in `hidden_states`, where 0 is the first layer's input: equally long."""

    student: list[int]
    teacher: list[int]


def matched_layers(student_layers: int, teacher_layers: int, copied: list[int] | None = None) -> LayerPairs:
    """Which hidden states of the encoders are compared.

    Each of the student's layers is matched to the teacher's that it was copied from, but the last always to the
    teacher's last: what comes out there, after the final layer norm, is what a decoder of the teacher's layers
    listens to. The teacher's last layer is matched to nothing else, as its output without the norm isn't at hand.

    Args:
        copied: the teacher's layer of each of the student's. None: spread evenly, as `init_student` does.
    """
    copied = evenly_spread(student_layers, teacher_layers) if copied is None else copied
    before = [(i + 1, layer + 1) for i, layer in enumerate(copied[:-1]) if layer < teacher_layers - 1]
    student, teacher = zip(*before, (student_layers, teacher_layers), strict=True)
    return LayerPairs(list(student), list(teacher))


def layers_to_copy(layers: int | list[int] | str, available: int, kind: str = "decoder") -> list[int]:
    """The teacher's layers that the student gets, from a number or a list, as in `2`, `"2"`, `[0, 31]` or `"0,31"`.

    `"31,"` is a list of a single layer. A number is spread evenly. Raises `UserError` for layers that the teacher
    doesn't have.
    """
    try:
        if isinstance(layers, str):
            layers = [int(i) for i in layers.removesuffix(",").split(",")] if "," in layers else int(layers)
    except ValueError:
        raise UserError(f"{kind}_layers: {layers!r} is neither a number nor a list such as 0,1,31") from None
    if isinstance(layers, int):
        if not 1 <= layers <= available:
            raise UserError(f"{kind}_layers: {layers} is not between 1 and the teacher's {available}")
        return evenly_spread(layers, available)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < available for i in layers):
        raise UserError(f"{kind}_layers: {layers} must be different layers from 0 to the teacher's {available - 1}")
    return list(layers)


def evenly_spread(layers: int, available: int) -> list[int]:
    """`layers` of `available`, the first and the last kept (distil-whisper, Gandhi et al. 2023, section 4).

    A single layer is the last, whose output the layer norm and what follows it were trained on.
    """
    if layers == 1:
        return [available - 1]
    return [round(i * (available - 1) / (layers - 1)) for i in range(layers)]


def copied_encoder_layers(config: WhisperConfig) -> list[int] | None:
    """The teacher's encoder layers that `init_student` copied; None if all were, or if it didn't make the student."""
    return (getattr(config, COPIED_LAYERS, None) or {}).get("encoder")


def copied_decoder_layers(config: WhisperConfig) -> list[int] | None:
    """The teacher's decoder layers that `init_student` copied; None if it didn't make the student."""
    return (getattr(config, COPIED_LAYERS, None) or {}).get("decoder")


def is_pruned_encoder(config: WhisperConfig) -> bool:
    """Whether the encoder has only some of its teacher's layers and hasn't been trained since."""
    return copied_encoder_layers(config) is not None and not getattr(config, COPIED_LAYERS).get("trained")
