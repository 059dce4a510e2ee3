"""Load the teacher, and load or make the student, as `ModelArguments` say."""

from transformers import WhisperForConditionalGeneration

from ..arguments import ModelArguments
from ..arguments.models import DECODER_LAYERS
from ..errors import UserError
from .loading import load_whisper
from .student import init_student, prune_encoder
from .window import shortest_context


def load_teacher(model_args: ModelArguments) -> WhisperForConditionalGeneration:
    return load_whisper(model_args.teacher, attn_implementation=model_args.attn_implementation)


def load_student(
    model_args: ModelArguments, teacher: WhisperForConditionalGeneration | None
) -> WhisperForConditionalGeneration:
    """Load `--student`, or make a student of the teacher's layers, which doesn't change the teacher.

    With `--encoder_layers`, `--student` loses encoder layers.
    """
    merge = model_args.layer_selection == "merged"
    if model_args.student:
        student = load_whisper(model_args.student, attn_implementation=model_args.attn_implementation)
        if model_args.encoder_layers is None:
            return student
        return prune_encoder(student, model_args.encoder_layers, merge)
    window = None if model_args.window is None else model_args.window.longest
    return init_student(teacher, model_args.decoder_layers, model_args.encoder_layers, window, merge)


def check_student_options(models: ModelArguments) -> None:
    """Raise `UserError` for options of a student created from the teacher, if `--student` is given."""
    if not models.student:
        return
    if models.decoder_layers != DECODER_LAYERS:
        raise UserError(
            f"--decoder_layers {models.decoder_layers} is not supported with --student, which has its own layers"
        )
    if models.layer_selection == "greedy":
        raise UserError("--layer_selection greedy is not supported with --student, which has its own layers")
    if models.vocabulary is not None:
        raise UserError("--vocabulary is not supported with --student, which has its own vocabulary")
    if models.window is not None and shortest_context(models) is None:
        raise UserError(
            "--window_seconds with --student, which has its own window, must be a range that ends at this window, "
            "such as 3-10"
        )
