r"""Fine-tune a Whisper model: on labels and its own predictions, with or without a teacher, whole or with LoRA.

    askd-hf finetune --student you/whisper-small-fr --language fr \
        --dataset my_speech --eval_splits validation

trains it on the labels and, as a regularizer, on the student of the previous epoch: self-distillation without a
teacher. A teacher adds its distribution in the first phase. Its vocabulary and mel bins may differ, as large-v3's do:

    askd-hf finetune --student you/whisper-small-fr --language fr \
        --dataset my_speech --eval_splits validation --teacher openai/whisper-large-v3 --preset askd

--lora_r 32 --learning_rate 1e-3 trains only an adapter, a few percent of the weights, and merges it at the end. With
--keep_adapter it stays an adapter of some MB, which pipeline(...) loads on top of --student.

The options are those of `askd-hf distill`; two defaults differ: --preset ps-kd, --learning_rate 1e-5.
"""

from typing import Any

from ..arguments.parser import parse_args
from ..errors import UserError
from .distill import distill
from .options import options_of

OPTIONS = options_of("finetune")


def main(argv: list[str] | None = None) -> None:
    finetune(*parse_args(OPTIONS, argv, "askd-hf finetune", __doc__))


def finetune(*options: Any) -> None:
    """Fine-tune a model and report on it.

    Raises `UserError` as `distill` does, without a student, and for a teacher that the preset has no use for.

    Args:
        options: instances of the classes in `OPTIONS`.
    """
    model_args, data_args, *_, config = options
    if not model_args.student:
        raise UserError("--student is required: the Whisper model to fine-tune")
    if model_args.teacher and not (config.uses_teacher or data_args.unlabeled_dataset):
        raise UserError(
            f"--teacher has no effect: --preset {config.preset} has no teacher phase; choose --preset askd"
        )
    distill(*options)
