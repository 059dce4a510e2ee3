"""Load the teacher, and load or make the student, as `ModelArguments` say."""

from transformers import WhisperForConditionalGeneration

from ..arguments import ModelArguments
from .loading import load_whisper
from .student import init_student


def load_teacher(model_args: ModelArguments) -> WhisperForConditionalGeneration:
    return load_whisper(model_args.teacher, attn_implementation=model_args.attn_implementation)


def load_student(
    model_args: ModelArguments, teacher: WhisperForConditionalGeneration | None
) -> WhisperForConditionalGeneration:
    """Load `--student`, or make a student of the teacher's layers, which doesn't change the teacher."""
    if model_args.student:
        return load_whisper(model_args.student, attn_implementation=model_args.attn_implementation)
    window = model_args.window
    return init_student(
        teacher, model_args.decoder_layers, model_args.encoder_layers, None if window is None else window.longest
    )
